"""Wide tables of benchmarks: a row for each model and step or epoch, a column for each result."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sft_probe.analysis.stats.imports.imported import (
    EXAMPLES,
    Imported,
    benchmark_table,
    named,
    steps_of,
)
from sft_probe.analysis.stats.steps import EPOCH, STEP
from sft_probe.errors import UserError

_STEPS = {
    "step": STEP,
    "global_step": STEP,
    "checkpoint": STEP,
    "iteration": STEP,
    "epoch": EPOCH,
    "train_examples": EXAMPLES,
    "examples_seen": EXAMPLES,
}
_MODELS = ("model", "model_name", "run", "name")
_STDERR = ("_stderr", "_se", "_sem")


def read_wide(path: Path, table: pd.DataFrame) -> list[Imported]:
    """Return a run for each model of a CSV file.

    It has a column for the step (`step`, `checkpoint`, `epoch`, ...), perhaps one for the model,
    and a column of numbers for each result; `NAME_stderr` beside NAME is its standard error.
    Columns of anything else are named and left out.

    Raises:
        UserError: there is no column of steps or results, a step is no whole number, or two rows
            have the same model and step.
    """
    known = {str(name).strip().lower(): str(name) for name in table.columns}
    step = next((known[name] for name in _STEPS if name in known), None)
    model = next((known[name] for name in _MODELS if name in known), None)
    numeric = [str(name) for name in table.select_dtypes("number") if name not in (step, model)]
    results = [name for name in numeric if _base_of(name) not in numeric]
    if step is None or not results:
        raise UserError(
            f"{path} has the columns {named(map(str, table.columns))}. A table of benchmarks needs "
            f"one of {', '.join(_STEPS)}, and a column of numbers for each result; a table of "
            "log-probs needs category, step and logprob."
        )
    unit = _STEPS[step.strip().lower()]
    owners = table[model].astype(str) if model else pd.Series(path.stem, index=table.index)
    table = table.assign(step=steps_of(path, table, step), owner=owners)
    _check_repeats(path, table, unit)
    left_out = [str(name) for name in table if name not in {"owner", "step", step, model, *numeric}]
    notes = [f"columns left out, which hold no numbers: {named(left_out)}"] if left_out else []
    taken = [f"{step}: the {unit}", *([f"{model}: the model, a run for each"] if model else [])]
    return [
        Imported(
            name=str(owner),
            form="a wide table of benchmarks",
            model=str(owner) if model else None,
            step_unit=unit,
            taken=(*taken, f"results: {named(results)}"),
            notes=tuple(notes),
            benchmarks=_results_of(str(owner), rows.sort_values("step"), results),
        )
        for owner, rows in table.groupby("owner", sort=False)
    ]


def _base_of(name: str) -> str | None:
    """Return the result whose standard error a column holds by its name, if any."""
    end = next((end for end in _STDERR if name.endswith(end)), None)
    return name.removesuffix(end) if end else None


def _check_repeats(path: Path, table: pd.DataFrame, unit: str) -> None:
    repeated = table.duplicated(["owner", "step"]).to_numpy()
    if repeated.any():
        row = int(repeated.argmax())
        owner, step = table[["owner", "step"]].iloc[row]
        raise UserError(
            f"{path}, line {row + 2}: a second row of {owner} at {unit} {step}. Keep one, or "
            "average them."
        )


def _results_of(owner: str, rows: pd.DataFrame, results: Sequence[str]) -> pd.DataFrame | None:
    """Return the results of one model as a table of benchmarks."""
    nothing = pd.Series(math.nan, index=rows.index)
    cells = []
    for name in results:
        errors = next((rows[name + end] for end in _STDERR if name + end in rows), nothing)
        for step, value, error in zip(rows["step"], rows[name], errors, strict=True):
            if pd.notna(value):
                own = (int(step), name, "value", "none", float(value), float(error), math.nan)
                cells.append(own)
    return benchmark_table(owner, cells)
