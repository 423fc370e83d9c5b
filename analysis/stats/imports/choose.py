"""Which importer reads what, by what the files hold."""

import json
from pathlib import Path
from typing import Any

from sft_probe.analysis.stats.imports.imported import Imported, named, read_csv
from sft_probe.analysis.stats.imports.learning_dynamics import (
    array_beside,
    is_metrics,
    read_docs,
    read_metrics,
)
from sft_probe.analysis.stats.imports.lm_eval import read_lm_eval
from sft_probe.analysis.stats.imports.lm_eval_old import is_old_results, read_old_results
from sft_probe.analysis.stats.imports.means import is_means, read_means
from sft_probe.analysis.stats.imports.trainer_logs import is_trainer_log, read_trainer_log
from sft_probe.analysis.stats.imports.wide import read_wide
from sft_probe.errors import UserError
from sft_probe.files import find, read_jsonl, read_object

FORMS = (
    "a CSV of means or of benchmarks, prob_train_metrics.json with or without its .npy, "
    "results of lm-eval, or a log of preference training"
)


def import_runs(path: Path, texts: Path | None = None) -> list[Imported]:
    """Read a file or a directory of a known form; several runs only from a table of several models.

    Args:
        path: what was downloaded or exported.
        texts: JSONL file of the prompts and responses of docs that a `.npy` gives log-probs of.

    Raises:
        UserError: nothing there has a known form, or it has faults; names file and line or key.
    """
    if path.is_dir():
        found = [_of_directory(path, texts)]
    elif path.suffix == ".npy":
        found = [read_docs(path, _metrics_beside(path), texts)]
    elif path.suffix == ".csv":
        found = _of_csv(path)
    elif path.suffix in (".json", ".jsonl"):
        found = [_of_json(path, texts)]
    else:
        raise UserError(f"{path} is none of: {FORMS}.")
    if texts and not any(run.texts for run in found):
        raise UserError(f"--texts: {path} holds no log-probs of single docs.")
    return found


def _of_directory(path: Path, texts: Path | None) -> Imported:
    if find(path, "**/results_*.json"):
        return read_lm_eval(path)
    metrics = find(path, "*metrics.json")
    if len(metrics) > 1:
        raise UserError(f"{path} holds {named(m.name for m in metrics)}: name one of them.")
    if metrics:
        return _of_json(metrics[0], texts)
    if (path / "trainer_state.json").is_file():
        return _of_json(path / "trainer_state.json", texts)
    if steps := find(path, "*step*.json"):
        return read_old_results(steps, path.resolve().name)
    raise UserError(f"{path} holds none of: {FORMS}.")


def _of_csv(path: Path) -> list[Imported]:
    table = read_csv(path)
    if is_means(table):
        return [read_means(path, table)]
    lines: list[dict[str, Any]] = [
        {str(key): value for key, value in line.items()} for line in table.to_dict("records")
    ]
    if is_trainer_log(lines):
        return [read_trainer_log(path, lines)]
    return read_wide(path, table)


def _of_json(path: Path, texts: Path | None) -> Imported:
    """Read a JSON file of one object, or of one object per line."""
    lines = _objects(path)
    if not lines:
        raise UserError(f"{path} is empty.")
    if "log_history" in lines[0]:
        history = lines[0]["log_history"]
        lines = history if isinstance(history, list) else []
        if bad := [n for n, line in enumerate(lines, start=1) if not isinstance(line, dict)]:
            raise UserError(f"{path}: entry {bad[0]} of 'log_history' is no object.")
        if not is_trainer_log(lines):
            raise UserError(f"{path}: 'log_history' holds no logps/... and no rewards/... .")
    if is_trainer_log(lines):
        return read_trainer_log(path, lines)
    if is_old_results(lines[0]):
        return read_old_results([path], path.stem)
    if not is_metrics(lines):
        raise UserError(f"{path} holds none of: {FORMS}.")
    array = array_beside(path)
    return read_docs(array, path, texts) if array else read_metrics(path)


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON file: one for each line, or one over several lines."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        json.loads(first)
    except ValueError:
        if first.strip() in (b"{", b"["):
            return [read_object(path, optional={"log_history": list})]
    return read_jsonl(path)


def _metrics_beside(path: Path) -> Path:
    metrics = find(path.parent, "*metrics.json")
    if len(metrics) != 1:
        raise UserError(
            f"{path}: beside it must lie its prob_train_metrics.json, which names its rows (found: "
            f"{named(m.name for m in metrics) or 'none'})."
        )
    return metrics[0]
