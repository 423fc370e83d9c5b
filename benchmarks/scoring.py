"""Measures how fast real docs are scored: `ProbeLM` against stock lm-eval (`hf`), in one process,
on one model object.

Both get the same requests as text and tokenise them. `ProbeLM` scores the terminator of each
response too. Run: python benchmarks/scoring.py
"""

from typing import Any

import torch
from common import (
    hflm,
    instances,
    items_of,
    load_docs,
    median_time,
    parser,
    probe_lm,
    scorer,
    table,
    timed,
)
from flops import floor_flops, matmul_rate, own_shape_rate

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer


def measure(model: Any, tokenizer: Any, args: Any, num_categories: int) -> None:
    """Prints the table of one dtype and number of categories."""
    docs = load_docs(args.data, args.num_docs, num_categories, tokenizer)
    requests = instances(docs)
    sides = {
        "sft_probe": scorer(probe_lm(model, tokenizer), requests),
        "hf": scorer(hflm(model, tokenizer, args.batch_size), requests),
    }
    cold = {name: timed(call)[0] for name, call in sides.items()}
    seconds, results = median_time(sides, args.repeats)
    square, own = matmul_rate(model.dtype), own_shape_rate(model)
    floor = floor_flops(model, items_of(docs, tokenizer))
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{dtype}, {len(docs)} docs x {num_categories} categories, hf at batch {args.batch_size}:\n"
    )
    table(
        [
            {
                "side": name,
                "first call, s": cold[name],
                f"median of {args.repeats}, s": seconds[name],
                "hf / this": seconds["hf"] / seconds[name],
                "floor / this at the matmul rate": floor / square / seconds[name],
                "floor / this at the own-shape rate": floor / own / seconds[name],
            }
            for name in sides
        ]
    )
    print(
        f"Floor, with the terminators: {floor / 1e12:.3g} TFLOP. Matmul rate: {square / 1e9:.0f} "
        "GFLOP/s; own-shape "
        f"rate: {own / 1e9:.0f} GFLOP/s.\n{torch.get_num_threads()} threads; both sides with "
        "keep_freed_memory()."
    )
    differences = [
        abs(ours[0] - stock[0])
        for ours, stock in zip(results["sft_probe"], results["hf"], strict=True)
    ]
    print(f"Largest difference of a summed log-prob: {max(differences):.2g} nats.\n", flush=True)


def main() -> None:
    """A table for each dtype and number of categories."""
    flags = parser(__doc__, num_docs=40, repeats=3)
    flags.add_argument("--dtypes", default="float32,bfloat16")
    flags.add_argument("--categories", default="6,12", help="how many of each doc")
    flags.add_argument("--batch_size", type=int, default=8, help="of hf")
    args = flags.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    for dtype in args.dtypes.split(","):
        model = load_model(EMBEDDED_MODEL, dtype)
        for num_categories in args.categories.split(","):
            measure(model, tokenizer, args, int(num_categories))


if __name__ == "__main__":
    main()
