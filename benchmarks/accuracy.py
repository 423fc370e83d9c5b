"""Measures the error of summed log-probs of real docs: `ProbeLM` and stock lm-eval (`hf`), float32
and bfloat16.

Truth is a plain forward in float64: of the float32 weights, and of the same weights rounded to
bfloat16, which leaves the error of the arithmetic alone. Stock runs with its default softmax, in
the model's dtype, and with `softmax_dtype=float32`. On a CPU that multiplies no bfloat16 matrices,
each product is computed in float32 and rounded. Run: python benchmarks/accuracy.py
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import hflm, instances, items_of, load_docs, parser, probe_lm, table
from torch.nn import functional

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer
from sft_probe.scoring.packing import Continuation

Sums = npt.NDArray[np.float64]


def truth(model: Any, items: list[Continuation]) -> Sums:
    """Sums by one plain float64 forward per item."""
    model = model.double()
    sums = []
    for item in items:
        ids = torch.tensor([[*item.prefix_ids, *item.continuation_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(item.prefix_ids) - 1 : -1].log_softmax(-1)
        sums.append(float(logprobs.gather(-1, ids[0, len(item.prefix_ids) :, None]).sum()))
    return np.array(sums)


def sums_of(requests: list[Any], model: Any, tokenizer: Any) -> dict[str, Sums]:
    """Each side's sums."""
    stock = {
        "hf": hflm(model, tokenizer, 8, softmax_dtype=None),
        "hf, softmax_dtype=float32": hflm(model, tokenizer, 8),
    }
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        f"{dtype}, {name}": np.array(
            [result[0] for result in lm.loglikelihood(requests, disable_tqdm=True)]
        )
        for name, lm in (stock | {"sft_probe": probe_lm(model, tokenizer)}).items()
    }


def multiply_in_float32() -> None:
    """Products of 16-bit matrices in float32, rounded once: what hardware with such matrices
    computes."""
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def rounded_linear(values: Any, weight: Any, bias: Any = None) -> Any:
        return linear(values.float(), weight.float(), None if bias is None else bias.float()).to(
            values.dtype
        )

    def rounded_attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any
    ) -> Any:
        mask = (
            attn_mask.float()
            if attn_mask is not None and attn_mask.is_floating_point()
            else attn_mask
        )
        return attention(query.float(), key.float(), value.float(), attn_mask=mask, **options).to(
            query.dtype
        )

    functional.linear, functional.scaled_dot_product_attention = rounded_linear, rounded_attention  # type: ignore[assignment]


def row(side: str, found: Sums, stock: Sums, expected: Sums, kind: str) -> dict[str, Any]:
    """Errors of one side, and how often larger stock's are."""
    error, stock_error = np.abs(found - expected), np.abs(stock - expected)
    return {
        "side": side,
        "truth": kind,
        "median error": float(np.median(error)),
        "RMS error": rms(error),
        "largest error": float(error.max()),
        "hf / this, median": float(np.median(stock_error) / np.median(error)),
        "hf / this, RMS": rms(stock_error) / rms(error),
    }


def rms(error: Sums) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(error**2)))


def main() -> None:
    """One table."""
    args = parser(__doc__, num_docs=8).parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    docs = load_docs(args.data, args.num_docs, 6, tokenizer)
    requests, items = instances(docs), items_of(docs, tokenizer)
    exact = sums_of(requests, load_model(EMBEDDED_MODEL, "float32"), tokenizer)
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    truths = {
        "float32 weights": truth(load_model(EMBEDDED_MODEL, "float32"), items),
        "rounded weights": truth(load_model(EMBEDDED_MODEL, "bfloat16"), items),
    }
    if emulated:
        multiply_in_float32()
    coarse = sums_of(requests, load_model(EMBEDDED_MODEL, "bfloat16"), tokenizer)
    rows = []
    for sides, kinds in ((exact, ["float32 weights"]), (coarse, list(truths))):
        stock = next(iter(sides.values()))
        rows += [
            row(side, found, stock, truths[kind], kind)
            for kind in kinds
            for side, found in sides.items()
        ]
    mean = truths["float32 weights"].mean()
    print(
        f"Summed log-probs of {len(docs)} docs x 6 categories, nats; mean {mean:.0f}; hf at batch "
        "8:\n"
    )
    table(rows)
    print(
        "bfloat16 products: "
        + ("in float32, rounded (this CPU has none)." if emulated else "the CPU's own.")
    )


if __name__ == "__main__":
    main()
