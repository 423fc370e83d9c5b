"""Means over docs in clusters, their intervals and bands; runs and docs crossed. Arrays in, arrays
out.

NaN marks what was not measured and is left out of that point alone. Measured coverage:
docs/claims.md.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sft_probe.analysis.stats.clusters import Ints, cluster_ids, membership, renumber

NUM_RESAMPLES = 2000
LEVEL = 0.95
MIN_CLUSTERS = 10
"""Effective clusters below which there is no bootstrap and so no band, and a warning beside the
interval."""
MAX_CLUSTER_SHARE = 0.1
"""Share of the docs above which one cluster alone is worth a warning."""
SKEWNESS_STRETCH = 1.5
"""Factor of what the bootstrap quantile has over that of t, since few docs show less skewness than
there is; from simulations of 12 to 250 clusters (1: .93 for 24 lognormal docs, 1.5: .95, and at
most .97 for exponential ones)"""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_UPPER = (1 + LEVEL) / 2


@dataclass(frozen=True, kw_only=True)
class _Means:
    """Means with their standard errors, and what they rest on."""

    mean: Floats
    stderr: Floats
    num_docs: Ints
    num_clusters: Ints
    """Clusters with a doc that was measured"""
    effective_clusters: Floats
    """(sum of weights)^2 / sum of squared weights, over clusters: as many as there are if all weigh
    the same"""
    largest_cluster: Floats
    """Share of the largest cluster in the sum of weights"""


@dataclass(frozen=True, kw_only=True)
class Estimate(_Means):
    """Means with their intervals; every array has the shape of the points, NaN where nothing can be
    said."""

    degrees_low: Floats
    """Degrees of freedom of the t distribution that gives the lower end of the interval"""
    degrees_high: Floats
    """the same of the upper end; they differ where the docs are skewed"""
    band_low: Floats
    """End of the band that holds all points at once; NaN where there is none"""
    band_high: Floats
    critical: float
    """Half width of the band in standard errors"""

    @property
    def low(self) -> Floats:
        """Lower end of the 95 % interval of each point alone."""
        return np.asarray(self.mean - stats.t.ppf(_UPPER, self.degrees_low) * self.stderr)

    @property
    def high(self) -> Floats:
        """Upper end of the 95 % interval of each point alone."""
        return np.asarray(self.mean + stats.t.ppf(_UPPER, self.degrees_high) * self.stderr)

    @property
    def has_sign(self) -> Bools:
        """Whether the interval excludes 0."""
        return np.asarray(self.low * self.high > 0)

    @property
    def p_values(self) -> Floats:
        """Two-sided p of a mean of 0: below 0.05 where the interval excludes 0."""
        degrees = np.where(self.mean > 0, self.degrees_low, self.degrees_high)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(2 * stats.t.sf(np.abs(self.mean / self.stderr), degrees))


@dataclass(frozen=True)
class _Sums:
    """Sums over the docs of each cluster, `[clusters, points]`, of which resampled t-statistics are
    made.

    `errors` have mean 0 in the sample, so that their mean in a resample is its error.
    """

    errors: Floats
    weights: Floats
    squares: Floats
    products: Floats
    weights2: Floats

    def take(self, points: Bools) -> "_Sums":
        """Return the sums of some points."""
        return _Sums(*(getattr(self, field.name)[:, points] for field in fields(self)))

    def merge(self, into: Ints) -> "_Sums":
        """Return sums over larger clusters; `into`: [clusters], the larger one of each."""
        member = membership(into)
        return _Sums(*(member @ getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, kw_only=True)
class _Fit(_Means):
    """Points of one category, which share their clusters: arrays of `[points]`, and sums by
    cluster."""

    sums: _Sums

    @property
    def can_bootstrap(self) -> Bools:
        """Whether a point has an error and enough clusters."""
        return (self.stderr > 0) & (self.effective_clusters >= MIN_CLUSTERS)


def weighted_mean(values: Floats, denominators: Floats | None = None) -> Floats:
    """Return the mean over the first axis, or the sum of values over that of denominators, where
    neither is NaN."""
    weights = _weights(values, denominators)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(weights > 0, values, 0.0).sum(axis=0) / weights.sum(axis=0))


def estimate(
    values: Floats,
    clusters: Ints,
    *,
    denominators: Floats | None = None,
    band: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean of every point over docs, or the ratio of two sums, with a 95 % interval
    and band.

    The standard error is the cluster-robust one of a ratio of sums (Taylor expansion; for a plain
    mean that of an OLS constant with clustered errors and the factor G / (G - 1)). An interval is
    that of a t distribution whose degrees of freedom are the effective clusters less 1, widened at
    either end towards the quantile of a studentised bootstrap of whole clusters, which follows
    skewness (Hall 1992), see `SKEWNESS_STRETCH`. The band is mean +- c x standard error, c the
    quantile of the largest |t| over all points (Montiel Olea & Plagborg-Moller 2019,
    doi:10.1002/jae.2656), drawn from the clusters that join those of every category with a band.
    Points with under `MIN_CLUSTERS` effective clusters have no band and stay out of the maximum; so
    do those whose change is made of so few docs that the bootstrap has no variance. A point whose
    clusters all have the very same mean, other than 0, has no error: they look like copies.

    Args:
        values: [docs, points], or [docs, categories, points].
        clusters: [docs] or [docs, categories], from `cluster_ids`.
        denominators: shape of the values, e.g. tokens; the mean is then sum of values / sum of
            denominators.
        band: whether to compute the band.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    columns = clusters.reshape(len(clusters), -1)
    weights = _weights(values, denominators)
    cut = (len(values), columns.shape[1], -1)
    fits = [
        _fit(part, weight, own)
        for part, weight, own in zip(
            np.moveaxis(np.where(weights > 0, values, 0.0).reshape(cut), 1, 0),
            np.moveaxis(weights.reshape(cut), 1, 0),
            columns.T,
            strict=True,
        )
    ]
    draws = {
        size: resamples(size, num_resamples, seed)
        for size in {len(fit.sums.errors) for fit in fits}
    }
    resampled = [
        _resampled_t(fit.sums.take(fit.can_bootstrap), draws[len(fit.sums.errors)]) for fit in fits
    ]
    low, high = (
        np.stack([_degrees(fit, sign * t) for fit, t in zip(fits, resampled, strict=True)])
        for sign in (1, -1)
    )
    found = {
        field.name: np.stack([getattr(fit, field.name) for fit in fits]).reshape(values.shape[1:])
        for field in fields(_Means)
    }
    nothing = np.full(values.shape[1:], np.nan)
    result = Estimate(
        **found,
        degrees_low=low.reshape(nothing.shape),
        degrees_high=high.reshape(nothing.shape),
        band_low=nothing,
        band_high=nothing,
        critical=np.nan,
    )
    if not band:
        return result
    usable = [
        fit.can_bootstrap & (np.minimum(a, b) > 1)
        for fit, a, b in zip(fits, low, high, strict=True)
    ]
    critical = _critical(fits, usable, columns, resampled, seed=seed)
    return _with_band(result, critical, np.stack(usable).reshape(nothing.shape))


def _weights(values: Floats, denominators: Floats | None) -> Floats:
    if denominators is None:
        return np.where(np.isnan(values), 0.0, 1.0)
    return np.where(np.isnan(values) | np.isnan(denominators), 0.0, denominators)


def _fit(values: Floats, weights: Floats, clusters: Ints) -> _Fit:
    """Fit points that share their clusters; values and weights: [docs, points], 0 where a doc was
    not measured."""
    member = membership(clusters)
    sums, sizes = member @ values, member @ weights
    with np.errstate(divide="ignore", invalid="ignore"):
        total = sizes.sum(axis=0)
        mean = sums.sum(axis=0) / total
        count = (sizes > 0).sum(axis=0)
        errors = sums - mean * sizes
        stderr = np.where(
            count > 1, np.sqrt((errors**2).sum(axis=0) * count / (count - 1)) / total, np.nan
        )
        # copies of one doc tell of no other
        copies = (errors**2).sum(axis=0) <= 1e-24 * (sums**2).sum(axis=0)
        stderr[copies & (mean != 0)] = np.nan
        return _Fit(
            mean=mean,
            stderr=stderr,
            num_docs=(weights > 0).sum(axis=0),
            num_clusters=count,
            effective_clusters=total**2 / (sizes**2).sum(axis=0),
            largest_cluster=sizes.max(axis=0) / total,
            sums=_Sums(errors, sizes, errors**2, errors * sizes, sizes**2),
        )


def _resampled_t(sums: _Sums, draws: Floats) -> Floats:
    """Return [resamples, points], t of each resample of clusters; infinite where a resample has no
    variance."""
    if not sums.errors.shape[1]:
        return np.empty((len(draws), 0))
    count = (sums.weights > 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = draws @ sums.errors
        mean = error / (draws @ sums.weights)
        variance = (
            draws @ sums.squares
            - 2 * mean * (draws @ sums.products)
            + mean**2 * (draws @ sums.weights2)
        )
        variance = np.where(variance > 1e-9 * sums.squares.sum(axis=0), variance, 0.0)
        t = error / np.sqrt(variance * count / (count - 1))
        return np.where(np.isnan(t), 0.0, t)


def _degrees(fit: _Fit, resampled: Floats) -> Floats:
    """Return [points], degrees of freedom whose t quantile is that of the resampled t, at most the
    effective clusters less 1.

    The degrees stay above 1: below, the bootstrap says no more than that a few docs carry the
    change.
    """
    degrees = np.where(np.isnan(fit.stderr), np.nan, np.maximum(fit.effective_clusters - 1, 0.5))
    if resampled.shape[1]:
        quantile = np.quantile(resampled, _UPPER, axis=0, method="higher")
        usual = degrees[fit.can_bootstrap]
        least = stats.t.ppf(_UPPER, usual)
        wider = least + SKEWNESS_STRETCH * np.maximum(quantile - least, 0.0)
        degrees[fit.can_bootstrap] = np.clip(
            special.stdtridf(_UPPER, np.minimum(wider, stats.t.ppf(_UPPER, 1.0))), 1.0, usual
        )
    return degrees


def _critical(
    fits: Sequence[_Fit],
    usable: Sequence[Bools],
    columns: Ints,
    resampled: Sequence[Floats],
    *,
    seed: int,
) -> float:
    """Return the quantile of the largest |t| over the usable points; NaN where their joint clusters
    are too few."""
    kept = [number for number, points in enumerate(usable) if points.any()]
    if not kept:
        return float("nan")
    joint = cluster_ids(*columns[:, kept].T)
    sizes = np.bincount(joint)
    if sizes.sum() ** 2 / (sizes**2).sum() < MIN_CLUSTERS:
        return float("nan")
    draws = resamples(len(sizes), len(resampled[0]), seed)
    largest = np.zeros(len(draws))
    for number in kept:
        fit, points = fits[number], usable[number]
        if len(fit.sums.errors) == len(sizes):  # the joint clusters are its own
            t = resampled[number][:, points[fit.can_bootstrap]]
        else:
            into = np.zeros(len(fit.sums.errors), dtype=np.int64)
            into[columns[:, number]] = joint
            t = _resampled_t(fit.sums.take(points).merge(into), draws)
        largest = np.maximum(largest, np.where(np.isfinite(t), np.abs(t), 0.0).max(axis=1))
    return float(np.quantile(largest, LEVEL))


def _with_band(found: Estimate, critical: float, usable: Bools) -> Estimate:
    """Add the band, which holds every interval."""
    half = np.where(usable, critical * found.stderr, np.nan)
    return replace(
        found,
        critical=critical,
        band_low=np.minimum(found.mean - half, np.where(np.isnan(half), np.nan, found.low)),
        band_high=np.maximum(found.mean + half, np.where(np.isnan(half), np.nan, found.high)),
    )


@functools.lru_cache(maxsize=4)  # all measures and categories of a run are resampled alike
def resamples(num_clusters: int, num_resamples: int, seed: int) -> Floats:
    """Return [num_resamples, num_clusters], how often each cluster is drawn."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(
        num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples
    )
    draws = counts.astype(np.float64)
    draws.flags.writeable = False
    return draws


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Adjust p values for their number by Holm's step-down (1979); NaN stays NaN and does not
    count."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def over_runs(run_means: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the mean over runs, its standard error and 95 % t-interval with df = runs - 1; for
    these prompts.

    Args:
        run_means: [runs, points]; NaN intervals with one run.
    """
    num_runs = len(run_means)
    mean = run_means.mean(axis=0)
    if num_runs < 2:
        nothing = np.full(mean.shape, np.nan)
        return mean, nothing, nothing, nothing
    stderr = run_means.std(axis=0, ddof=1) / np.sqrt(num_runs)
    half = stats.t.ppf(_UPPER, num_runs - 1) * stderr
    return mean, stderr, mean - half, mean + half


def add_runs(found: Estimate, *run_means: Floats) -> Estimate:
    """Add the variance between runs to an estimate over docs, for an interval that holds for other
    runs and docs.

    Runs and docs are crossed: each run scores the same docs. The variances of run means and of doc
    means are added (which counts their interaction twice), the degrees of freedom are
    Satterthwaite's.

    Args:
        found: the estimate over docs, of values averaged over runs.
        *run_means: each `[runs, points]`, two runs or more: what the runs of one independent set
            contribute.
    """
    for means in run_means:
        found = add_variance(found, means.var(axis=0, ddof=1) / len(means), len(means) - 1)
    return found


def add_variance(found: Estimate, variance: Floats, degrees: float) -> Estimate:
    """Add an independent source of error to an estimate; the degrees of freedom are
    Satterthwaite's.

    Args:
        found: the estimate so far.
        variance: [points], of the mean.
        degrees: degrees of freedom of the variance.
    """
    total = found.stderr**2 + variance

    def satterthwaite(own: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(total**2 / (found.stderr**4 / own + variance**2 / degrees))

    return replace(
        found,
        stderr=np.sqrt(total),
        degrees_low=satterthwaite(found.degrees_low),
        degrees_high=satterthwaite(found.degrees_high),
    )


def over_runs_and_docs(values: Floats, clusters: Ints) -> Estimate:
    """Estimate means where runs and docs are both samples; a single run gives the interval over
    docs alone.

    Args:
        values: [runs, docs, points] or [runs, docs, categories, points]; NaN in all runs or in
            none.
        clusters: [docs] or [docs, categories]
    """
    found = estimate(values.mean(axis=0), clusters)
    return add_runs(found, weighted_mean(np.moveaxis(values, 1, 0))) if len(values) > 1 else found


def share(part: Floats, whole: Floats, clusters: Ints) -> Estimate:
    """Estimate the mean of a part over the mean of the whole, of docs that have both, as a
    linearised ratio.

    Unlike the denominators of `estimate`, the whole of a doc may be below 0.

    Args:
        part: [docs, points], or [docs, categories, points].
        whole: of the same shape.
        clusters: [docs] or [docs, categories]
    """
    present = ~(np.isnan(part) | np.isnan(whole))
    part, whole = np.where(present, part, np.nan), np.where(present, whole, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weighted_mean(whole)
        value = weighted_mean(part) / total
        errors = (part - value * whole) / total
    return replace(estimate(np.where(np.isfinite(errors), errors, np.nan), clusters), mean=value)


def slope(x: Floats, values: Floats, clusters: Ints) -> Estimate:
    """Estimate the slope of the least-squares line of each point's values on `x`, as a ratio of
    sums over docs.

    Args:
        x: [docs], e.g. tokens of the response.
        values: [docs, points]
        clusters: [docs]
    """
    present = ~(np.isnan(x)[:, None] | np.isnan(values))
    repeated = np.where(present, x[:, None], np.nan)
    centred = repeated - weighted_mean(repeated)
    found = estimate(
        centred * (values - weighted_mean(np.where(present, values, np.nan))),
        clusters,
        denominators=centred**2,
    )
    return replace(found, num_docs=present.sum(axis=0))


def pair_mean(values: Floats, owners: Ints, borrowers: Ints) -> Estimate:
    """Estimate the mean of quantities that belong to two clusters of docs each.

    The variance is the larger of two: clustered by the owner, and dyadic-robust, the products of
    the residuals of all pairs of quantities that share a cluster in either place (Aronow, Samii &
    Assenova 2015, doi:10.1093/pan/mpv018), which alone is too small where clusters are few. NaN
    where neither is above 0.

    Args:
        values: [quantities, points], complete.
        owners: [quantities], cluster of one doc.
        borrowers: [quantities], cluster of the other, in the same numbering.
    """
    found = estimate(values, renumber(owners))
    groups = min(len(values), len(np.union1d(owners, borrowers)))
    residuals = values - found.mean
    shares = (owners[:, None] == owners) | (borrowers[:, None] == borrowers)
    shares |= (owners[:, None] == borrowers) | (borrowers[:, None] == owners)
    dyadic = (
        np.einsum("ik,ij,jk->k", residuals, shares.astype(np.float64), residuals, optimize=True)
        / len(values) ** 2
    )
    variance = np.maximum(found.stderr**2, dyadic * groups / max(groups - 1, 1))
    return replace(found, stderr=np.sqrt(np.where(variance > 0, variance, np.nan)))
