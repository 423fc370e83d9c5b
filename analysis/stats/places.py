"""What lies at a path that a user names, as far as file names and small JSON files tell.

Imports nothing that takes time, so that a wrong path or category is found at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sft_probe.errors import UserError, check_names
from sft_probe.files import check_exists, find, read_object

IMPORT_MANIFEST = "import.json"
Kind = Literal["rows", "import", "run", "table", "export"]
_EXPORTS = ("**/results_*.json", "*metrics.json", "trainer_state.json", "*step*.json")


def named_path(path: Path) -> tuple[str, Path]:
    """Return the name and the path of `NAME=PATH`; the name is empty for a path alone."""
    name, equals, rest = str(path).partition("=")
    is_named = bool(equals and rest) and "/" not in name and not path.exists()
    return (name, Path(rest)) if is_named else ("", path)


def kind_of(path: Path) -> Kind:
    """Return what a path holds.

    Returns:
        `rows`: a parquet file of score rows; `import`: a directory that `sft-probe import` wrote;
        `run`: one with rows of its steps; `table`: one with `scores.parquet`; `export`: what other
        programs wrote.

    Raises:
        UserError: it does not exist, or holds nothing of that.
    """
    check_exists(path)
    if path.is_file():
        return "rows" if path.suffix == ".parquet" else "export"
    if is_import(path):
        return "import"
    if any(path.glob("sweep/step_*/*/rows.jsonl")) or any(path.glob("probe/step_*.jsonl")):
        return "run"
    if (path / "scores.parquet").is_file():
        return "table"
    if any(find(path, pattern) for pattern in _EXPORTS):
        return "export"
    raise UserError(
        f"{path} holds no scores: no sweep (`sft-probe sweep {path}`), no live probe (`sft-probe "
        "train --probe_steps`), no scores.parquet and no results of lm-eval."
    )


def is_import(directory: Path) -> bool:
    """Return whether a directory is that of an imported run."""
    return (directory / IMPORT_MANIFEST).is_file()


def check_runs(paths: Sequence[Path], categories: Sequence[str] | None = None) -> None:
    """Raise `UserError` where a path holds no scores, or their manifests name all categories and
    one that is asked for is not among them."""
    recorded: dict[str, None] = {}
    is_known = True
    for _, path in map(named_path, paths):
        kind = kind_of(path)
        names = _recorded_categories(path) if kind == "run" else []
        recorded.update(dict.fromkeys(names))
        is_known = is_known and bool(names)
    if is_known:
        check_names("--categories", "category", categories or (), list(recorded))


def _recorded_categories(path: Path) -> list[Any]:
    """Return the categories that sweep and live probe of a run have recorded."""
    manifests = [path / "sweep/manifest.json", path / "probe/manifest.json"]
    found = [
        read_object(manifest, optional={"categories": list}).get("categories", [])
        for manifest in manifests
        if manifest.is_file()
    ]
    return [name for names in found for name in names]
