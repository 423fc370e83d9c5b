"""Measures what the token columns cost: scoring with and without them, on one model object.

The columns are argmax log-prob, entropy, rank and norm at each token. Times are medians of calls
that take turns (A B A B ...). Peak memory is that of a process of its own for each side, while
scoring, less the resident memory of the built model (CPU); on a GPU it is torch's own peak. The
trial that chooses how to score counts in both.
Run: python benchmarks/token_columns.py
Run: python benchmarks/token_columns.py --shape 7b --dtype bfloat16 --device cuda --num_docs 64
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import median_time, table, timed
from large_vocabulary import NUM_CONTINUATIONS, SHAPES, build_model, build_requests
from memory import resident

from sft_probe.malloc import keep_freed_memory
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import Score, choose_mode, default_max_tokens, score

SIDES = {"log-probs alone": False, "with token columns": True}


def calls_of(model: Any, args: Any) -> dict[str, Any]:
    """Return one call for each side, which scores all requests on this model."""
    if args.device == "cpu":
        keep_freed_memory()
    requests = build_requests(args.num_docs, args.prompt_tokens, args.response_tokens)
    items = [Continuation(prompt, ids, 0) for _, prompt, ids in requests]
    mode = choose_mode(model, args.prompt_tokens + args.response_tokens)
    tokens = default_max_tokens(args.device)

    def call(with_columns: bool) -> dict[int, Score]:
        return dict(score(model, items, max_tokens=tokens, mode=mode, with_columns=with_columns))

    return {name: partial(call, wanted) for name, wanted in SIDES.items()}


def peak_above_weights(args: Any) -> int:
    """Return the bytes that one side needs above the model, in this process."""
    model = build_model(args.shape, args.dtype, args.device)
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(calls_of(model, args)[args.side])
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # forget the peak of building
    before = resident("VmRSS")
    timed(calls_of(model, args)[args.side])
    return resident("VmHWM") - before


def main() -> None:
    """Print one table, or with `--side` one line of JSON."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--side", choices=SIDES, help="measure memory in this process, print JSON")
    flags.add_argument("--shape", choices=SHAPES, default="0.5b")
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--num_docs", type=int, default=2)
    flags.add_argument("--prompt_tokens", type=int, default=400)
    flags.add_argument("--response_tokens", type=int, default=60)
    flags.add_argument("--repeats", type=int, default=5)
    args = flags.parse_args()
    if args.side:
        print(json.dumps(peak_above_weights(args)))
        return
    peaks = {}
    for name in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[name] = int(output.splitlines()[-1])
    calls = calls_of(build_model(args.shape, args.dtype, args.device), args)
    median_time(calls, 1)  # warm
    seconds, results = median_time(calls, args.repeats)
    first, second = SIDES
    for index, found in results[first].items():
        np.testing.assert_array_equal(
            found.token_logprobs, results[second][index].token_logprobs, "log-probs moved"
        )
    table(
        [
            {
                "side": name,
                f"median of {args.repeats}, s": seconds[name],
                "time / without": seconds[name] / seconds[first],
                "peak above weights, MiB": peaks[name] / 2**20,
                "peak / without": peaks[name] / peaks[first],
            }
            for name in SIDES
        ]
    )
    print(
        f"Qwen2.5 {args.shape} shape, {args.dtype}, {args.device}; {args.num_docs} docs x "
        f"{NUM_CONTINUATIONS}, P = {args.prompt_tokens}, R = {args.response_tokens}."
    )


if __name__ == "__main__":
    main()
