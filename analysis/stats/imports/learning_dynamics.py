"""What the code of "Learning Dynamics of LLM Finetuning" writes: means of every evaluation, and
log-probs of docs beside them.

Its `prob_train_metrics.json` holds a line for each evaluation. Its `logp_npy_all_*.npy` holds
`[evaluations, rows, docs]`, the rows being the keys of the first line in order. Sums have the
terminator in, prompt and response were cut at 512 tokens (Ren & Sutherland, arXiv 2407.10490).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.imports.imported import (
    EVALUATION,
    Imported,
    Texts,
    benchmark_table,
    is_finite,
    named,
)
from sft_probe.analysis.stats.intervals import Floats, estimate
from sft_probe.errors import UserError
from sft_probe.files import find, read_jsonl
from sft_probe.scores import SCHEMA

_LOGPROB = re.compile(r"logps_eval_prob_(train|test)/(.+)")
_SPLITS = {"train": "train", "test": "heldout"}
_OTHERS = re.compile(r"(argmax_prob_logits|p_e|energy|A_o)|(.+)_A_o")
_REPEAT_TOLERANCE = 1e-3
_SETTINGS = {"max_length": 512}
_WRONG_ENERGY = 0.9
_BEFORE_FIX = (
    "argmax_prob_logits, p_e, energy and A_o look like those of this code before its fix of May "
    "2025, which are wrong (a start of -113.54 for the argmax was -61.56 after it, same weights "
    "and docs): do not read them"
)


def is_metrics(lines: Sequence[dict[str, Any]]) -> bool:
    """Return whether lines of a JSON file look like evaluations of that code."""
    return any(_LOGPROB.fullmatch(key) for line in lines for key in line)


def read_metrics(path: Path) -> Imported:
    """Return the means of a metrics file; steps count its evaluations, since it tells no more.

    `prob_train` are prompts trained on, `prob_test` held-out ones. Published files hold re-runs
    that were appended or interleaved, so a line is dropped where all its finite values lie within
    1e-3 of those of an earlier one that was kept. The notes count these lines, and name the keys
    that are left out.

    Raises:
        UserError: a line is no JSON object, no key `logps_eval_prob_train/CATEGORY` is finite in
            all lines, or there is one evaluation only.
    """
    kept, notes = _evaluations(path)
    keys = list(dict.fromkeys(key for line in kept for key in line))
    finite = [key for key in keys if all(is_finite(line.get(key)) for line in kept)]
    rows = [
        {
            "split": _SPLITS[match[1]],
            "category": match[2],
            "step": step,
            "value": float(line[key]),
        }
        for key in finite
        if (match := _LOGPROB.fullmatch(key))
        for step, line in enumerate(kept)
    ]
    if not rows:
        raise UserError(
            f"{path}: no key logps_eval_prob_train/CATEGORY holds a finite number in every line."
        )
    name = _name_of(path)
    others = {key: found for key in finite if (found := _measure_of(key))}
    cells = [
        (step, *place, "none", float(line[key]), float("nan"), float("nan"))
        for key, place in others.items()
        for step, line in enumerate(kept)
    ]
    return Imported(
        name=name,
        form="means over docs, by the code of Learning Dynamics of LLM Finetuning",
        step_unit=EVALUATION,
        taken=_taken(finite),
        notes=(*notes, *_left_out(keys, finite), *_faults(kept)),
        settings=_SETTINGS,
        means=pd.DataFrame(rows),
        benchmarks=benchmark_table(name, cells),
    )


def read_docs(array_path: Path, metrics_path: Path, texts_path: Path | None) -> Imported:
    """Return the log-probs of docs in an array, named by the metrics file beside it.

    Doc n is line n of the file of texts, a JSON object with a `prompt` and a text for each
    category. Docs with the same text of a category are one cluster of that category.

    Raises:
        UserError: the array is no `[evaluations, rows, docs]`, or its means are not those of the
            metrics file, or the texts are not of as many docs; names the key and the evaluation.
    """
    means = read_metrics(metrics_path)
    kept, _ = _evaluations(metrics_path)
    values = _read_array(array_path)
    keys = list(kept[0])[: values.shape[1]]
    if values.shape[:2] != (len(kept), len(keys)):
        raise UserError(
            f"{array_path} holds {values.shape[0]} evaluations of {values.shape[1]} rows, but "
            f"{metrics_path} has {len(kept)} evaluations of {len(kept[0])} keys."
        )
    finite = [key for number, key in enumerate(keys) if np.isfinite(values[:, number]).all()]
    values = values[:, [keys.index(key) for key in finite]]
    _check_means(array_path, metrics_path, values, kept, finite)
    texts, prompts = _read_texts(texts_path, values.shape[2]) if texts_path else ({}, {})
    rows = _score_rows(means.name, values, finite, texts)
    if not rows.num_rows:
        raise UserError(f"{array_path}: no row is a log-prob of a category, finite in every doc.")
    notes = [note for note in means.notes if not note.startswith("keys left out")]
    missing = [key for key in kept[0] if key not in keys and _LOGPROB.fullmatch(key)]
    if missing:
        notes.append(f"only means are known of {named(missing)}: import the metrics file for them")
    if not texts:
        notes.append("no texts were given (--texts): docs with one text are not one cluster")
    return replace(
        means,
        form="log-probs of docs, by the code of Learning Dynamics of LLM Finetuning",
        taken=(f"{values.shape[2]} docs at {len(kept)} evaluations", *_taken(finite)),
        notes=(*notes, *_left_out(keys, finite)),
        means=None,
        rows=rows,
        benchmarks=_other_measures(means.name, values, finite, texts),
        texts=texts,
        prompts=prompts,
    )


def array_beside(path: Path) -> Path | None:
    """Return the array of docs in the folder of a metrics file. Raises `UserError` for several."""
    arrays = find(path.parent, "logp*.npy")
    if len(arrays) > 1:
        raise UserError(f"{path.parent} holds several arrays: {named(a.name for a in arrays)}.")
    return arrays[0] if arrays else None


def _name_of(path: Path) -> str:
    """Return the name of a run: that of its folder where the file is called as all are."""
    return path.resolve().parent.name if path.stem.endswith("prob_train_metrics") else path.stem


def _evaluations(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines without repeats, and how many were dropped."""
    lines = read_jsonl(path)
    kept = _without_repeats(lines)
    notes = []
    if repeats := len(lines) - len(kept):
        notes.append(
            f"{repeats} of {len(lines)} lines repeat an earlier evaluation and were dropped"
        )
    if len(kept) == 1:
        raise UserError(
            f"{path} holds one evaluation only, so nothing can have changed. {' '.join(notes)}"
        )
    return kept, notes


