"""Means over docs in clusters, their intervals and bands; runs and docs crossed. Arrays in, arrays out.

A curve is an array `[docs, points]`; NaN marks what was not measured and is left out of that point alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

NUM_RESAMPLES = 2000
LEVEL = 0.95
MIN_RUNS_FOR_BOOTSTRAP = 8

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Means with their intervals; every array is `[points]`, NaN where nothing can be said."""

    mean: Floats
    stderr: Floats
    low: Floats
    """End of the interval of this point alone."""
    high: Floats
    band_low: Floats
    """End of the band that holds all points at once; equal to `low` where no band was asked for."""
    band_high: Floats
    num_docs: Ints
    degrees: Floats
    """Of freedom, of each point."""
    critical: float
    """Half width of the band in standard errors."""

    @property
    def p_values(self) -> Floats:
        """Two-sided p of a mean of 0, by a t-test."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(2 * stats.t.sf(np.abs(self.mean / self.stderr), self.degrees))


@dataclass(frozen=True)
class ClusterSums:
    """What a mean over docs is made of, by cluster."""

    values: Floats
    """[clusters, points], sums over the cluster's docs"""
    weights: Floats
    """[clusters, points], what the sums are divided by: docs, tokens or bytes"""
    num_docs: Ints
    """[points]"""


def cluster_ids(*labels: Sequence[object]) -> Ints:
    """Number of the cluster of each doc: docs that share a label of any kind, directly or through others, are one.

    Args:
        *labels: each `[docs]`: conversations, texts of the responses; `None` is shared with no other doc.
    """
    num_docs = len(labels[0])
    rows: list[int] = []
    nodes: list[int] = []
    number_of: dict[tuple[int, object], int] = {}
    for kind, values in enumerate(labels):
        for doc, value in enumerate(values):
            if value is not None:
                rows.append(doc)
                nodes.append(number_of.setdefault((kind, value), num_docs + len(number_of)))
    size = num_docs + len(number_of)
    graph = sparse.coo_matrix((np.ones(len(rows)), (rows, nodes)), shape=(size, size))
    found = sparse.csgraph.connected_components(graph, directed=False)[1][:num_docs]
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def cluster_sums(values: Floats, clusters: Ints, denominators: Floats | None = None) -> ClusterSums:
    """Sums of `values` and `denominators` (`[docs, points]`; default: 1) over the docs of each cluster."""
    present = ~np.isnan(values)
    if denominators is not None:
        present &= ~np.isnan(denominators)
    weights = np.where(present, 1.0 if denominators is None else denominators, 0.0)
    num_clusters = int(clusters.max()) + 1 if len(clusters) else 0
    member = sparse.csr_matrix(
        (np.ones(len(clusters)), (clusters, np.arange(len(clusters)))), (num_clusters, len(values))
    )
    return ClusterSums(member @ np.where(present, values, 0.0), member @ weights, present.sum(axis=0))


