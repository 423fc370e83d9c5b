"""Measures a whole sweep, programs started and weights loaded: `sft-probe sweep` once, or stock
`lm_eval run` per step.

The checkpoints are the embedded model with its weights slightly changed. Stock scores the same docs
by the same task files; it does not score terminators. Each side runs once, in processes of its own:
malloc is set in ours alone. Run: python benchmarks/sweep.py
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import load_docs, parser, table, timed

from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer


def write_checkpoints(folder: Path, tokenizer: Any, num_checkpoints: int) -> list[Path]:
    """`checkpoint-1` ...: every weight of the one before times 1 + 0.001 of noise."""
    torch.manual_seed(0)
    model = load_model(EMBEDDED_MODEL, "float32")
    paths = [folder / f"checkpoint-{step}" for step in range(1, num_checkpoints + 1)]
    for path in paths:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 1e-3 * torch.randn_like(weight))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def write_probe_set(path: Path, docs: list[Any]) -> None:
    """A bare JSONL set, all of it held out."""
    rows = [
        {
            "doc_id": item.doc.doc_id,
            "conversation_id": item.doc.conversation_id,
            "split": "heldout",
            "messages": item.doc.messages,
            **item.doc.responses,
        }
        for item in docs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def run(*command: Any) -> str:
    """Standard output of a program that must succeed."""
    return subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def run_stock(checkpoint: Path, tasks: str, args: Any) -> str:
    """Scores one checkpoint as its users do."""
    return run(
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--tasks",
        "sft_probe",
        "--include_path",
        tasks,
        "--device",
        "cpu",
        "--model_args",
        f"pretrained={checkpoint},dtype={args.dtype},softmax_dtype=float32",
        "--batch_size",
        args.batch_size,
        "--log_samples",
        "--output_path",
        checkpoint.parent / "stock" / checkpoint.name,
    )


def largest_difference(ours: Path, stock: Path) -> float:
    """Between the two in the mean log-prob of a category, in nats, over all steps."""
    means = pd.read_parquet(ours / "scores.parquet").groupby(["step", "category"])["logprob"].mean()
    differences = []
    for path in stock.glob("*/**/results_*.json"):
        step = int(path.relative_to(stock).parts[0].removeprefix("checkpoint-"))
        for name, metrics in json.loads(path.read_text("utf-8"))["results"].items():
            if name != "sft_probe":
                differences.append(
                    abs(metrics["logprob,none"] - means[step, name.removeprefix("sft_probe_")])
                )
    assert len(differences) == len(means), (
        f"{len(differences)} results of stock, {len(means)} of ours"
    )
    return float(max(differences))


def main() -> None:
    """One table."""
    flags = parser(__doc__, num_docs=40)
    flags.add_argument("--num_checkpoints", type=int, default=8)
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--batch_size", type=int, default=8, help="of hf")
    args = flags.parse_args()
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs, probe_set = load_docs(args.data, args.num_docs, 6, tokenizer), folder / "docs.jsonl"
        write_probe_set(probe_set, docs)
        checkpoints = write_checkpoints(folder, tokenizer, args.num_checkpoints)
        tasks = run(
            "sft-probe", "tasks-dir", "--probe-set", probe_set, "--out", folder / "tasks"
        ).strip()
        sweep = [
            "sft-probe",
            "sweep",
            folder / "ours",
            "--checkpoints",
            *checkpoints,
            "--probe_set",
            probe_set,
        ]
        ours, _ = timed(lambda: run(*sweep, "--dtype", args.dtype, "--device", "cpu"))
        stock, _ = timed(lambda: [run_stock(checkpoint, tasks, args) for checkpoint in checkpoints])
        difference = largest_difference(folder / "ours", folder / "stock")
    print(
        f"{args.num_checkpoints} checkpoints, {len(docs)} docs x 6 categories, {args.dtype}, CPU, "
        "one run each:\n"
    )
    sides = {"sft-probe sweep": ours, f"lm_eval run per checkpoint, batch {args.batch_size}": stock}
    table(
        [
            {"side": side, "s": seconds, "stock / this": stock / seconds}
            for side, seconds in sides.items()
        ]
    )
    print(f"Largest difference of a category's mean log-prob: {difference:.2g} nats.")


if __name__ == "__main__":
    main()