def _without_repeats(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines whose finite values are not all within 1e-3 of those of an earlier line that
    is returned."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    values = np.array(
        [
            [float(line[key]) if is_finite(line.get(key)) else np.nan for key in keys]
            for line in lines
        ]
    )
    kept: list[int] = []
    for number, own in enumerate(values):
        finite = np.isfinite(own)
        near = np.abs(values[kept][:, finite] - own[finite]) <= _REPEAT_TOLERANCE  # NaN never is
        if not (finite.any() and near.all(axis=1).any()):
            kept.append(number)
    return [lines[number] for number in kept]


def _measure_of(key: str) -> tuple[str, str] | None:
    """Return the category and the measure of a key that is no log-prob of a response."""
    match = _OTHERS.fullmatch(key)
    if match is None:
        return None
    return ("chosen", match[1]) if match[1] else (match[2], "A_o")


def _taken(keys: Sequence[str]) -> tuple[str, ...]:
    """Return what finite keys were taken for."""
    found = []
    for split in ("train", "test"):
        names = [m[2] for key in keys if (m := _LOGPROB.fullmatch(key)) and m[1] == split]
        if names:
            where = "prompts trained on" if split == "train" else "held-out prompts"
            found.append(f"log-prob with the terminator, {where}: {named(names)}")
    others = [" ".join(place) for key in keys if (place := _measure_of(key))]
    return (*found, *([f"other measures: {named(others)}"] if others else []))


def _left_out(keys: Sequence[str], finite: Sequence[str]) -> list[str]:
    unused = [
        key
        for key in keys
        if key not in finite or not (_LOGPROB.fullmatch(key) or _measure_of(key))
    ]
    if not unused:
        return []
    return [f"keys left out (not known, or not finite in every line): {named(unused)}"]


