"""What lm-eval wrote before 0.4, as Pythia's published `*_stepN.json`: accuracies with standard
errors, a file for each checkpoint."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sft_probe.analysis.stats.benchmarks import benchmark_rows
from sft_probe.analysis.stats.imports.imported import Imported, check_results, named
from sft_probe.analysis.stats.steps import STEP, NamedStep, common_unit, find_step
from sft_probe.errors import UserError
from sft_probe.files import read_object

_PRETRAINED = re.compile(r"(?:^|,)pretrained=([^,]+)")


def is_old_results(value: dict[str, Any]) -> bool:
    """Return whether a JSON object looks like results of an lm-eval before 0.4."""
    return {"results", "versions"} <= value.keys()


def read_old_results(paths: Sequence[Path], name: str) -> Imported:
    """Return the benchmarks of one model at the steps that the names of its files tell.

    Raises:
        UserError: a name tells no step, two files tell the same one, or the files are of several
            models or numbers of examples shown; names the file.
    """
    rows: list[dict[str, Any]] = []
    steps: dict[int, Path] = {}
    units: list[tuple[str, NamedStep]] = []
    settings: dict[tuple[str, str], Path] = {}
    for path in paths:
        results = read_object(path, required={"results": dict}, optional={"config": dict})
        found = find_step(path.stem)
        if found is None:
            raise UserError(f"{path}: its name tells no step, as in step1000.json.")
        if found.step in steps:
            raise UserError(
                f"{path} and {steps[found.step]} are of one step. Import one of their folders."
            )
        steps[found.step] = path
        units.append((path.name, found))
        settings.setdefault(_setting_of(results), path)
        check_results(path, results)
        rows += benchmark_rows(results, name, found.step)
    if len(settings) > 1:
        shown = "; ".join(f"{path.name} is of {' '.join(key)}" for key, path in settings.items())
        raise UserError(f"the files are of several models or settings: {shown}.")
    if not rows:
        raise UserError(f"{paths[0]} holds no result that is a number.")
    model, shots = next(iter(settings))
    tasks = sorted({row["task"] for row in rows})
    return Imported(
        name=name,
        form="results of an lm-eval before 0.4",
        model=model,
        step_unit=common_unit(units) if units else STEP,
        taken=(
            f"steps, by the names of the files: {named(map(str, sorted(steps)))}",
            f"{len(tasks)} benchmarks: {named(tasks)}",
        ),
        notes=(f"benchmarks alone, {shots} examples shown; scored elsewhere",),
        benchmarks=pd.DataFrame(rows).sort_values("step", kind="stable"),
    )


def _setting_of(results: dict[str, Any]) -> tuple[str, str]:
    """Return the model without its revision, and the number of examples that were shown."""
    config = results.get("config", {})
    arguments = config.get("model_args")
    match = _PRETRAINED.search(arguments) if isinstance(arguments, str) else None
    return match[1] if match else str(config.get("model", "?")), str(config.get("num_fewshot", "?"))
