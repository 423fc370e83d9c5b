"""The statistics against scipy, statsmodels, closed forms, and simulated coverage."""

import time

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sft_probe.analysis.statistics import (
    cluster_ids,
    estimate,
    holm,
    over_runs,
    over_runs_and_docs,
    pair_mean,
    slope,
)

Floats = NDArray[np.float64]


def _clusters(num_docs: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Clusters of 1 to 3 docs."""
    sizes = generator.integers(1, 4, size=num_docs)
    return np.repeat(np.arange(num_docs), sizes)[:num_docs]


def _trajectories(clusters: NDArray[np.int64], num_points: int, generator: np.random.Generator) -> Floats:
    """Skewed random walks, correlated within clusters and from step to step; true mean 0."""
    of_clusters = generator.normal(size=(clusters.max() + 1, num_points))
    noise = generator.exponential(size=(len(clusters), num_points)) - 1
    walks: Floats = (of_clusters[clusters] + noise).cumsum(axis=1)
    return walks


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 5))), min_size=1, max_size=12))
def test_clusters_are_connected_components(docs: list[tuple[int, int | None]]) -> None:
    found = cluster_ids([doc[0] for doc in docs], [doc[1] for doc in docs])
    expected = list(range(len(docs)))
    for _ in docs:  # labels spread until nothing changes
        for i, first in enumerate(docs):
            for j, second in enumerate(docs):
                if first[0] == second[0] or (first[1] is not None and first[1] == second[1]):
                    expected[i] = expected[j] = min(expected[i], expected[j])
    assert [[a == b for b in found] for a in found] == [[a == b for b in expected] for a in expected]
    assert set(found) == set(range(found.max() + 1))


def test_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(2, 3, size=(40, 3))
    found = estimate(values, np.arange(40), num_resamples=10)
    reference = stats.ttest_1samp(values, 0)
    interval = reference.confidence_interval()
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])
    np.testing.assert_allclose(found.p_values, reference.pvalue)


def test_a_clustered_mean_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(1)
    clusters = _clusters(50, generator)
    values = _trajectories(clusters, 4, generator)
    found = estimate(values, clusters, num_resamples=10)
    for point in range(4):
        fit = sm.OLS(values[:, point], np.ones(50)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
        assert found.stderr[point] == pytest.approx(fit.bse[0])
        assert [found.low[point], found.high[point]] == pytest.approx(list(fit.conf_int()[0]))


def test_a_ratio_of_sums_is_a_weighted_mean_of_ratios() -> None:
    generator = np.random.default_rng(2)
    clusters = _clusters(60, generator)
    tokens = generator.integers(5, 90, size=(60, 1)).astype(float)
    values = tokens * generator.normal(0.1, 0.3, size=(60, 1))
    found = estimate(values, clusters, denominators=tokens, num_resamples=10)
    assert found.mean[0] == pytest.approx(values.sum() / tokens.sum())
    fit = sm.WLS(values[:, 0] / tokens[:, 0], np.ones(60), weights=tokens[:, 0]).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    assert found.stderr[0] == pytest.approx(fit.bse[0])


def test_what_is_missing_is_left_out_of_its_point_alone() -> None:
    values = np.random.default_rng(3).normal(size=(30, 2))
    holed = values.copy()
    holed[4, 0] = np.nan
    found = estimate(holed, np.arange(30), num_resamples=50)
    rest = estimate(np.delete(values, 4, axis=0), np.arange(29), num_resamples=50)
    whole = estimate(values, np.arange(30), num_resamples=50)
    assert [found.mean[0], found.stderr[0]] == pytest.approx([rest.mean[0], rest.stderr[0]])
    assert [found.mean[1], found.stderr[1]] == pytest.approx([whole.mean[1], whole.stderr[1]])
    assert list(found.num_docs) == [29, 30]


def test_one_cluster_has_a_mean_and_no_interval() -> None:
    found = estimate(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0, 0]))
    assert list(found.mean) == [2.0, 3.0]
    assert np.isnan([found.stderr, found.low, found.band_low]).all()


def test_the_band_is_wider_than_one_interval_and_narrower_than_bonferroni() -> None:
    generator = np.random.default_rng(4)
    values = _trajectories(np.arange(100), 30, generator)
    found = estimate(values, np.arange(100))
    assert stats.t.ppf(0.975, 99) < found.critical < stats.t.ppf(1 - 0.025 / 30, 99)
    again = estimate(values, np.arange(100))
    assert found.critical == again.critical, "the same data give the same band"


def _band_coverage(num_trajectories: int, num_docs: int = 200) -> float:
    generator = np.random.default_rng(5)
    held = 0
    for number in range(num_trajectories):
        clusters = _clusters(num_docs, generator)
        values = _trajectories(clusters, 24, generator)
        found = estimate(values, clusters, num_resamples=500, seed=number)
        held += bool(((found.band_low <= 0) & (found.band_high >= 0)).all())
    return held / num_trajectories


def test_simultaneous_coverage() -> None:
    assert 0.90 <= _band_coverage(200) <= 0.99, "95 % +- 3 standard errors of 200 draws"


def test_simultaneous_coverage_of_few_clusters() -> None:
    assert _band_coverage(200, num_docs=16) >= 0.90


def test_the_size_that_is_promised() -> None:
    values = np.random.default_rng(11).normal(size=(500, 12 * 50)).cumsum(axis=1)
    started = time.monotonic()
    estimate(values, np.arange(500) // 2)
    assert time.monotonic() - started < 20, "500 docs x 12 categories x 50 steps x 2,000 resamples"


@pytest.mark.full
def test_simultaneous_coverage_of_many() -> None:
    assert 0.935 <= _band_coverage(2000) <= 0.965


@settings(max_examples=20, deadline=None)  # statsmodels takes 50 ms
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1])


def test_holm_does_not_count_what_was_not_tested() -> None:
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])


def test_a_slope_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(6)
    clusters = _clusters(45, generator)
    x = generator.integers(5, 90, size=45).astype(float)
    values = 0.2 * x[:, None] + _trajectories(clusters, 2, generator)
    values[3, 1] = np.nan
    found = slope(x, values, clusters)
    for point, rows in enumerate((slice(None), np.arange(45) != 3)):
        fit = sm.OLS(values[rows, point], sm.add_constant(x[rows])).fit(
            cov_type="cluster", cov_kwds={"groups": clusters[rows]}, use_t=True
        )
        assert [found.mean[point], found.stderr[point]] == pytest.approx([fit.params[1], fit.bse[1]])
        assert [found.low[point], found.high[point]] == pytest.approx(list(fit.conf_int()[1]))


def test_pairs_of_disjoint_docs_are_independent() -> None:
    values = np.random.default_rng(7).normal(size=(30, 1))
    found = pair_mean(values, np.arange(30), np.arange(30, 60))
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])


def test_pairs_within_clusters_count_once() -> None:
    means = np.random.default_rng(11).normal(size=(10, 1))
    clusters = np.repeat(np.arange(10), 3)
    found = pair_mean(np.repeat(means, 3, axis=0), clusters, clusters)
    interval = stats.ttest_1samp(means, 0).confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])


def _pair_stderr(seed: int) -> tuple[float, float]:
    """Quantities a_n - b_m + noise, m a cyclic shift of n: neighbours share a doc. Mean and standard error."""
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(80, 1))
    values = effects + np.roll(effects, -1, axis=0) + 0.2 * generator.normal(size=(80, 1))
    found = pair_mean(values, np.arange(80), np.roll(np.arange(80), -1))
    return float(found.mean[0]), float(found.stderr[0])


def test_the_error_of_pairs_that_share_docs() -> None:
    draws = np.array([_pair_stderr(seed) for seed in range(400)])
    assert np.sqrt((draws[:, 1] ** 2).mean()) == pytest.approx(draws[:, 0].std(), rel=0.12)


def test_the_interval_over_runs_is_that_of_scipy() -> None:
    means = np.random.default_rng(8).normal(size=(3, 2))
    _, stderr, low, high = over_runs(means)
    interval = stats.ttest_1samp(means, 0).confidence_interval()
    np.testing.assert_allclose([low, high], [interval.low, interval.high])
    np.testing.assert_allclose(stderr, stats.sem(means))


def _crossed(num_runs: int, num_docs: int, generator: np.random.Generator, doc_sd: float = 1.0) -> Floats:
    """[runs, docs, 1], true mean 0."""
    runs = generator.normal(0, 0.5, size=(num_runs, 1, 1))
    docs = generator.normal(0, doc_sd, size=(1, num_docs, 1))
    values: Floats = runs + docs + generator.normal(size=(num_runs, num_docs, 1))
    return values


def test_coverage_of_three_runs() -> None:
    generator = np.random.default_rng(9)
    held = {"runs": 0, "both": 0}
    for _ in range(1000):
        values = _crossed(3, 20, generator, doc_sd=2.0)
        _, low, high = over_runs_and_docs(values, np.arange(20))
        held["both"] += bool(low[0] <= 0 <= high[0])
        fixed_docs = _crossed(3, 20, generator, doc_sd=0.0)
        _, _, low, high = over_runs(fixed_docs.mean(axis=1))
        held["runs"] += bool(low[0] <= 0 <= high[0])
    assert 930 <= held["runs"] <= 970, "95 % for these prompts"
    assert 930 <= held["both"] <= 990, "at least 95 % for other prompts too"


def test_coverage_of_ten_runs_by_a_two_way_bootstrap() -> None:
    generator = np.random.default_rng(10)
    held = 0
    for seed in range(300):
        values = _crossed(10, 40, generator)
        _, low, high = over_runs_and_docs(values, np.arange(40), num_resamples=400, seed=seed)
        held += bool(low[0] <= 0 <= high[0])
    assert 0.89 <= held / 300 <= 0.99
