"""The statistics against scipy, statsmodels, closed forms, published numbers, and simulated
coverage."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from helpers import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sft_probe.analysis.stats.clusters import cluster_ids
from sft_probe.analysis.stats.intervals import (
    estimate,
    holm,
    over_runs,
    over_runs_and_docs,
    pair_mean,
    share,
    slope,
)

Floats = NDArray[np.float64]


def _clusters(num_docs: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Clusters of 1 to 3 docs."""
    sizes = generator.integers(1, 4, size=num_docs)
    return np.repeat(np.arange(num_docs), sizes)[:num_docs]


def _trajectories(
    clusters: NDArray[np.int64], num_points: int, generator: np.random.Generator
) -> Floats:
    """Skewed random walks, correlated within clusters and from step to step; true mean 0."""
    of_clusters = generator.normal(size=(clusters.max() + 1, num_points))
    noise = generator.exponential(size=(len(clusters), num_points)) - 1
    walks: Floats = (of_clusters[clusters] + noise).cumsum(axis=1)
    return walks


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 5))),
        min_size=1,
        max_size=12,
    )
)
def test_clusters_are_connected_components(docs: list[tuple[int, int | None]]) -> None:
    found = cluster_ids([doc[0] for doc in docs], [doc[1] for doc in docs])
    expected = list(range(len(docs)))
    for _ in docs:  # labels spread until nothing changes
        for i, first in enumerate(docs):
            for j, second in enumerate(docs):
                if first[0] == second[0] or (first[1] is not None and first[1] == second[1]):
                    expected[i] = expected[j] = min(expected[i], expected[j])
    assert [[a == b for b in found] for a in found] == [
        [a == b for b in expected] for a in expected
    ]
    assert set(found) == set(range(found.max() + 1))


def test_a_mean_of_few_docs_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(2, 3, size=(9, 3))
    found = estimate(values, np.arange(9))
    reference = stats.ttest_1samp(values, 0)
    interval = reference.confidence_interval()
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])
    np.testing.assert_allclose(found.p_values, reference.pvalue)


def test_an_interval_is_at_least_that_of_t_and_longer_where_docs_are_skewed() -> None:
    generator = np.random.default_rng(0)
    for values, ratio in (
        (generator.normal(size=(40, 200)), 1.0),
        (generator.exponential(size=(40, 200)), 1.4),
    ):
        found = estimate(values, np.arange(40))
        interval = stats.ttest_1samp(values, 0).confidence_interval()
        assert (found.low <= interval.low + 1e-9).all()
        assert (found.high >= interval.high - 1e-9).all()
        above, below = found.high - found.mean, found.mean - found.low
        assert np.median(above / below) == pytest.approx(ratio, abs=0.15)


@given(st.floats(-3, 3), st.integers(0, 1000))
def test_p_is_below_5_percent_where_the_interval_excludes_0(shift: float, seed: int) -> None:
    found = estimate(
        shift + np.random.default_rng(seed).exponential(size=(20, 1)) - 1, np.arange(20)
    )
    if min(abs(found.low[0]), abs(found.high[0])) > 1e-6:
        assert (found.p_values[0] < 0.05) == found.has_sign[0]


def test_a_clustered_mean_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(1)
    clusters = _clusters(50, generator)
    values = _trajectories(clusters, 4, generator)
    found = estimate(values, clusters)
    for point in range(4):
        fit = sm.OLS(values[:, point], np.ones(50)).fit(
            cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
        )
        assert found.stderr[point] == pytest.approx(fit.bse[0])


def test_a_ratio_of_sums_is_a_weighted_mean_of_ratios() -> None:
    generator = np.random.default_rng(2)
    clusters = _clusters(60, generator)
    tokens = generator.integers(5, 90, size=(60, 1)).astype(float)
    values = tokens * generator.normal(0.1, 0.3, size=(60, 1))
    found = estimate(values, clusters, denominators=tokens)
    assert found.mean[0] == pytest.approx(values.sum() / tokens.sum())
    fit = sm.WLS(values[:, 0] / tokens[:, 0], np.ones(60), weights=tokens[:, 0]).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    assert found.stderr[0] == pytest.approx(fit.bse[0])


