"""Weights of a checkpoint, read by mmap into a model that is already in memory. Safetensors only."""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sft_probe.errors import UserError
from sft_probe.files import read_object

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
_INDEX = {"weight_map": dict, "metadata": dict}
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def copy_weights(model: "PreTrainedModel", folder: Path) -> bool:
    """Copies the tensors of a Hugging Face directory into `model`, cast to its dtype; tied ones may be stored once.

    Returns False, with the model as it was, where the names in the files are not those of the model: transformers'
    own loader knows the renamings of each architecture, and names what does not fit.

    Raises:
        UserError: the directory holds no safetensors or damaged ones; a tensor has another shape; tied ones differ.
    """
    with ExitStack() as stack:
        stored: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {path}: {error}") from error
            stored |= dict.fromkeys(file.keys(), file)
        groups = _tied_groups(model)
        names = {name for group in groups for name in group}
        if not set(stored) <= names or not all(set(group) & set(stored) for group in groups):
            return False
        _check_shapes(groups, stored, folder)
        for group, target in groups.items():
            first, *others = [stored[name].get_tensor(name) for name in group if name in stored]
            if any(not torch.equal(first, other) for other in others):
                raise UserError(f"{folder}: the model ties {' and '.join(group)}, but the stored ones differ.")
            target.copy_(first)
    return True


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the files that its index names. Raises `UserError` where there is neither."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(f"{folder} holds no model.safetensors; weights of other kinds are not read.")
    return [folder / name for name in sorted(set(read_object(index, _INDEX)["weight_map"].values()))]


def _tied_groups(model: "PreTrainedModel") -> dict[tuple[str, ...], torch.Tensor]:
    """Names of the model's tensors to their tensor; those that are one in memory stand together."""
    state: dict[str, torch.Tensor] = model.state_dict()
    by_place = defaultdict(list)
    for name, tensor in state.items():
        by_place[tensor.data_ptr(), tensor.shape].append(name)
    return {tuple(names): state[names[0]] for names in by_place.values()}


def _check_shapes(groups: dict[tuple[str, ...], torch.Tensor], stored: dict[str, Any], folder: Path) -> None:
    wrong = []
    for group, target in groups.items():
        for name in set(group) & set(stored):
            shape = list(stored[name].get_slice(name).get_shape())
            if shape != list(target.shape):
                wrong.append(f"{name} {shape}, not {list(target.shape)}")
    if wrong:
        raise UserError(f"{folder}: tensors of another shape than the model's: {'; '.join(sorted(wrong)[:5])}")


def copy_adapter(model: "PeftModel", folder: Path) -> None:
    """Copies an adapter's tensors into a model that has one of the same configuration.

    Raises:
        UserError: there are no safetensors or damaged ones; tensors are missing, left over or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / _ADAPTER_WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if missing := sorted(set(expected) - set(stored)):
        raise UserError(f"{path} lacks tensors of the adapter: {missing[:5]}")
    if extra := sorted(set(stored) - set(expected) - set(model.state_dict())):
        raise UserError(f"{path} has tensors that the adapter has no place for: {extra[:5]}")
    if wrong := sorted(name for name in expected if expected[name].shape != stored[name].shape):
        raise UserError(f"{path}: tensors of another shape than the adapter's: {wrong[:5]}")
    set_peft_model_state_dict(model, stored)
