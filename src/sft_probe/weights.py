"""The files that hold a checkpoint's weights, checked before anything loads them. Safetensors
only."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sft_probe.errors import UserError
from sft_probe.files import read_object

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def check_weight_files(folder: Path) -> None:
    """Check that a model's directory holds `model.safetensors`, or all the files that its index
    names.

    Raises:
        UserError: there is neither, a file is missing or damaged, or the index has another shape
            than transformers reads.
    """
    for path in weight_files(folder):
        check_safetensors(path)


def weight_files(folder: Path) -> list[Path]:
    """Return `model.safetensors`, or all the files that its index names.

    Raises:
        UserError: there is neither, or the index has another shape than transformers reads.
    """
    return [folder / _WEIGHTS] if (folder / _WEIGHTS).is_file() else _indexed_files(folder)


def check_safetensors(path: Path) -> None:
    """Raise `UserError` where a file is missing or its header and length are not those of a
    safetensors file."""
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _indexed_files(folder: Path) -> list[Path]:
    path = folder / _INDEX
    if not path.is_file():
        raise UserError(f"{folder} holds no {_WEIGHTS}; weights of other kinds are not read.")
    index = read_object(path)
    for key in ("weight_map", "metadata"):
        if not isinstance(index.get(key), dict):
            raise UserError(f"{path}: `{key}` must be an object. Save the model again.")
    names = list(index["weight_map"].values())
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{path}: `weight_map` must give the name of a file here for each tensor.")
    return [folder / name for name in sorted(set(names))]


def base_of(folder: Path, revision: str) -> tuple[str, str]:
    """Return name and revision of the whole model: the directory itself, or the base of the adapter
    that it holds.

    Raises:
        UserError: the adapter's config names no base, or another adapter.
    """
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return str(folder), revision
    adapter = read_object(path)
    base, base_revision = adapter.get("base_model_name_or_path"), adapter.get("revision") or "main"
    if not isinstance(base, str) or not base:
        state = f"is {json.dumps(base)}" if "base_model_name_or_path" in adapter else "is missing"
        raise UserError(
            f"{path}: `base_model_name_or_path` {state}; it must name the model the adapter was "
            "made for."
        )
    if (Path(base) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{path}: the base, {base}, is an adapter itself; merge that one into its own base "
            "first."
        )
    if not isinstance(base_revision, str):
        raise UserError(
            f"{path}: `revision` is {base_revision!r}; it must be the name of a revision of {base}."
        )
    return base, base_revision
