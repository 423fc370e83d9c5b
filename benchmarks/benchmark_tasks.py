"""Measures lm-eval's own benchmarks: `ProbeLM` against stock `hf`, through lm-eval's `evaluate`, in
one process.

BLiMP has pairs of short sentences and no context; `choice` has a real prompt and four responses to
choose from. Run: python benchmarks/benchmark_tasks.py
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
from common import DATA, hflm, load_docs, median_time, parser, probe_lm, table
from lm_eval.evaluator import evaluate

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer


def write_blimp(folder: Path, data: Path) -> list[str]:
    """lm-eval's own definition of each phenomenon, its data replaced by local files."""
    stock = Path(lm_eval.tasks.__file__).parent / "blimp/_template_yaml"
    paths = []
    for file in sorted(data.resolve().glob("*.jsonl")):
        paths.append(str(folder / f"blimp_{file.stem}.yaml"))
        Path(paths[-1]).write_text(
            f"include: {stock}\ntask: blimp_{file.stem}\ndataset_path: json\ndataset_kwargs:\n"
            f"  cache_dir: {folder}/cache\n  data_files:\n    train: {file}\n",
            "utf-8",
        )
    return paths


def write_choice(folder: Path, docs: list[Any]) -> list[str]:
    """Multiple choice with a long context that the choices share."""
    rows = [
        {"prompt": item.prompt.text, "choices": list(item.doc.responses.values())} for item in docs
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs:\n  cache_dir: {folder}/cache\n"
        f"  data_files: {folder}/choice.jsonl\ntest_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: prompt\n"
        "doc_to_choice: choices\ndoc_to_target: 0\nmetric_list:\n  - metric: acc\n  - metric: "
        "acc_norm\n",
        "utf-8",
    )
    return [str(folder / "choice.yaml")]


def evaluation(lm: Any, paths: list[str], limit: int) -> Callable[[], Any]:
    """One call of lm-eval on all docs; a `ProbeLM` forgets token ids first."""
    tasks = lm_eval.tasks.TaskManager(include_defaults=False).load(paths)

    def call() -> Any:
        vars(lm).get("_ids", {}).clear()
        return evaluate(lm, tasks, limit=limit, bootstrap_iters=0, verbosity="ERROR")

    return call


def compare(
    name: str, lms: dict[str, Any], paths: list[str], limit: int, repeats: int
) -> list[dict[str, Any]]:
    """Table rows of one benchmark."""
    sides = {side: evaluation(lm, paths, limit) for side, lm in lms.items()}
    median_time(sides, 1)  # warm
    seconds, results = median_time(sides, repeats)
    accuracies = {side: accuracy(result) for side, result in results.items()}
    best = min((side for side in seconds if side != "sft_probe"), key=lambda side: seconds[side])
    return [
        {
            "benchmark": name,
            "side": side,
            f"median of {repeats}, s": spent,
            "best hf / this": seconds[best] / spent,
            "accuracy": sum(accuracies[side]) / len(accuracies[side]),
            "docs": len(accuracies[side]),
            "right on the same docs": "yes" if accuracies[side] == accuracies[best] else "no",
        }
        for side, spent in seconds.items()
    ]


def accuracy(result: Any) -> list[float]:
    """Of each doc, over all tasks."""
    return [
        float(sample["acc"])
        for task in sorted(result["samples"])
        for sample in result["samples"][task]
    ]


def main() -> None:
    """One table of both benchmarks."""
    flags = parser(__doc__, num_docs=30, repeats=3)
    flags.add_argument(
        "--blimp",
        type=Path,
        default=DATA / "blimp",
        help="folder of JSONL files, one per phenomenon",
    )
    flags.add_argument(
        "--limit",
        type=int,
        default=500,
        help="docs of BLiMP, over all phenomena; --num_docs of choice",
    )
    flags.add_argument("--dtype", default="float32")
    args = flags.parse_args()
    keep_freed_memory()
    model, tokenizer = load_model(EMBEDDED_MODEL, args.dtype), load_tokenizer(EMBEDDED_MODEL)
    lms = {"sft_probe": probe_lm(model, tokenizer), "hf, batch 8": hflm(model, tokenizer, 8)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        choice = write_choice(folder, load_docs(args.data, args.num_docs, 4, tokenizer))
        blimp = write_blimp(folder, args.blimp)
        more = lms | {"hf, batch 32": hflm(model, tokenizer, 32)}
        rows = compare("BLiMP", more, blimp, max(1, args.limit // len(blimp)), args.repeats)
        rows += compare("choice", lms, choice, args.num_docs, args.repeats)
    table(rows)
    print(
        f"{args.dtype}, CPU. All sides with keep_freed_memory(), on one model, and run once before."
    )


if __name__ == "__main__":
    main()
