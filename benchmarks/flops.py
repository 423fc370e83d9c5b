"""What the benchmark scripts compare seconds with: rates of the machine, and the least work that
scoring takes."""

import math
import statistics
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from common import timed

from sft_probe.scoring.packing import Continuation


def _rate(call: Callable[[], Any], flops: float, device: str, repeats: int) -> float:
    def synced() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    synced()
    return flops / statistics.median(timed(synced)[0] for _ in range(repeats))


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of one large square matmul: what the machine can do."""
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return _rate(lambda: left @ right, 2 * size**3, device, repeats=7)


def own_shape_rate(model: Any, rows: int = 1024) -> float:
    """FLOP/s of the model's own weight matrices, body and head, each applied to [rows,
    in_features]."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    widths = {layer.in_features for layer in layers}
    inputs = {
        width: torch.randn(rows, width, dtype=model.dtype, device=model.device) for width in widths
    }

    def call() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    with torch.no_grad():
        return _rate(
            call,
            2 * rows * sum(layer.weight.numel() for layer in layers),
            model.device.type,
            repeats=3,
        )


def floor_flops(model: Any, items: Iterable[Continuation]) -> float:
    """The fewest FLOPs: every distinct prefix through every layer once, every distinct predicting
    row through the head.

    Matmuls alone: weights, and attention (QK^T and AV) over the pairs of tokens that see each
    other.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [
        layer
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    ]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs = sorted((item.input_ids, len(item.prefix_ids)) for item in items)
    tokens = pairs = rows = 0
    for (before, _), (ids, num_prefix) in pairwise([([], 0), *inputs]):
        differ = (
            i for i, (left, right) in enumerate(zip(before, ids, strict=False)) if left != right
        )
        shared = next(differ, min(len(before), len(ids)))
        tokens += len(ids) - shared
        pairs += math.comb(len(ids) + 1, 2) - math.comb(shared + 1, 2)
        rows += len(ids) - max(shared, num_prefix - 1)
    body = 2 * tokens * sum(layer.weight.numel() for layer in linear)
    attention = 4 * pairs * config.num_hidden_layers * config.num_attention_heads * head_dim
    return float(body + attention + 2 * rows * head.weight.numel())
