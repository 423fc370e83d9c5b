"""What a training set pins down: transfer between training and probe categories, in closed forms and with intervals.

T[i, j]: change of the held-out body log-prob of category j per body token, by training on i (a ratio of sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_probe.analysis.curves import crossing
from sft_probe.analysis.statistics import LEVEL, NUM_RESAMPLES, Floats, Ints, resamples


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What one training row moved: sums by cluster of held-out docs, of runs that share docs, categories and steps."""

    name: str
    target: str
    """The probe category that the row was trained on."""
    order_seeds: list[str]
    categories: list[str]
    steps: list[int]
    change: Floats
    """[seeds, clusters, categories, steps], sums of the change of body log-prob in nats"""
    tokens: Floats
    """[clusters, categories], body tokens"""

    def transfer(self, draws: Floats | None = None) -> Floats:
        """T of this row, [draws, seeds, categories, steps], nats per body token.

        Args:
            draws: [draws, clusters], how often each cluster counts; default: once, as one draw.
        """
        weights = np.ones((1, len(self.tokens))) if draws is None else draws
        sums = np.tensordot(weights, self.change, axes=(1, 1))
        return sums / (weights @ self.tokens)[:, None, :, None]

    def column(self, category: str) -> int:
        """Number of a category. Raises `ValueError` where it was not probed."""
        return self.categories.index(category)


def efficiency(matrix: Floats, owners: Sequence[int | None]) -> Floats:
    """T[i, j] / T[j, j], [rows, columns]; NaN in columns without an owner.

    Args:
        matrix: T, [rows, columns].
        owners: for each column, the row that was trained on it.
    """
    result = np.full(matrix.shape, np.nan)
    for column, row in enumerate(owners):
        if row is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                result[:, column] = matrix[:, column] / matrix[row, column]
    return result


def selectivity(matrix: Floats, own: Sequence[int]) -> Floats:
    """1 - mean over j != i of max(T[i, j], 0) / T[i, i], [rows].

    1 where nothing else rises, 0 where everything rises as much.
    """
    found = []
    for row, column in enumerate(own):
        others = np.delete(matrix[row], column)
        found.append(1 - np.maximum(others, 0.0).mean() / matrix[row, column] if len(others) else np.nan)
    return np.array(found)


def omega(t_ii: Floats, t_ij: Floats, t_ji: Floats, t_jj: Floats) -> Floats:
    """((T_ii - T_ji) + (T_jj - T_ij)) / (T_ii + T_jj): 0 for targets that cannot be told apart, 1 for no transfer.

    Each bracket compares two models on the same tokens, so that lengths and tokens cancel.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((t_ii - t_ji + t_jj - t_ij) / (t_ii + t_jj))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval over prompts; NaN where it is not defined."""

    value: Floats
    low: Floats
    high: Floats

    @property
    def has_sign(self) -> np.ndarray:
        """The interval excludes 0."""
        return np.asarray(self.low * self.high > 0)