def test_unequal_clusters_count_for_less() -> None:
    clusters = np.concatenate([np.zeros(12), np.arange(1, 13)]).astype(int)
    found = estimate(np.random.default_rng(0).normal(size=(24, 1)), clusters, band=True)
    assert found.effective_clusters[0] == pytest.approx(24**2 / (12**2 + 12))
    assert found.largest_cluster[0] == 0.5
    assert found.degrees_low[0] == pytest.approx(found.effective_clusters[0] - 1)
    assert np.isnan(found.band_low).all(), "under 10 effective clusters there is no band"


def test_a_missing_score_is_left_out_of_its_own_point_alone() -> None:
    values = np.random.default_rng(3).normal(size=(30, 2))
    holed = values.copy()
    holed[4, 0] = np.nan
    found = estimate(holed, np.arange(30))
    rest = estimate(np.delete(values, 4, axis=0), np.arange(29))
    whole = estimate(values, np.arange(30))
    assert [found.mean[0], found.stderr[0]] == pytest.approx([rest.mean[0], rest.stderr[0]])
    assert [found.mean[1], found.stderr[1]] == pytest.approx([whole.mean[1], whole.stderr[1]])
    assert list(found.num_docs) == [29, 30]


def test_one_cluster_has_a_mean_and_no_interval() -> None:
    found = estimate(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0, 0]))
    assert list(found.mean) == [2.0, 3.0]
    assert np.isnan([found.stderr, found.low, found.band_low]).all()


def test_copies_of_one_change_have_no_interval_and_no_change_at_all_has_one_of_no_width() -> None:
    values = np.stack(
        [np.full(24, 0.1), np.zeros(24), np.random.default_rng(0).normal(size=24)], axis=1
    )
    found = estimate(values, np.arange(24), band=True)
    assert list(np.isnan(found.low)) == [True, False, False]
    assert (found.low[1], found.high[1]) == (0, 0)
    assert np.isnan(found.p_values[0])


def test_the_band_is_wider_than_one_interval_and_narrower_than_bonferroni() -> None:
    generator = np.random.default_rng(4)
    values = _trajectories(np.arange(100), 30, generator)
    found = estimate(values, np.arange(100), band=True)
    assert stats.t.ppf(0.975, 99) < found.critical < stats.t.ppf(1 - 0.025 / 30, 99)
    assert (found.band_low <= found.low).all()
    assert (found.band_high >= found.high).all()
    again = estimate(values, np.arange(100), band=True)
    assert found.critical == again.critical, "the same data give the same band"


@settings(max_examples=25)
@given(st.lists(st.integers(0, 60), min_size=60, max_size=60), st.integers(0, 99))
def test_repeated_responses_of_one_category_change_its_own_intervals_alone(
    texts: list[int], seed: int
) -> None:
    values = np.random.default_rng(seed).exponential(size=(60, 3, 4))
    conversations = np.arange(60) // 2
    apart = np.stack([cluster_ids(conversations)] * 3, axis=1)
    repeated = np.stack(
        [cluster_ids(conversations), cluster_ids(conversations, texts), cluster_ids(conversations)],
        1,
    )
    before, after = (estimate(values, clusters) for clusters in (apart, repeated))
    for name in ("mean", "stderr", "low", "high", "p_values"):
        np.testing.assert_array_equal(getattr(before, name)[[0, 2]], getattr(after, name)[[0, 2]])


