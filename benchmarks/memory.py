"""Measures peak memory where the head is large: the Qwen2.5 0.5B shape, float32, CPU, V = 151,936,
K = 7.

Each side runs in a process of its own, once, and gets 2 docs; stock lm-eval (`hf`) gets 1 below
batch 8, which is enough to fill a batch. Above weights: peak resident memory while scoring, less
the resident memory of the built model. `ProbeLM` calls keep_freed_memory() and tries its way of
scoring first, and both count; `hf` runs as it comes. Run: python benchmarks/memory.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import hflm, probe_lm, table, timed
from large_vocabulary import NUM_CONTINUATIONS, build_model, build_requests

from sft_probe.models import EMBEDDED_MODEL, load_tokenizer


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(args: Any) -> dict[str, Any]:
    """One side, in this process."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    model = build_model("0.5b", "float32", "cpu")
    num_docs = 2 if args.side == "probe" or args.batch_size > NUM_CONTINUATIONS else 1
    requests = build_requests(num_docs, args.prompt_tokens, args.response_tokens)
    # forget the peak of building, which had a head beside the embeddings (and with it what a parent
    # process reached)
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = resident("VmRSS")
    lm = (
        probe_lm(model, tokenizer)
        if args.side == "probe"
        else hflm(model, tokenizer, args.batch_size)
    )
    seconds, _ = timed(lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True))
    peak = resident("VmHWM")
    name = "sft_probe" if args.side == "probe" else f"hf, batch {args.batch_size}"
    return {
        "side": name,
        "s per doc": seconds / num_docs,
        "above weights": peak - before,
        "total": peak,
    }


def main() -> None:
    """One table, or with `--side` one line of JSON."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--side", choices=("probe", "hf"), help="measure in this process, print JSON"
    )
    flags.add_argument("--batch_size", type=int, default=1, help="of hf, with --side")
    flags.add_argument("--batch_sizes", default="1,4,8", help="of hf")
    flags.add_argument("--prompt_tokens", type=int, default=400)
    flags.add_argument("--response_tokens", type=int, default=100)
    args = flags.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    shape = [
        "--prompt_tokens",
        str(args.prompt_tokens),
        "--response_tokens",
        str(args.response_tokens),
    ]
    rows = []
    for side in (
        ["probe"],
        *(["hf", "--batch_size", size] for size in args.batch_sizes.split(",")),
    ):
        command = [sys.executable, __file__, *shape, "--side", *side]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    fastest = min(rows[1:], key=lambda row: row["s per doc"])
    table(
        [
            {
                "side": row["side"],
                "s per doc": row["s per doc"],
                "above weights, MiB": row["above weights"] / 2**20,
                "total, MiB": row["total"] / 2**20,
                f"{fastest['side']} / this, above weights": fastest["above weights"]
                / row["above weights"],
            }
            for row in rows
        ]
    )
    print(
        f"P = {args.prompt_tokens}, R = {args.response_tokens}, K = {NUM_CONTINUATIONS}; "
        f"{fastest['side']} is hf at "
        "its fastest. One process and one call each: the time of sft_probe holds the trial of its "
        "way of scoring."
    )


if __name__ == "__main__":
    main()
