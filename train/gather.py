"""The weights of a model in training, whole and on the CPU, however DeepSpeed has cut them up."""

from typing import Any

import torch
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled


def has_masters(model: Any) -> bool:
    """True where a 16-bit model trains on float32 masters (DeepSpeed's); any rank, no
    collective."""
    return bool(model.dtype != torch.float32) and any(
        hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
        for parameter in model.parameters()
    )


def gather_weights(model: Any, *, masters: bool, keep: bool) -> dict[str, torch.Tensor]:
    """Name to tensor, tied ones once; of a LoRA, what is trained. A collective under DeepSpeed:
    call it on every rank.

    Args:
        model: the unwrapped model.
        masters: the float32 masters instead of the 16-bit weights.
        keep: False on ranks that only take part; they get an empty dict.
    """
    only_trained = isinstance(model, PeftModel)
    weights = {}
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        tensor = _master(parameter) if masters else _whole(parameter)
        if keep:
            weights[name] = tensor.to("cpu")
    if keep:
        names = dict(model.named_buffers()).keys()
        weights |= {
            name: value.to("cpu") for name, value in model.state_dict().items() if name in names
        }
    return weights


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if not is_deepspeed_zero3_enabled():
        return parameter.detach()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    master: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    return _whole(parameter).float() if master is None else master  # a frozen weight has none
