"""Results of benchmarks as a table, and what is said of them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from sft_probe.text_table import Form, interval, number, text_table

_NORMAL = 1.96
_MAX_ROWS = 20


def benchmark_rows(results: Mapping[str, Any], run: str, step: int) -> list[dict[str, Any]]:
    """Return rows `run step task metric filter value stderr n` of the tasks and groups in lm-eval's
    results, those before 0.4 (`acc`, without a filter) too."""
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            is_result = metric != "sample_len" and not metric.endswith("_stderr")
            if not is_result or not isinstance(value, float | int):
                continue
            stderr = metrics.get(f"{metric}_stderr{comma}{filter_name}")
            rows.append(
                {
                    "run": run,
                    "step": step,
                    "task": task,
                    "metric": metric,
                    "filter": filter_name or "none",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "n": results.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def benchmark_changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return `task metric filter first_step last_step first last change stderr low high`, those
    that moved most for their standard error first.

    The results of both steps count as independent, although they answer the same items: the 95 %
    intervals are too wide rather than too narrow. Results of one step only are left out.
    """
    rows = []
    for place, part in table.groupby(["task", "metric", "filter"], sort=False):
        ends = part.sort_values("step").iloc[[0, -1]]
        first, last = (float(value) for value in ends["value"])
        stderr = float((pd.to_numeric(ends["stderr"]) ** 2).sum(skipna=False) ** 0.5)
        if ends["step"].iloc[0] < ends["step"].iloc[1]:
            steps = [int(step) for step in ends["step"]]
            change = last - first
            half = _NORMAL * stderr
            rows.append([*place, *steps, first, last, change, stderr, change - half, change + half])
    columns = ["task", "metric", "filter", "first_step", "last_step", "first", "last", "change"]
    found = pd.DataFrame(rows, columns=[*columns, "stderr", "low", "high"])
    moved = (found["change"] / found["stderr"]).abs().replace(math.inf, math.nan).fillna(-1.0)
    return found.iloc[moved.sort_values(ascending=False, kind="stable").index]


class ShownBenchmarks(NamedTuple):
    """What is printed of benchmarks."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def shown_benchmarks(table: pd.DataFrame | None, step_unit: str) -> ShownBenchmarks | None:
    """Return what benchmarks and other measures changed, 20 at most; none where all have one step
    only."""
    found = benchmark_changes(table) if table is not None else pd.DataFrame()
    if found.empty:
        return None
    shown = found.head(_MAX_ROWS)
    rows = [
        [
            *(str(row[name]) for name in ("task", "metric")),
            "" if row["filter"] == "none" else str(row["filter"]),
            *(number(row[name], ".4g") for name in ("first", "last")),
            number(row["change"], "+.3g"),
            interval(row["low"], row["high"], "+.3g"),
        ]
        for _, row in shown.iterrows()
    ]
    title = (
        f"benchmarks and other measures, {step_unit} {found['first_step'].min()} to "
        f"{found['last_step'].max()}; both steps taken as independent, so that intervals are too "
        "wide"
    )
    if len(found) > len(shown):
        title += f"; {len(shown)} of {len(found)}, those that moved most for their standard error"
    columns = ["benchmark", "metric", "filter", "first", "last", "change", "95 % interval"]
    return ShownBenchmarks(title, columns, rows)


def benchmarks_text(table: pd.DataFrame | None, step_unit: str, form: Form = "text") -> str:
    """Return a table of what benchmarks and other measures changed, or nothing."""
    shown = shown_benchmarks(table, step_unit)
    if shown is None:
        return ""
    return f"{shown.title}\n\n{text_table(shown.columns, shown.rows, form, left=3)}"
