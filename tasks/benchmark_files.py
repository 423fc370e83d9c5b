"""Benchmarks from plain JSONL files: lm-eval tasks that need no hub.

Each file becomes a YAML task with a copy of its rows beside it, which plain `lm_eval
--include_path` reads too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask

from sft_probe.errors import UserError
from sft_probe.files import make_dir, read_jsonl, write_jsonl, write_text
from sft_probe.models import cache_dir

_SHARED = {
    "class": "!function sft_probe.tasks.benchmark_files.BenchmarkTask",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "test",
    "target_delimiter": " ",
    "dataset_path": "json",
}


@dataclass(frozen=True)
class Layout:
    """A common layout of benchmark rows: the type of each column, and the task made of it.

    A single answer is a choice of one: lm-eval puts the delimiter before choices alone.
    """

    name: str
    columns: dict[str, type]
    task: dict[str, Any]
    metrics: tuple[str, ...]


LAYOUTS = (
    Layout(
        "a question with choices",
        {"query": str, "choices": list, "gold": int},
        {
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
        ("acc", "acc_norm"),
    ),
    Layout(
        "contexts for one continuation",
        {"context_options": list, "continuation": str, "gold": int},
        {
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
        ("acc",),
    ),
    Layout(
        "a context with its continuation",
        {"context": str, "continuation": str},
        {"doc_to_text": "{{context}}", "doc_to_choice": "{{[continuation]}}", "doc_to_target": 0},
        ("exact_match",),
    ),
    Layout(
        "a question with its answer",
        {"context": str, "answer": str},
        {"doc_to_text": "{{context}}", "doc_to_choice": "{{[answer]}}", "doc_to_target": 0},
        ("exact_match",),
    ),
)


class BenchmarkTask(ConfigurableTask):
    """A task that adds the bits per byte of the right answer to lm-eval's own metrics.

    Accuracies of small models lie near chance; the probability of the right answer moves long
    before they do.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> Any:
        """Return lm-eval's metrics of one doc, and nats and bytes of its right answer."""
        gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
        logprob, _ = results[gold]
        answer = doc["continuation"] if self.multiple_input else self.doc_to_choice(doc)[gold]
        return {
            **super().process_results(doc, results),
            "bits_per_byte": (logprob, len(answer.encode("utf-8"))),
        }


def benchmarks_dir() -> Path:
    """Return the directory whose tasks `sft-probe sweep --tasks` finds by name."""
    return cache_dir() / "benchmarks"


def add_benchmarks(files: Sequence[Path], out: Path | None = None) -> list[tuple[str, str, int]]:
    """Make an lm-eval task of each file, named like the file.

    Args:
        files: JSONL files, each with one of the layouts in `LAYOUTS`.
        out: where tasks and copies of the rows go; default: `benchmarks_dir()`.

    Returns:
        Of each task its name, what it was taken for, and its number of rows.

    Raises:
        UserError: a file that has none of the layouts, or a row that does not fit, with its line.
    """
    folder = make_dir(out or benchmarks_dir())
    read = [(_task_name(path), *_read(path)) for path in files]
    names = [name for name, _, _ in read]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two files would be named {min(twice)!r}. Rename one of them.")
    for name, layout, rows in read:
        write_jsonl(folder / f"{name}.jsonl", rows)
        write_text(folder / f"{name}.yaml", _yaml(name, layout, folder / f"{name}.jsonl"))
    return [(name, layout.name, len(rows)) for name, layout, rows in read]


def _task_name(path: Path) -> str:
    return re.sub(r"\W+", "_", path.name.partition(".")[0]).strip("_").lower()


def _read(path: Path) -> tuple[Layout, list[dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: name a JSONL file with one item per line.")
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} is empty.")
    layout = next((layout for layout in LAYOUTS if layout.columns.keys() <= rows[0].keys()), None)
    if layout is None:
        known = "; ".join(", ".join(layout.columns) for layout in LAYOUTS)
        raise UserError(
            f"{path}, line 1 has the columns {', '.join(rows[0]) or 'of nothing'}. "
            f"A benchmark has one of these sets of columns: {known}."
        )
    for number, row in enumerate(rows, start=1):
        if fault := _fault(row, layout):
            raise UserError(f"{path}, line {number}: {fault}.")
    return layout, [{column: row[column] for column in layout.columns} for row in rows]


def _fault(row: dict[str, Any], layout: Layout) -> str | None:
    """Return what is wrong with a row, if anything is."""
    for column, kind in layout.columns.items():
        value: Any = row.get(column)
        fits = type(value) is kind
        if not fits:
            return f"{column!r} must be {_kind_name(kind)}, not {json.dumps(value)[:40]}"
        if kind is list and not (len(value) > 1 and all(isinstance(x, str) and x for x in value)):
            return f"{column!r} must hold two texts or more, none of them empty"
        if kind is str and not value.strip() and column != "context":
            return f"{column!r} is empty"
    options = row.get("choices", row.get("context_options", []))
    if "gold" in layout.columns and not 0 <= row["gold"] < len(options):
        return f"'gold' is {row['gold']}, but there are {len(options)} options, counted from 0"
    return None


def _kind_name(kind: type) -> str:
    return {str: "a text", list: "a list of texts", int: "a whole number"}[kind]


def _yaml(name: str, layout: Layout, data: Path) -> str:
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in layout.metrics
    ]
    metrics.append(
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    )
    task = {
        "task": name,
        **_SHARED,
        **layout.task,
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    return text.replace(f"'{_SHARED['class']}'", _SHARED["class"])
