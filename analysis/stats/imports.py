"""Score rows from sweeps done elsewhere: lm-eval's own files, and tables of published means."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.steps import STEP, find_step
from sft_probe.errors import UserError
from sft_probe.files import find, jsonl_lines, read_object
from sft_probe.scores import SCHEMA

_STEP_COLUMNS = {
    "step": "optimizer step",
    "train_examples": "training examples",
    "examples_seen": "training examples",
}
_VALUE_COLUMNS = ("mean_sum_logprob", "mean_logprob", "logprob")
_SAMPLES_FILE = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl")
_METRIC = re.compile(r"logps_eval_prob_(train|test)/(.+)")
_METRIC_SPLITS = {"train": "train", "test": "heldout"}
_REPEAT_TOLERANCE = 1e-3
_PREFIX = "sft_probe_"


def read_means(path: Path) -> tuple[pd.DataFrame, str, tuple[str, ...]]:
    """Return a CSV of means over docs as `split category step value`, the unit of its steps, and no
    notes.

    It has `category`, one of `step`, `train_examples`, `examples_seen`, and one of
    `mean_sum_logprob`, `mean_logprob`, `logprob` (nats); `split` is optional. Several rows of one
    category and step, as of docs, are averaged.

    Raises:
        UserError: a column is missing, or a value is no number; names it.
    """
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error
    step = next((name for name in _STEP_COLUMNS if name in table), None)
    value = next((name for name in _VALUE_COLUMNS if name in table), None)
    if "category" not in table or step is None or value is None:
        raise UserError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; it needs category, one "
            f"of {', '.join(_STEP_COLUMNS)}, and one of {', '.join(_VALUE_COLUMNS)}."
        )
    for name in (step, value):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.isna().any():
            line = int(numbers.isna().to_numpy().argmax()) + 2
            raise UserError(
                f"{path}, line {line}: {name} is {table[name].iloc[line - 2]!r}, which is no "
                "number."
            )
    if "source" in table and table["source"].nunique() > 1:
        raise UserError(
            f"{path} holds scores of the live probe and of the sweep; give the directory of the "
            "run."
        )
    if "split" not in table:
        table["split"] = "heldout"
    if unknown := set(table["split"]) - {"heldout", "train"}:
        raise UserError(
            f"{path}: the split {sorted(map(str, unknown))[0]!r} is neither heldout nor train."
        )
    table = table.assign(category=table["category"].astype(str), step=table[step].astype("int64"))
    means = table.groupby(["split", "category", "step"], sort=False)[value].mean().rename("value")
    return means.reset_index(), _STEP_COLUMNS[step], ()


def read_metrics(path: Path) -> tuple[pd.DataFrame, str, tuple[str, ...]]:
    """Return the table of `read_means`, the unit of its steps and notes, from Ren & Sutherland's
    metrics file.

    Each line of a `prob_train_metrics.json` (arXiv 2407.10490) is an evaluation; steps count them,
    since the file tells no more. `prob_train` are prompts trained on, `prob_test` held-out ones.
    Published files hold re-runs that were appended or interleaved, so a line is dropped where all
    its finite values lie within 1e-3 of those of an earlier one that was kept. The notes count
    these lines, and name the keys that are no log-prob of a category or not finite.

    Raises:
        UserError: a line is no JSON object, no key `logps_eval_prob_train/CATEGORY` is finite in
            all lines, or there is one evaluation only.
    """
    lines = list(_read_samples(path))
    if not lines:
        raise UserError(f"{path} is empty.")
    kept = _without_repeats(lines)
    keys = list(dict.fromkeys(key for line in kept for key in line))
    used = [
        key
        for key in keys
        if _METRIC.fullmatch(key) and all(_is_finite(line.get(key)) for line in kept)
    ]
    if not used:
        raise UserError(
            f"{path}: no key logps_eval_prob_train/CATEGORY holds a finite number in every line."
        )
    rows = [
        {
            "split": _METRIC_SPLITS[match[1]],
            "category": match[2],
            "step": step,
            "value": float(line[key]),
        }
        for key in used
        if (match := _METRIC.fullmatch(key))
        for step, line in enumerate(kept)
    ]
    notes = []
    if repeats := len(lines) - len(kept):
        notes.append(
            f"{repeats} of {len(lines)} lines repeat an earlier evaluation and were dropped"
        )
    if len(kept) == 1:
        raise UserError(
            f"{path} holds one evaluation only, so nothing can have changed. {' '.join(notes)}"
        )
    if left_out := [key for key in keys if key not in used]:
        notes.append(
            "keys left out (no log-prob of a category, or not finite in every line): "
            f"{', '.join(left_out)}"
        )
    return pd.DataFrame(rows), "evaluation", tuple(notes)


def _without_repeats(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines whose finite values are not all within 1e-3 of those of an earlier line that
    is returned."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    values = np.array(
        [
            [float(line[key]) if _is_finite(line.get(key)) else np.nan for key in keys]
            for line in lines
        ]
    )
    kept: list[int] = []
    for number, own in enumerate(values):
        finite = np.isfinite(own)
        near = (
            np.abs(values[kept][:, finite] - own[finite]) <= _REPEAT_TOLERANCE
        )  # never of what is not finite
        if not (finite.any() and near.all(axis=1).any()):
            kept.append(number)
    return [lines[number] for number in kept]


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


Texts = dict[str, dict[str, str]]


def read_lm_eval(directory: Path) -> tuple[pa.Table, Texts, dict[str, str], tuple[str, ...]]:
    """Score rows, responses, prompts and notes from `results_*.json` and `samples_*.jsonl` below a
    directory.

    The step of a results file is in its model's revision or path, else in the names of its
    directories, as in `step1000` or `checkpoint-500`. Of several results of one step and task the
    last one counts. Tasks whose samples hold no log-prob of one continuation are named and left
    out. A plain `hf` model knows neither tokens nor the terminator, so that columns of these are
    null.

    Raises:
        UserError: a results file tells no step, or no sample is a log-prob.
    """
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    skipped: set[str] = set()
    texts: Texts = {}
    prompts: dict[str, str] = {}
    for results_path in find(directory, "**/results_*.json"):
        results = read_object(results_path, optional={"config": dict, "model_name": str | None})
        step = _step_of(results, results_path, directory)
        for task, path in _samples_of(results_path):
            samples = [sample for sample in _read_samples(path) if _logprob(sample) is not None]
            if not samples:
                skipped.add(task)
                continue
            rows[step, task] = [_row(sample, task, step, directory, results) for sample in samples]
            for row, sample in zip(rows[step, task], samples, strict=True):
                prompt, response = _texts_of(sample)
                texts.setdefault(row["doc_id"], {})[row["category"]] = response
                prompts.setdefault(row["doc_id"], prompt)
    if not rows:
        raise UserError(
            f"{directory}: no samples_*.jsonl holds log-probs; run lm_eval with --log_samples."
        )
    notes = ["scored elsewhere, by lm-eval: dtype and joins of the tokens are not checked"]
    if skipped:
        notes.append(f"not log-probs of one continuation, left out: {', '.join(sorted(skipped))}")
    all_rows = [row for part in rows.values() for row in part]
    return pa.Table.from_pylist(all_rows, schema=SCHEMA), texts, prompts, tuple(notes)


def _step_of(results: dict[str, Any], path: Path, root: Path) -> int:
    arguments = results.get("config", {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    folders = "/".join(path.relative_to(root).parts[:-1]).replace(
        "__", "/"
    )  # as lm-eval writes the / of a model
    names = [
        str(arguments.get("revision")),
        *f"{folders}/{arguments.get('pretrained')}".split("/")[::-1],
    ]
    try:
        steps = (find_step(name) for name in names)
        return next(found.step for found in steps if found and found.unit == STEP)
    except StopIteration:
        reason = f"{path} tells no step"
    except UserError as error:
        reason = f"{path}: {error}"
    raise UserError(
        f"{reason.rstrip('.')}. Put it in a directory named like step1000 or checkpoint-500."
    )


def _samples_of(results_path: Path) -> Iterator[tuple[str, Path]]:
    date = results_path.stem.removeprefix("results_")
    for path in find(results_path.parent, f"samples_*_{date}.jsonl"):
        if match := _SAMPLES_FILE.fullmatch(path.name):
            yield match[1], path


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(jsonl_lines(path.read_text("utf-8")), start=1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
        if not isinstance(sample, dict):
            raise UserError(f"{path}, line {number}: not a JSON object.")
        yield sample


def _logprob(sample: dict[str, Any]) -> float | None:
    """Return the log-prob of a sample with one loglikelihood request, `[[["-12.3", "False"]]]`;
    else `None`."""
    answers = sample.get("resps")
    try:
        ((answer,),) = answers  # type: ignore[misc]
        if not isinstance(answer, list):  # a generated text
            return None
        logprob, _ = answer
        return float(logprob)
    except (TypeError, ValueError):
        return None


def _row(
    sample: dict[str, Any], task: str, step: int, directory: Path, results: dict[str, Any]
) -> dict[str, Any]:
    doc = sample["doc"] if isinstance(sample.get("doc"), dict) else {}
    name = task.removeprefix(_PREFIX)
    is_train = task.startswith(f"{_PREFIX}train_")
    return dict.fromkeys(SCHEMA.names) | {
        "run": directory.resolve().name,
        "model": results.get("model_name") or directory.resolve().name,
        "step": step,
        "category": str(doc.get("category", name.removeprefix("train_") if is_train else name)),
        "split": "train" if is_train or doc.get("split") == "train" else "heldout",
        "doc_id": str(doc.get("doc_id", sample.get("doc_id"))),
        "conversation_id": str(doc["conversation_id"]) if "conversation_id" in doc else None,
        "prompt_format": doc.get("prompt_format"),
        "num_tokens": doc.get("num_tokens"),
        "num_bytes": len(_texts_of(sample)[1].strip().encode()),
        "logprob": _logprob(sample),
        "source": "lm_eval",
    }


def _texts_of(sample: dict[str, Any]) -> tuple[str, str]:
    arguments = sample.get("arguments")
    first = arguments.get("gen_args_0", {}) if isinstance(arguments, dict) else {}
    return str(first.get("arg_0", "")), str(first.get("arg_1", sample.get("target", "")))
