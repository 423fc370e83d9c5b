"""Results of benchmarks: standard errors clustered by what items are about, and changes."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from sft_probe.analysis.stats.benchmarks import (
    benchmark_changes,
    benchmark_rows,
    shown_benchmarks,
)


def _results(values: list[float], docs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What lm-eval returns of one task, with bits per byte beside an accuracy."""
    pairs = [(-3.0 - value, 5 + number % 3) for number, value in enumerate(values)]
    bits = -sum(logprob for logprob, _ in pairs) / sum(size for _, size in pairs) / math.log(2)
    samples = [
        {"doc": doc, "filter": "none", "acc": value, "bits_per_byte": pair}
        for doc, value, pair in zip(docs, values, pairs, strict=True)
    ]
    results = {"acc,none": float(np.mean(values)), "acc_stderr,none": 0.5, "alias": "t"}
    return {
        "results": {"t": {**results, "bits_per_byte,none": bits, **more}},
        "samples": {"t": samples},
        "n-samples": {"t": {"effective": len(values)}},
    }


def test_items_on_one_text_are_one_cluster() -> None:
    generator = np.random.default_rng(0)
    docs = [{"passage": f"p{n // 3}", "question": f"q{n}"} for n in range(60)]
    values = [float(v) for v in generator.integers(0, 2, 20).repeat(3) ^ (np.arange(60) % 7 == 0)]
    rows = benchmark_rows(_results(values, docs), "run", 4)
    found = pd.DataFrame(rows).set_index("metric")
    groups = np.arange(60) // 3
    fit = sm.OLS(np.array(values), np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    expected = fit.bse[0] * math.sqrt(20 / 19)
    assert found["stderr"]["acc"] == pytest.approx(expected, rel=1e-9)
    alone = np.std(values, ddof=1) / math.sqrt(60)
    assert found["stderr"]["acc"] > 1.3 * alone, "else the clusters would not matter here"
    assert found["clusters"].to_list() == [20, 20]
    assert found[["step", "n"]].to_numpy().tolist() == [[4, 60]] * 2


def test_bits_per_byte_have_the_error_of_a_ratio() -> None:
    docs = [{"query": f"q{n}"} for n in range(40)]
    values = [float(n % 4) for n in range(40)]
    results = _results(values, docs)
    row = next(r for r in benchmark_rows(results, "run", 0) if r["metric"] == "bits_per_byte")
    nats, sizes = np.array([s["bits_per_byte"] for s in results["samples"]["t"]]).T
    ratio = -nats.sum() / sizes.sum() / math.log(2)
    errors = -nats / math.log(2) - ratio * sizes
    assert row["value"] == pytest.approx(ratio)
    assert row["stderr"] == pytest.approx(math.sqrt(40 / 39 * (errors**2).sum()) / sizes.sum())
    assert row["clusters"] == 40


def test_what_is_no_mean_over_items_keeps_the_error_of_lm_eval() -> None:
    docs = [{"query": f"q{n}"} for n in range(4)]
    results = _results([0.0, 1.0, 1.0, 1.0], docs, **{"f1,none": 0.4, "f1_stderr,none": 0.1})
    for sample in results["samples"]["t"]:
        sample["f1"] = 1.0  # of which lm-eval makes no mean
    rows = {row["metric"]: row for row in benchmark_rows(results, "run", 0)}
    assert (rows["f1"]["stderr"], rows["f1"]["clusters"]) == (0.1, None)
    del results["samples"]
    rows = {row["metric"]: row for row in benchmark_rows(results, "run", 0)}
    assert (rows["acc"]["stderr"], rows["acc"]["clusters"]) == (0.5, None)
    assert rows["bits_per_byte"]["stderr"] is None


def test_changes_are_in_the_order_of_their_size_in_standard_errors() -> None:
    values = {"a": (0.2, 0.3, 0.05), "b": (0.2, 0.9, 0.5), "c": (0.5, 0.1, 0.05)}
    rows = [
        {"task": task, "metric": "acc", "filter": "none", "step": step, "value": v, "stderr": error}
        for task, (first, last, error) in values.items()
        for step, v in ((0, first), (8, last))
    ]
    rows.append({**rows[0], "task": "once"})
    table = benchmark_changes(pd.DataFrame(rows))
    assert list(table["task"]) == ["c", "a", "b"], "`once` has one step only"
    assert table["change"].to_list() == pytest.approx([-0.4, 0.1, 0.7])
    assert table["stderr"].to_list() == pytest.approx([0.05 * 2**0.5, 0.05 * 2**0.5, 0.5 * 2**0.5])
    many = pd.DataFrame([{**row, "metric": f"m{n}"} for n in range(9) for row in rows])
    shown = shown_benchmarks(many, "optimizer step")
    assert shown is not None
    assert len(shown.rows) == 20
    assert "20 of 27, those that moved most" in shown.title
    assert shown_benchmarks(pd.DataFrame(rows[-1:]), "optimizer step") is None
    assert shown_benchmarks(None, "optimizer step") is None
