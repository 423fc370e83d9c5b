"""How a packed sequence is masked: what transformers accepts in silence and gets wrong, in one
place.

transformers passes a 4D mask through as it is, so a sliding window must be in it, by position;
models with mixed layers want one mask per layer type; eager attention adds its mask, so that a bool
would count as 0 and 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK_ROWS = 64
_BLOCKS = "sft_probe_blocks"


@dataclass(frozen=True, kw_only=True)
class ForwardMode:
    """How a model is run. The plain mode has one item per row, padded on the right, and the model's
    own mask."""

    shared: bool
    """Shared prefixes once, in packs."""
    alone: bool = False
    """One item at a time, without padding: where what else is in a batch changes a row."""
    mask_per_layer_type: bool = False
    """The model takes `{"full_attention": ..., "sliding_attention": ...}`."""
    blocks: bool = False
    """SDPA in blocks of rows, each over the columns that it sees: less attention, for CPUs."""


PLAIN = ForwardMode(shared=False)
ALONE = ForwardMode(shared=False, alone=True)


def candidates(model: "PreTrainedModel") -> Iterator[ForwardMode]:
    """Yield the modes with shared prefixes that may be right for a model, fastest first; none where
    its attention takes no mask."""
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return
    on_cpu = attention == "sdpa" and model.device.type == "cpu"
    for blocks in (True, False) if on_cpu else (False,):
        for mask_per_layer_type in (True, False):
            yield ForwardMode(shared=True, mask_per_layer_type=mask_per_layer_type, blocks=blocks)


def make_masks(
    model: "PreTrainedModel", mask: torch.Tensor, positions: torch.Tensor, mode: ForwardMode
) -> Any:
    """Return the mask as the model's attention reads it: per layer type, windowed by position, bool
    or additive.

    Args:
        model: its config gives window and attention.
        mask: bool [B, 1, L, L], True where a row sees a column.
        positions: int64 [B, L].
        mode: whether the model wants a mask per layer type.
    """
    config = model.config.get_text_config()
    windowed = mask
    if (window := getattr(config, "sliding_window", None)) is not None:
        windowed = mask & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    if config._attn_implementation == "eager":
        mask, windowed = (_additive(m, model.dtype) for m in (mask, windowed))
    return (
        {"full_attention": mask, "sliding_attention": windowed}
        if mode.mask_per_layer_type
        else windowed
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # the lowest finite number, not -inf: some models add more to it
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


@contextmanager
def attention_in_blocks(model: "PreTrainedModel", masks: Any) -> Iterator[None]:
    """Run the model's SDPA in blocks of rows, each over those columns only that its mask (bool, [B,
    1, L, L]) uses."""
    from transformers import AttentionInterface

    by_type = masks.values() if isinstance(masks, dict) else [masks]
    blocks = {id(mask): list(_blocks(mask, model.dtype)) for mask in by_type}

    def attend(
        _module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Any, None]:
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                attn_mask=additive,
                scale=scaling,
                enable_gqa=True,
            )
            for rows, columns, additive in blocks[id(mask)]
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_BLOCKS, attend)
    model.config._attn_implementation = _BLOCKS
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


def _blocks(
    mask: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield blocks of rows with the columns that any of them sees, and their additive mask."""
    length = mask.shape[-1]
    for start in range(0, length, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, length))
        columns = mask[:, 0, rows].flatten(0, 1).any(dim=0).nonzero()[:, 0]
        yield rows, columns, _additive(mask[:, :, rows, columns], dtype)
