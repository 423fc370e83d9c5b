"""A PEFT adapter on its base, as `PeftModel.from_pretrained` puts it there, or the reason why it
cannot be scored."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft_probe.errors import UserError
from sft_probe.files import read_object
from sft_probe.models import load_model, local_folder, one_line
from sft_probe.weights import ADAPTER_CONFIG, base_of, check_safetensors

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NUM_TRIAL_TOKENS = 8
_NOT_SCORED = {
    "LILY": "their routers average over all tokens of a batch, later ones too",
    "POLY": "they need the number of a task",
    "SHADOW": "they run a second model beside the base",
    "XLORA": "they mix other adapters, which are not stored with them",
}


def load_adapter(folder: Path, dtype: str, device: str = "cpu") -> "PeftModel":
    """Load an adapter and its base afresh, in eval mode.

    The base is never one that held another adapter: adapters leave tensors, wrappers and untied
    heads behind.

    Raises:
        UserError: as `attach_adapter`; or the base cannot be loaded.
    """
    _check_config(folder)
    base: Any = load_model(str(local_folder(*base_of(folder, "main"))), dtype)
    return attach_adapter(base.to(device), folder)


def attach_adapter(base: Any, folder: Path) -> "PeftModel":
    """Put an adapter on its base, a model that holds no other one.

    Raises:
        UserError: config or tensors have a fault, or the adapter is of a kind that does more than
            change layers.
    """
    from peft import PeftModel

    path = folder / _ADAPTER_WEIGHTS
    kind = _check_config(folder)
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {_ADAPTER_WEIGHTS}; weights of other kinds are not read."
        )
    check_safetensors(path)
    device = str(base.device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Found missing adapter keys"
            )  # an error of ours, below
            model: PeftModel = PeftModel.from_pretrained(base, str(folder), torch_device=device)
            loaded = model.load_adapter(
                str(folder), "default", torch_device=device
            )  # once more, for what did not fit
    except KeyError as error:
        raise UserError(f"{path} lacks tensors of the adapter: {error}") from error
    except (
        Exception
    ) as error:  # PEFT raises errors of any kind for configs and tensors of another shape
        raise UserError(f"cannot load the {kind} adapter {folder}: {one_line(error)}") from error
    if missing := _not_stored(model, loaded.missing_keys):
        raise UserError(f"{path} lacks tensors of the adapter: {missing[:5]}")
    if loaded.unexpected_keys:
        raise UserError(
            f"{path} has tensors that the adapter has no place for: "
            f"{sorted(loaded.unexpected_keys)[:5]}"
        )
    check_adapter(model, str(folder))
    return model


def _check_config(folder: Path) -> str:
    """Return the adapter's type. Raise `UserError` where PEFT cannot read the config, or it cannot
    be scored."""
    from peft import PeftConfig, PeftType

    path = folder / ADAPTER_CONFIG
    kind = read_object(path).get("peft_type")
    if kind not in list(PeftType):
        raise UserError(
            f"{path}: `peft_type` is {kind!r}, which is no adapter type that the installed peft "
            "knows."
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises errors of any kind for values of another type
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    _check_kind(config, str(folder))
    return str(kind)


def _check_kind(config: Any, name: str) -> None:
    """Raise `UserError` where the type of an adapter, or an option of it, rules out that its scores
    would be right."""
    kind = str(config.peft_type.value)
    if config.is_prompt_learning:
        raise UserError(f"{name}: adapters that learn a prompt cannot be scored ({kind}).")
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(f"{name}: activated LoRA (`alora_invocation_tokens`) cannot be scored.")
    if kind in _NOT_SCORED:
        raise UserError(
            f"{name}: adapters of the type {kind} cannot be scored: {_NOT_SCORED[kind]}."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and "niter" in init:
        raise UserError(
            f"{name}: `init_lora_weights` {init!r} changes the base by a random approximation, so "
            "that no two loads are equal. Convert it to a plain LoRA (save_pretrained, "
            "path_initial_model_for_weight_conversion)."
        )


def _not_stored(model: "PeftModel", missing: list[str]) -> list[str]:
    """Return those of the names that share no memory with a tensor that was loaded."""
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return sorted(
        name.replace(".default", "") for name in missing if state[name].data_ptr() not in loaded
    )


def check_adapter(model: "PeftModel", name: str) -> None:
    """Check that the base with the adapter in its layers, which is what is scored, computes what
    the PEFT model does.

    Raises:
        UserError: it does not, as for learned prompts and for hooks around the model; no two passes
            are equal; or a token changes what was predicted before it, so that the result depends
            on what else is in a batch.
    """
    _check_kind(model.active_peft_config, name)
    kind = model.active_peft_config.peft_type.value
    base = model.get_base_model()
    ids = (
        torch.arange(2 * _NUM_TRIAL_TOKENS, device=model.device)[None]
        % base.config.get_text_config().vocab_size
    )
    others = ids.clone()
    others[:, _NUM_TRIAL_TOKENS:] = ids[:, :_NUM_TRIAL_TOKENS]
    try:
        with torch.no_grad():
            expected, again, scored, changed = (
                run(input_ids=tokens).logits
                for run, tokens in ((model, ids), (base, ids), (base, ids), (base, others))
            )
    except Exception as error:  # what an adapter's own forward raises
        raise UserError(
            f"{name}: a model with this {kind} adapter does not run: {one_line(error)}"
        ) from error
    early = slice(_NUM_TRIAL_TOKENS)
    on_cpu, is_float32 = model.device.type == "cpu", base.dtype == torch.float32
    # the same tokens give the same sums on a CPU; a mixture of experts multiplies other tokens in
    # other groups
    pairs = (
        (expected, scored, 0 if on_cpu else 1e-2),
        (again, scored, 0 if on_cpu else 1e-2),
        (changed[:, early], scored[:, early], 1e-4 if is_float32 and on_cpu else 5e-2),
    )
    if not all(
        torch.allclose(one, other, rtol=0, atol=atol, equal_nan=True) for one, other, atol in pairs
    ):
        raise UserError(
            f"{name}: adapters of the type {kind} with this config cannot be scored: they do more "
            "than change layers, "
            "are random, or look at later tokens."
        )