def test_a_category_without_a_band_leaves_the_band_of_the_others() -> None:
    values = np.random.default_rng(3).normal(size=(60, 3, 4))
    clusters = np.stack([np.arange(60), np.arange(60) % 5, np.arange(60) // 2], axis=1)
    found = estimate(values, clusters, band=True)
    without = estimate(values[:, [0, 2]], clusters[:, [0, 2]], band=True)
    assert np.isnan(found.band_low[1]).all()
    np.testing.assert_array_equal(found.band_low[[0, 2]], without.band_low)


def test_a_change_made_of_two_docs_has_no_band_and_does_not_widen_others() -> None:
    values = np.random.default_rng(3).normal(size=(60, 2, 4))
    values[2:, 1] = 0.0
    found = estimate(values, np.arange(120).reshape(60, 2) // 2, band=True)
    assert np.isnan(found.band_low[1]).all()
    assert found.critical < 4


def test_intervals_of_500_docs_12_categories_and_50_steps_take_under_a_minute() -> None:
    values = np.random.default_rng(11).normal(size=(500, 12, 50)).cumsum(axis=2)
    clusters = np.stack([np.arange(500) // (1 + number % 3) for number in range(12)], axis=1)
    started = time.process_time()
    estimate(values, clusters, band=True)
    assert time.process_time() - started < 60, (
        "500 docs x 12 categories x 50 steps x 2,000 resamples"
    )


@settings(max_examples=20)  # statsmodels takes 50 ms
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
        count = len(values[rows])
        without_intercept = math.sqrt(
            (count - 2) / (count - 1)
        )  # statsmodels counts it in its factor
        assert [found.mean[point], found.stderr[point]] == pytest.approx(
            [fit.params[1], fit.bse[1] * without_intercept]
        )


def _parts(num_docs: int, num_points: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """[docs, points] of a part and of a whole of mean -2 that is above 0 for some docs; the share
    is 0.25."""
    whole = -2 + 1.5 * (generator.exponential(size=(num_docs, num_points)) - 1)
    return 0.25 * whole + 0.5 * generator.normal(size=whole.shape), whole


def test_a_share_is_the_ratio_of_means_with_the_delta_method() -> None:
    part, whole = _parts(40, 3, np.random.default_rng(8))
    part[3, 1] = np.nan
    found = share(part, whole, np.arange(40) // 2)
    for point in range(3):
        rows = np.delete(np.arange(40), 3) if point == 1 else np.arange(40)
        value = part[rows, point].sum() / whole[rows, point].sum()
        sums = np.bincount(rows // 2, part[rows, point] - value * whole[rows, point])
        error = math.sqrt((sums**2).sum() * 20 / 19) / abs(whole[rows, point].sum())
        assert [found.mean[point], found.stderr[point]] == pytest.approx([value, error])
    flipped = share(-part, -whole, np.arange(40) // 2)
    np.testing.assert_allclose([flipped.low, flipped.high], [found.low, found.high])


def test_the_interval_of_a_share_covers() -> None:
    part, whole = _parts(32, 2000, np.random.default_rng(9))
    found = share(part, whole, np.arange(32))
    low, high = _bounds(2000)
    assert low <= ((found.low <= 0.25) & (found.high >= 0.25)).mean() <= high


def test_pairs_of_disjoint_docs_are_independent() -> None:
    values = np.random.default_rng(7).normal(size=(30, 1))
    found = pair_mean(values, np.arange(30), np.arange(30, 60))
    np.testing.assert_allclose(found.stderr, stats.sem(values))


def test_pairs_within_clusters_count_once() -> None:
    means = np.random.default_rng(11).normal(size=(10, 1))
    clusters = np.repeat(np.arange(10), 3)
    found = pair_mean(np.repeat(means, 3, axis=0), clusters, clusters)
    np.testing.assert_allclose(found.stderr, stats.sem(means))


def test_pairs_never_have_less_variance_than_their_owners_and_none_without_any() -> None:
    effects = np.random.default_rng(2).normal(size=(40, 5))
    owners, borrowers = np.arange(40), np.roll(np.arange(40), 1)
    values = effects - effects[borrowers]  # neighbours cancel: dyadic alone is near 0 or negative
    found = pair_mean(values, owners, borrowers)
    assert (found.stderr >= stats.sem(values) - 1e-12).all()
    assert np.isnan(pair_mean(np.ones((40, 1)), owners, borrowers).low).all()


def _pair_stderr(seed: int) -> tuple[float, float]:
    """Quantities a_n - b_m + noise, m a cyclic shift of n: neighbours share a doc. Mean and
    standard error."""
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(80, 1))
    values = effects + np.roll(effects, -1, axis=0) + 0.2 * generator.normal(size=(80, 1))
    found = pair_mean(values, np.arange(80), np.roll(np.arange(80), -1))
    return float(found.mean[0]), float(found.stderr[0])


def test_the_standard_error_of_pairs_counts_the_docs_they_share() -> None:
    draws = np.array([_pair_stderr(seed) for seed in range(400)])
    assert np.sqrt((draws[:, 1] ** 2).mean()) == pytest.approx(draws[:, 0].std(), rel=0.12)


def test_the_interval_over_runs_is_that_of_scipy() -> None:
    means = np.random.default_rng(8).normal(size=(3, 2))
    _, stderr, low, high = over_runs(means)
    interval = stats.ttest_1samp(means, 0).confidence_interval()
    np.testing.assert_allclose([low, high], [interval.low, interval.high])
    np.testing.assert_allclose(stderr, stats.sem(means))


def _crossed(
    num_runs: int, num_docs: int, generator: np.random.Generator, doc_sd: float = 1.0
) -> Floats:
    """[runs, docs, 1], true mean 0."""
    runs = generator.normal(0, 0.5, size=(num_runs, 1, 1))
    docs = generator.normal(0, doc_sd, size=(1, num_docs, 1))
    values: Floats = runs + docs + generator.normal(size=(num_runs, num_docs, 1))
    return values


def test_runs_and_docs_add_their_variances() -> None:
    values = _crossed(4, 30, np.random.default_rng(9))
    found = over_runs_and_docs(values, np.arange(30))
    of_runs, of_docs = (
        stats.sem(values.mean(axis=1))[0] ** 2,
        stats.sem(values.mean(axis=0))[0] ** 2,
    )
    assert found.stderr[0] ** 2 == pytest.approx(of_runs + of_docs)
    alone = estimate(values.mean(axis=0), np.arange(30))
    satterthwaite = (of_runs + of_docs) ** 2 / (of_runs**2 / 3 + of_docs**2 / alone.degrees_low[0])
    assert found.degrees_low[0] == pytest.approx(satterthwaite)


def test_one_run_has_the_interval_over_docs() -> None:
    values = _crossed(1, 30, np.random.default_rng(9))
    found, alone = over_runs_and_docs(values, np.arange(30)), estimate(values[0], np.arange(30))
    assert [found.low[0], found.high[0]] == [alone.low[0], alone.high[0]]


@needs_shared
def test_published_scores_give_these_changes_and_standard_errors() -> None:
    # change by the last evaluation, its error unclustered, and by the category's own text
    expected = {
        "chosen": (-151.98, 5.64, 0.90, 0.91),
        "rejected": (-121.35, -76.29, 1.30, 1.31),
        "chosen_initial": (-151.66, -45.85, 1.60, 2.32),
        "irr_train": (-193.41, -29.59, 0.96, 1.27),
        "irr_test": (-161.16, -48.98, 1.05, 1.05),
        "irr_hum": (-187.90, -34.72, 0.94, 0.96),
        "random_permute": (-401.35, -90.14, 2.23, 2.23),
        "random_nonhum": (-361.76, -79.14, 1.76, 1.79),
    }
    names, values, texts = _published()
    own = np.stack([cluster_ids([doc[name] for doc in texts]) for name in names], axis=1)
    change = values - values[:, :, :1]
    apart = estimate(change, np.stack([np.arange(500)] * len(names), axis=1), band=True)
    clustered = estimate(change[:, :, -1:], own)
    for name, (start, moved, alone, by_text) in expected.items():
        number = names.index(name)
        found = (values[:, number, 0].mean(), apart.mean[number, -1], apart.stderr[number, -1])
        assert [*found, clustered.stderr[number, 0]] == pytest.approx(
            [start, moved, alone, by_text], abs=0.0051
        ), name
    assert apart.critical == pytest.approx(3.63, abs=0.08), (
        "the quantile of 2,000 resamples has an error of 0.03"
    )


def _published() -> tuple[list[str], Floats, list[dict[str, Any]]]:
    """Names, log-probs [docs, categories, evaluations] and texts of the published DPO run."""
    folder = SHARED / "reference/learning-dynamics"
    values = np.load(folder / "pythia410m_dpo.logp.npy").transpose(2, 1, 0)
    lines = (folder / "pythia410m_dpo.metrics.json").read_text().splitlines()
    first = json.loads(lines[0])
    texts = [
        json.loads(line)
        for line in (SHARED / "data/helpful-base/probe_train.jsonl").read_text().splitlines()
    ]
    rows = [name.rpartition("/")[2] for name in first]
    kept = [number for number, name in enumerate(rows) if name in texts[0]]
    return [rows[number] for number in kept], values[:, kept], texts


def _benchmark() -> Any:
    """The coverage simulations of `benchmarks/coverage.py`."""
    path = Path(__file__).parents[2] / "benchmarks/coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_simulations", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simulations() -> Any:
    return _benchmark()


def _bounds(num_sets: int) -> tuple[float, float]:
    """95 +- 2 % and 3 standard errors of the share of so many sets."""
    error = 3 * math.sqrt(0.95 * 0.05 / num_sets)
    return 0.93 - error, 0.97 + error


def _check(rows: list[dict[str, Any]], num_sets: int) -> None:
    low, high = _bounds(num_sets)
    for row in rows:
        excused = row["warned"] > 0.5 or row.get("withheld", 0) > 0.5
        assert excused or low <= row["coverage"] <= high, row


def test_intervals_of_means_of_few_docs_cover_as_promised(simulations: Any) -> None:
    rows = list(simulations.cells("means", 1000, num_docs=(24,)))
    _check(rows, 1000)
    calm = {row["clusters"] for row in rows if row["warned"] <= 0.5}
    assert {"alone", "pairs", "30 % missing"} <= calm, "not everything is excused by a warning"
    uneven = [
        row["coverage"]
        for row in rows
        if row["noise"] == "normal" and row["clusters"] == "half in one"
    ]
    assert min(uneven) > 0.92, "G - 1 degrees of freedom give 0.7"


@pytest.mark.parametrize("kind", ["alone", "pairs"])
def test_bands_of_few_docs_cover_as_promised(simulations: Any, kind: str) -> None:
    for noise in ("normal", "lognormal"):
        design = simulations.Design(noise, 24, kind)
        row = simulations.bands(design, 200, np.random.default_rng(0))
        _check([{**row, "noise": noise, "kind": kind}], 200)
        assert row["withheld"] == 0


@pytest.mark.parametrize("num_runs", [1, 2, 3, 5, 8, 12])
def test_intervals_over_runs_and_docs_cover_as_promised(simulations: Any, num_runs: int) -> None:
    low, high = _bounds(1000)
    low = {2: 0.87 - 0.03, 3: 0.91 - 0.03}.get(
        num_runs, low
    )  # what the output says of two and three runs
    for noise in ("normal", "lognormal"):
        row = simulations.runs(
            simulations.Design(noise, 24, "alone"), 1000, np.random.default_rng(0), num_runs, 10.0
        )
        assert low <= row["coverage"] <= high + 0.01, (noise, row)


@pytest.mark.parametrize("num_runs", [1, 3, 5])
def test_intervals_of_transfer_cover_as_promised(simulations: Any, num_runs: int) -> None:
    low, _ = _bounds(500)
    low = {3: 0.91 - 0.04}.get(num_runs, low)
    for noise in ("normal", "lognormal"):
        row = simulations.ratios(
            simulations.Design(noise, 32, "pairs"), 500, np.random.default_rng(0), num_runs
        )
        assert row["coverage"] >= low, (noise, row)


def test_intervals_of_pairs_and_slopes_cover_as_promised(simulations: Any) -> None:
    for name in ("pmi", "slopes"):
        row = getattr(simulations, name)(
            simulations.Design("exponential", 32, "alone"), 1000, np.random.default_rng(0)
        )
        assert row["warned"] > 0.5 or row["coverage"] >= _bounds(1000)[0], (name, row)


@pytest.mark.parametrize("truth", ["flat", "plateau", "rising"])
def test_sentences_of_the_verdict_are_false_as_rarely_as_promised(
    simulations: Any, truth: str
) -> None:
    design = simulations.Design("exponential", 24, "alone")
    row = simulations.sentences(design, 40, np.random.default_rng(0), truth)
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 40)
    assert row["turn"] <= allowed
    assert row["move"] <= allowed


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["means", "bands", "runs", "runs_alike", "ratios", "pmi", "slopes"]
)
def test_intervals_of_every_setting_cover_as_promised(simulations: Any, name: str) -> None:
    rows = list(simulations.cells(name, 400, num_docs=(24, 32, 100)))
    low, high = _bounds(400)
    for row in rows:
        excused = row["warned"] > 0.5 or row.get("withheld", 0) > 0.5 or row.get("runs") in {2, 3}
        # the interaction of runs and docs counts twice, pairs take a maximum, few docs of heavy
        # tails give wide bands
        wide = name in {"runs_alike", "ratios", "pmi", "bands", "slopes"}
        assert excused or low - 0.01 <= row["coverage"] <= (1.0 if wide else high + 0.01), row


@pytest.mark.full
def test_sentences_of_the_verdict_are_false_as_rarely_as_promised_under_every_noise(
    simulations: Any,
) -> None:
    for row in simulations.sentence_cells(300):
        assert max(row["turn"], row["move"]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300), row
