"""What lm-eval writes: score rows from samples that are log-probs, and benchmarks."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.benchmarks import benchmark_rows
from sft_probe.analysis.stats.imports.imported import Imported, Texts, check_results, named
from sft_probe.analysis.stats.steps import STEP, find_step
from sft_probe.errors import UserError
from sft_probe.files import find, read_jsonl, read_object
from sft_probe.scores import SCHEMA

_SAMPLES_FILE = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl")
_PREFIX = "sft_probe_"
_KINDS = {"results": dict, "config": dict, "n-samples": dict}


def read_lm_eval(directory: Path) -> Imported:
    """Return score rows, texts and benchmarks from `results_*.json` and `samples_*.jsonl` below a
    directory.

    The step of a results file is in its model's revision or path, else in the names of its
    directories, as in `step1000` or `checkpoint-500`. Of several results of one step and task the
    last one counts. Tasks whose samples hold no log-prob of one continuation are benchmarks. A
    plain `hf` model knows neither tokens nor the terminator, so that columns of these are null.

    Raises:
        UserError: a results file tells no step, or there is no result.
    """
    name = directory.resolve().name
    scored: dict[tuple[int, str], list[dict[str, Any]]] = {}
    others: dict[tuple[int, str], list[dict[str, Any]]] = {}
    model = name
    for path in find(directory, "**/results_*.json"):
        results = read_object(path, optional={**_KINDS, "model_name": str | None})
        check_results(path, results)
        step = _step_of(results, path, directory)
        model = results.get("model_name") or model
        every = {task: read_jsonl(samples) for task, samples in _samples_of(path)}
        found = benchmark_rows({"results": {}, **results, "samples": every}, name, step)
        for task in {row["task"] for row in found if not row["task"].startswith(_PREFIX)}:
            others[step, task] = [row for row in found if row["task"] == task]
        for task, items in every.items():
            if samples := [item for item in items if _logprob(item) is not None]:
                scored[step, task] = samples
    benchmarks = [row for place, part in others.items() if place not in scored for row in part]
    if not scored and not benchmarks:
        raise UserError(
            f"{directory}: no results of benchmarks, and no samples_*.jsonl holds log-probs; run "
            "lm_eval with --log_samples."
        )
    texts, prompts = _texts(scored)
    rows = [
        _row(item, task, step) | {"run": name, "model": model}
        for (step, task), samples in scored.items()
        for item in samples
    ]
    return Imported(
        name=name,
        form="results of lm-eval",
        model=model,
        taken=_taken(list(scored), benchmarks),
        notes=("scored elsewhere, by lm-eval: dtype and joins of the tokens are not checked",),
        rows=pa.Table.from_pylist(rows, schema=SCHEMA) if rows else None,
        benchmarks=pd.DataFrame(benchmarks) if benchmarks else None,
        texts=texts,
        prompts=prompts,
    )


def _texts(
    scored: dict[tuple[int, str], list[dict[str, Any]]],
) -> tuple[Texts, dict[str, str]]:
    """Return responses and prompts by doc id."""
    texts: Texts = {}
    prompts: dict[str, str] = {}
    for (step, task), samples in scored.items():
        for sample in samples:
            row, (prompt, response) = _row(sample, task, step), _texts_of(sample)
            texts.setdefault(row["doc_id"], {})[row["category"]] = response
            prompts.setdefault(row["doc_id"], prompt)
    return texts, prompts


def _taken(places: Sequence[tuple[int, str]], others: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    taken = []
    if places:
        steps = named(str(step) for step in sorted({step for step, _ in places}))
        tasks = named(sorted({task for _, task in places}))
        taken.append(f"log-probs of docs at the steps {steps}: {tasks}")
    if others:
        taken.append(f"benchmarks: {named(sorted({row['task'] for row in others}))}")
    return tuple(taken)


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


def _row(sample: dict[str, Any], task: str, step: int) -> dict[str, Any]:
    doc = sample["doc"] if isinstance(sample.get("doc"), dict) else {}
    name = task.removeprefix(_PREFIX)
    is_train = task.startswith(f"{_PREFIX}train_")
    return dict.fromkeys(SCHEMA.names) | {
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
