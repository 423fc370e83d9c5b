"""What an import has read: one run that was trained and scored elsewhere, and what its files were
taken for."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.steps import STEP
from sft_probe.errors import UserError, first_few

EVALUATION, EXAMPLES = "evaluation", "training examples"
Texts = dict[str, dict[str, str]]
"""Doc id to category to response."""
_MAX_NAMED = 12


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One run: score rows of docs, or means over docs, or benchmarks alone."""

    name: str
    form: str
    """What kind of files these are, in a few words."""
    model: str | None = None
    step_unit: str = STEP
    taken: tuple[str, ...] = ()
    """What the parts of the files were taken for, a line each."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the numbers."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was scored, by the names that a sweep gives its settings."""
    rows: pa.Table | None = None
    """Score rows, as in `sft_probe.scores`."""
    means: pd.DataFrame | None = None
    """`split category step value`, nats per response, where no doc is known."""
    benchmarks: pd.DataFrame | None = None
    """`run step task metric filter value stderr n`: benchmarks, and what else is no log-prob."""
    texts: Texts = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    """Doc id to prompt."""


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value of a JSON file is a finite number."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def named(names: Iterable[str]) -> str:
    """Return up to 12 names, and how many more there are."""
    return first_few(names, _MAX_NAMED)


def check_results(path: Path, results: dict[str, Any]) -> None:
    """Raise `UserError` where the results of a task of lm-eval are no object."""
    for task, metrics in results.get("results", {}).items():
        if not isinstance(metrics, dict):
            raise UserError(f"{path}: 'results' of {task} is no object.")


def benchmark_table(
    run: str, rows: Sequence[tuple[int, str, str, str, float, float, float]]
) -> pd.DataFrame | None:
    """Return rows `step task metric filter value stderr n` as the table of a run; none of none."""
    columns = ["step", "task", "metric", "filter", "value", "stderr", "n"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(0, "run", run)
    return table if len(table) else None


def read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file. Raises `UserError` where it cannot be."""
    try:
        return pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error


def numbers_of(path: Path, table: pd.DataFrame, column: str) -> "pd.Series[float]":
    """Return a column as finite numbers. Raises `UserError` with the line of what is none."""
    numbers = pd.to_numeric(table[column], errors="coerce").astype("float64")
    bad = ~np.isfinite(numbers.to_numpy())
    if bad.any():
        row = int(bad.argmax())
        value = table[column].iloc[row]
        raise UserError(f"{path}, line {row + 2}: {column} is {value!r}, which is no number.")
    return numbers


def steps_of(path: Path, table: pd.DataFrame, column: str) -> "pd.Series[int]":
    """Return a column as steps. Raises `UserError` with the line of what is no whole number."""
    numbers = numbers_of(path, table, column)
    bad = ((numbers < 0) | (numbers % 1 != 0)).to_numpy()
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{path}, line {row + 2}: {column} is {numbers.iloc[row]:g}; a step is a whole number "
            "from 0 on."
        )
    return numbers.astype("int64")