def estimate(
    values: Floats,
    clusters: Ints,
    *,
    denominators: Floats | None = None,
    band: bool = True,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of every point over docs, or the ratio of two sums, with a t-interval and a simultaneous band.

    The standard error is the cluster-robust one of a ratio of sums (Taylor expansion; for a plain mean that of an OLS
    constant with clustered errors and the factor G / (G - 1)). The band is mean +- c x standard error, c the quantile
    of the largest |t| over all points in a studentised bootstrap of whole clusters (Montiel Olea & Plagborg-Moller
    2019, doi:10.1002/jae.2656), at least that of one point's t and at most Bonferroni's, which the bootstrap exceeds
    where clusters are few. Intervals are 95 %; NaN below 2 clusters.

    Args:
        values: [docs, points]
        clusters: [docs], from `cluster_ids`.
        denominators: [docs, points], e.g. tokens; the mean is then sum of values / sum of denominators.
        band: False gives `band_low = low`, and takes no time.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    sums = cluster_sums(values, clusters, denominators)
    mean, stderr, degrees = _ratio(sums)
    point = stats.t.ppf((1 + LEVEL) / 2, degrees)
    critical = float("nan")
    if band and (usable := stderr > 0).any():
        largest = _largest_t(sums, mean, usable, num_resamples, seed)
        bonferroni = stats.t.ppf(1 - (1 - LEVEL) / 2 / usable.sum(), degrees[usable]).max()
        critical = float(np.clip(np.quantile(largest, LEVEL), point[usable].min(), bonferroni))
    half = np.where(stderr > 0, critical, point) * stderr if band else point * stderr
    return Estimate(
        mean=mean,
        stderr=stderr,
        low=mean - point * stderr,
        high=mean + point * stderr,
        band_low=mean - half,
        band_high=mean + half,
        num_docs=sums.num_docs,
        degrees=degrees,
        critical=critical,
    )


def _ratio(sums: ClusterSums) -> tuple[Floats, Floats, Floats]:
    """Ratio of sums, its standard error and degrees of freedom, for each point."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = sums.weights.sum(axis=0)
        mean = sums.values.sum(axis=0) / total
        num_clusters = (sums.weights > 0).sum(axis=0)
        residuals = sums.values - mean * sums.weights
        variance = (residuals**2).sum(axis=0) / total**2 * num_clusters / (num_clusters - 1)
        degrees = np.where(num_clusters > 1, num_clusters - 1.0, np.nan)
        return mean, np.where(num_clusters > 1, np.sqrt(variance), np.nan), degrees


def _largest_t(sums: ClusterSums, mean: Floats, usable: NDArray[np.bool_], num_resamples: int, seed: int) -> Floats:
    """[num_resamples], the largest |t| over the usable points of each resample of clusters."""
    values, weights, mean = sums.values[:, usable], sums.weights[:, usable], mean[usable]
    residuals = values - mean * weights  # of mean 0 in the sample, so that its resampled mean is the error
    squares, products, weights2 = residuals**2, residuals * weights, weights**2
    largest = np.empty(num_resamples)
    for start in range(0, num_resamples, 250):
        draws = resamples(len(values), min(250, num_resamples - start), seed + start)
        with np.errstate(divide="ignore", invalid="ignore"):
            total = draws @ weights
            error = (draws @ residuals) / total
            variance = (draws @ squares - 2 * error * (draws @ products) + error**2 * (draws @ weights2)) / total**2
            ratio = np.abs(error) / np.sqrt(np.maximum(variance, 0.0) * len(values) / (len(values) - 1))
        largest[start : start + len(draws)] = np.where(np.isfinite(ratio), ratio, 0.0).max(axis=1)
    return largest


def resamples(num_clusters: int, num_resamples: int, seed: int) -> Floats:
    """[num_resamples, num_clusters], how often each cluster is drawn."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples)
    return counts.astype(np.float64)


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """P values adjusted for their number by Holm's step-down (1979); NaN stays NaN and does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def over_runs(run_means: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean over runs, its standard error and 95 % t-interval with df = runs - 1; for these prompts.

    Args:
        run_means: [runs, points]; NaN intervals with one run.
    """
    num_runs = len(run_means)
    mean = run_means.mean(axis=0)
    if num_runs < 2:
        nothing = np.full(mean.shape, np.nan)
        return mean, nothing, nothing, nothing
    stderr = run_means.std(axis=0, ddof=1) / np.sqrt(num_runs)
    half = stats.t.ppf((1 + LEVEL) / 2, num_runs - 1) * stderr
    return mean, stderr, mean - half, mean + half


def over_runs_and_docs(
    values: Floats, clusters: Ints, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Mean and 95 % interval where runs and docs are both samples, crossed: each run scores the same docs.

    Under 8 runs: a t-interval whose variance is the sum of that of run means and that of doc means (which counts their
    interaction twice, so that it errs on the wide side), degrees of freedom by Satterthwaite. From 8: percentiles of a
    bootstrap that draws runs and clusters of docs independently (Owen 2007, doi:10.1214/07-AOAS122).

    Args:
        values: [runs, docs, points], complete.
        clusters: [docs]
    """
    mean = values.mean(axis=(0, 1))
    num_runs = len(values)
    if num_runs >= MIN_RUNS_FOR_BOOTSTRAP:
        sums = np.stack([cluster_sums(run, clusters).values for run in values])  # [runs, clusters, points]
        sizes = np.bincount(clusters).astype(np.float64)
        of_docs = resamples(len(sizes), num_resamples, seed)
        of_runs = resamples(num_runs, num_resamples, seed + 1) / num_runs
        per_run = np.stack([of_docs @ run for run in sums]) / (of_docs @ sizes)[:, None]  # [runs, resamples, points]
        draws = np.einsum("br,rbk->bk", of_runs, per_run)
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return mean, low, high
    _, of_runs_stderr, _, _ = over_runs(values.mean(axis=1))
    docs = estimate(values.mean(axis=0), clusters, band=False)
    of_runs_var, of_docs_var = of_runs_stderr**2, docs.stderr**2
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = (of_runs_var + of_docs_var) ** 2 / (of_runs_var**2 / (num_runs - 1) + of_docs_var**2 / docs.degrees)
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(of_runs_var + of_docs_var)
    return mean, mean - half, mean + half


def slope(x: Floats, values: Floats, clusters: Ints) -> Estimate:
    """Slope of the least-squares line of each point's values on `x`, with cluster-robust t-intervals.

    The variance is that of OLS with clustered errors and the factor G/(G-1) x (N-1)/(N-2) (as statsmodels and Stata).

    Args:
        x: [docs], e.g. tokens of the response.
        values: [docs, points]
        clusters: [docs]
    """
    columns = [_slope_of(x, column, clusters) for column in values.T]
    mean, stderr, degrees, num_docs = (np.array(part, dtype=np.float64) for part in zip(*columns, strict=True))
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * stderr
    return Estimate(
        mean=mean, stderr=stderr, low=mean - half, high=mean + half, band_low=mean - half, band_high=mean + half,
        num_docs=num_docs.astype(np.int64), degrees=degrees, critical=float("nan"),
    )  # fmt: skip


def _slope_of(x: Floats, y: Floats, clusters: Ints) -> tuple[float, float, float, int]:
    present = ~(np.isnan(x) | np.isnan(y))
    x, y, clusters = x[present], y[present], np.unique(clusters[present], return_inverse=True)[1]
    num_clusters = int(clusters.max()) + 1 if len(clusters) else 0
    if num_clusters < 3 or np.ptp(x) == 0:
        return float("nan"), float("nan"), float("nan"), len(x)
    centred = x - x.mean()
    spread = centred @ centred
    value = centred @ y / spread
    scores = np.bincount(clusters, weights=centred * (y - y.mean() - value * centred))
    factor = num_clusters / (num_clusters - 1) * (len(x) - 1) / (len(x) - 2)
    return value, float(np.sqrt(factor * (scores @ scores))) / spread, num_clusters - 1, len(x)


def pair_mean(values: Floats, first: Ints, second: Ints) -> Estimate:
    """Mean of quantities that belong to two clusters of docs each.

    Variance: products of the residuals of all pairs of quantities that share a cluster in either place (dyadic-robust;
    Aronow, Samii & Assenova 2015, doi:10.1093/pan/mpv018), times G/(G-1), with G-1 degrees of freedom, where G is the
    number of clusters or of quantities, whichever is smaller.

    Args:
        values: [quantities, points], complete.
        first: [quantities], cluster of one doc.
        second: [quantities], cluster of the other.
    """
    count = len(values)
    groups = min(count, len(np.union1d(first, second)))
    mean = values.mean(axis=0)
    residuals = values - mean
    shares = (
        (first[:, None] == first)
        | (second[:, None] == second)
        | (first[:, None] == second)
        | (second[:, None] == first)
    )
    variance = np.einsum("ik,ij,jk->k", residuals, shares.astype(np.float64), residuals, optimize=True) / count**2
    stderr = np.full_like(mean, np.nan)
    if groups > 1:
        stderr = np.sqrt(np.maximum(variance, 0.0) * groups / (groups - 1))
    degrees = np.full(mean.shape, max(groups - 1, 1), dtype=np.float64)
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * stderr
    return Estimate(
        mean=mean, stderr=stderr, low=mean - half, high=mean + half, band_low=mean - half, band_high=mean + half,
        num_docs=np.full(mean.shape, count, dtype=np.int64), degrees=degrees, critical=float("nan"),
    )  # fmt: skip
