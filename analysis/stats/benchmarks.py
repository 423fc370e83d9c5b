"""Results of benchmarks as a table, and what is said of them."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import cluster_ids, membership
from sft_probe.text_table import Shown, interval, number

_NORMAL = 1.96
_MAX_ROWS = 20
_ROUNDING = 1e-6
_TEXTS = (
    *("passage", "article", "paragraph", "story", "premise", "context_options", "context"),
    *("query", "question"),
)
"""Fields of an item that hold what it is about; the first that is there counts."""


def benchmark_rows(results: Mapping[str, Any], run: str, step: int) -> list[dict[str, Any]]:
    """Return rows `run step task metric filter value stderr n clusters` of the tasks and groups in
    lm-eval's results, those before 0.4 (`acc`, without a filter) too.

    Where `results` hold the samples of a task, the standard error of a mean, or of bits per byte,
    is clustered: items about the same text, such as questions on one passage, are one cluster, and
    `clusters` counts them. Else it is lm-eval's.
    """
    rows = []
    for task, metrics in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        for key, value in metrics.items():
            metric, comma, name = key.partition(",")
            is_result = metric != "sample_len" and not metric.endswith("_stderr")
            if not is_result or not isinstance(value, float | int):
                continue
            stderr = metrics.get(f"{metric}_stderr{comma}{name}")
            own = [item for item in samples if metric in item and item.get("filter", name) == name]
            error, clusters = _clustered_error(own, metric, value)
            if clusters is None and isinstance(stderr, float):
                error = stderr
            rows.append(
                {
                    "run": run,
                    "step": step,
                    "task": task,
                    "metric": metric,
                    "filter": name or "none",
                    "value": value,
                    "stderr": error,
                    "n": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "clusters": clusters,
                }
            )
    return rows


def _clustered_error(
    samples: Sequence[Mapping[str, Any]], metric: str, value: float
) -> tuple[float | None, int | None]:
    """Return the clustered standard error of a mean or of bits per byte, and the clusters; nothing
    of what is no such mean."""
    found = [item[metric] for item in samples]
    is_ratio = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in found)
    flat = [one for pair in found for one in pair] if is_ratio else found
    if not flat or not all(isinstance(one, float | int) for one in flat):
        return None, None
    pairs = [(-logprob / math.log(2), size) for logprob, size in found] if is_ratio else found
    values = np.array(pairs, dtype=np.float64).reshape(len(found), -1)
    weights = values[:, 1] if is_ratio else np.ones(len(found))
    mean = values[:, 0].sum() / weights.sum()
    clusters = cluster_ids([text_of(item.get("doc")) for item in samples])
    number = int(clusters.max()) + 1
    if not abs(mean - value) <= _ROUNDING * max(1.0, abs(value)) or number < 2:
        return None, None
    errors = membership(clusters) @ (values[:, 0] - mean * weights)
    variance = number / (number - 1) * (errors**2).sum() / weights.sum() ** 2
    return math.sqrt(variance), number


def text_of(doc: object) -> str | None:
    """Return the text that an item of a benchmark is about, which other items may share."""
    if not isinstance(doc, Mapping):
        return None
    return next((json.dumps(doc[name]) for name in _TEXTS if doc.get(name)), None)


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


def shown_benchmarks(table: pd.DataFrame | None, step_unit: str) -> Shown | None:
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
    return Shown(title, columns, rows)