def interval(value: Floats, draws: Floats) -> Interval:
    """Percentiles of resampled values along the first axis."""
    known = np.isfinite(draws).any(axis=0) if len(draws) else np.zeros(np.shape(value), dtype=bool)
    if not known.any():
        return Interval(value=value, low=np.full_like(value, np.nan), high=np.full_like(value, np.nan))
    low, high = np.nanquantile(np.where(known, draws, 0.0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Interval(value=value, low=np.where(known, low, np.nan), high=np.where(known, high, np.nan))


def draws_of(num_clusters: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Floats:
    """[resamples, clusters]; the same draws for all rows, since all probe the same docs."""
    if num_clusters < 2:
        return np.full((0, num_clusters), 1.0)
    return resamples(num_clusters, num_resamples, seed)


def omega_curve(one: Gains, two: Gains, draws: Floats) -> tuple[Floats, Interval]:
    """Omega at each common step, and the mean of both on-target gains there (seeds averaged), [steps] each.

    Undefined (NaN) where the interval of either on-target gain holds 0.
    """
    steps = [step for step in one.steps if step in two.steps]
    values = []
    for weights in (None, draws):
        parts = [_parts(one, two, weights), _parts(two, one, weights)]
        (t_ii, t_ij), (t_jj, t_ji) = (
            tuple(part[:, [gains.steps.index(step) for step in steps]] for part in pair)
            for pair, gains in zip(parts, (one, two), strict=True)
        )
        values.append((omega(t_ii, t_ij, t_ji, t_jj), t_ii, t_jj))
    (point, t_ii, t_jj), (resampled, of_ii, of_jj) = values
    known = interval(t_ii[0], of_ii).has_sign & interval(t_jj[0], of_jj).has_sign
    found = interval(point[0], resampled)
    value, low, high = (np.where(known, part, np.nan) for part in (found.value, found.low, found.high))
    return (t_ii[0] + t_jj[0]) / 2, Interval(value=value, low=low, high=high)


def _parts(gains: Gains, other: Gains, draws: Floats | None) -> tuple[Floats, Floats]:
    """On-target gain and transfer to the other's target, [draws, steps], seeds averaged."""
    matrix = gains.transfer(draws).mean(axis=1)
    return matrix[:, gains.column(gains.target)], matrix[:, gains.column(other.target)]


def omega_at_matched_gain(one: Gains, two: Gains, draws: Floats, gain: float) -> Interval:
    """Omega where both have gained `gain` nats per body token on their own target, linear between steps.

    NaN where one of them never gains that much, or where the interval of either on-target gain there holds 0. The steps
    are those at which the point estimates reach the gain.
    """
    values = []
    weights_at: list[tuple[Gains, Gains, Floats]] = []
    for own, other in ((one, two), (two, one)):
        on_target = _parts(own, other, None)[0][0]
        place = crossing(on_target, gain)
        if place is None or not _has_gained(_parts(own, other, draws)[0] @ place):
            return _undefined()
        weights_at.append((own, other, place))
    for weights in (None, draws):
        t = [tuple(part @ place for part in _parts(own, other, weights)) for own, other, place in weights_at]
        values.append(omega(t[0][0], t[0][1], t[1][1], t[1][0]))
    return interval(values[0][0], values[1])


def _has_gained(draws: Floats) -> bool:
    """The resampled gains, [draws], lie above 0 but for the tail of an interval; so without any, as for one cluster."""
    return bool(not len(draws) or np.quantile(draws, (1 - LEVEL) / 2) > 0)


def _undefined() -> Interval:
    nothing = np.array(np.nan)
    return Interval(value=nothing, low=nothing, high=nothing)


def difference(one: Gains, two: Gains, draws: Floats) -> Interval:
    """How much more `one` gained than `two` on the target of both: nats per body token, same docs, seeds averaged."""
    column = one.column(one.target)
    values = [
        one.transfer(weights).mean(axis=1)[:, column, -1] - two.transfer(weights).mean(axis=1)[:, column, -1]
        for weights in (None, draws)
    ]
    return interval(values[0][0], values[1])


def omega_null(one: Gains, two: Gains, draws: Floats, num_splits: int = 200, seed: int = 0) -> Interval:
    """The noise floor of omega, from two rows of one target: what it would be if its true value were 0.

    On one category omega is 0 by its formula, so the held-out clusters are halved at random, the one half playing the
    target of the first row, the other that of the second. The value is the mean over `num_splits` halvings, near 0
    whatever the rows are; what counts is the interval, the percentiles of single halvings, each of a resample of
    clusters. Whether the rows differ is for `difference` to say.
    """
    column = one.column(one.target)
    generator = np.random.default_rng(seed)
    change = [gains.change.mean(axis=0)[:, column, -1] for gains in (one, two)]  # [clusters]
    tokens = one.tokens[:, column]
    found = []
    for number in range(num_splits):
        first = generator.permutation(len(tokens)) < len(tokens) // 2
        weights = draws[number % len(draws)] if len(draws) else np.ones(len(tokens))
        t = [
            (weights[side] @ moved[side]) / max(weights[side] @ tokens[side], 1.0)
            for moved in change
            for side in (first, ~first)
        ]
        found.append(omega(*(np.array(value) for value in t)))
    values = np.array(found)
    return interval(np.array(np.nanmean(values)), values)


def share_of(one: Gains, whole: Gains, category: str, draws: Floats) -> Interval:
    """What part of `whole`'s last gain on `category` training on `one` gives too, seeds averaged.

    NaN where the interval of that gain holds 0.
    """
    values = []
    if not _has_gained(whole.transfer(draws).mean(axis=1)[:, whole.column(category), -1]):
        return _undefined()
    for weights in (None, draws):
        t_one, t_whole = (gains.transfer(weights).mean(axis=1)[:, gains.column(category), -1] for gains in (one, whole))
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(t_one / t_whole)
    return interval(values[0][0], values[1])


def clusters_of(values: Floats, clusters: Ints) -> Floats:
    """Sums over the docs of each cluster along the first axis."""
    sums = np.zeros((int(clusters.max()) + 1, *values.shape[1:]))
    np.add.at(sums, clusters, values)
    return sums