def _faults(kept: Sequence[dict[str, Any]]) -> list[str]:
    """Return that measures beside the log-prob are from before a fix, where they look so."""
    first = kept[0]
    chosen = [first[key] for key in first if key.endswith("/chosen") and is_finite(first[key])]
    argmax, energy = first.get("argmax_prob_logits"), first.get("energy")
    impossible = bool(chosen) and is_finite(argmax) and argmax < chosen[0]
    if impossible or "A_o" in first or (is_finite(energy) and energy > _WRONG_ENERGY):
        return [_BEFORE_FIX]
    return []


def _read_array(path: Path) -> Floats:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # a false size costs no memory
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an array of numbers ({error}).") from error
    if not isinstance(values, np.ndarray) or values.ndim != 3 or values.dtype.kind != "f":
        shape = getattr(values, "shape", "no array")
        raise UserError(f"{path} holds {shape}, not [evaluations, rows, docs] of numbers.")
    return values.astype(np.float64)


def _check_means(
    array_path: Path,
    metrics_path: Path,
    values: Floats,
    kept: Sequence[dict[str, Any]],
    keys: Sequence[str],
) -> None:
    """Raise `UserError` where a mean over docs is not that of the metrics file."""
    means = values.mean(axis=2)
    for number, key in enumerate(keys):
        for step, line in enumerate(kept):
            told = line.get(key)
            if not is_finite(told) or abs(means[step, number] - told) > _REPEAT_TOLERANCE:
                raise UserError(
                    f"{array_path}: row {number} at evaluation {step} has the mean "
                    f"{means[step, number]:.4f}, but {key} of {metrics_path} is {told}. The files "
                    "are not of one run."
                )


def _read_texts(path: Path, num_docs: int) -> tuple[Texts, dict[str, str]]:
    lines = read_jsonl(path)
    if len(lines) != num_docs:
        raise UserError(f"{path} has {len(lines)} lines, but there are {num_docs} docs.")
    texts, prompts = {}, {}
    for number, line in enumerate(lines, start=1):
        own = {name: text for name, text in line.items() if isinstance(text, str)}
        if "prompt" not in own:
            raise UserError(f"{path}, line {number}: no text 'prompt'.")
        prompts[_doc_id(number - 1)] = own.pop("prompt")
        texts[_doc_id(number - 1)] = own
    return texts, prompts


def _doc_id(number: int) -> str:
    return f"line_{number + 1:05d}"


def _score_rows(name: str, values: Floats, keys: Sequence[str], texts: Texts) -> pa.Table:
    """Return a score row for each evaluation, category and doc."""
    rows = []
    for number, key in enumerate(keys):
        if not (match := _LOGPROB.fullmatch(key)):
            continue
        for step, doc in np.ndindex(values.shape[0], values.shape[2]):
            text = texts.get(_doc_id(doc), {}).get(match[2])
            rows.append(
                {
                    "run": name,
                    "step": step,
                    "category": match[2],
                    "split": _SPLITS[match[1]],
                    "doc_id": _doc_id(doc),
                    "num_bytes": None if text is None else len(text.strip().encode()),
                    "logprob_with_eos": values[step, number, doc],
                    "source": "imported",
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _other_measures(
    name: str, values: Floats, keys: Sequence[str], texts: Texts
) -> pd.DataFrame | None:
    """Return means and clustered standard errors of what is no log-prob of a response."""
    cells = []
    for number, key in enumerate(keys):
        if place := _measure_of(key):
            found = estimate(values[:, number].T, _clusters(texts, place[0], values.shape[2]))
            for step, (mean, error) in enumerate(zip(found.mean, found.stderr, strict=True)):
                cells.append(
                    (step, *place, "none", float(mean), float(error), float(values.shape[2]))
                )
    return benchmark_table(name, cells)


def _clusters(texts: Texts, category: str, num_docs: int) -> Ints:
    """Return [docs], one cluster for docs with the same text of a category."""
    return cluster_ids([texts.get(_doc_id(doc), {}).get(category) for doc in range(num_docs)])
