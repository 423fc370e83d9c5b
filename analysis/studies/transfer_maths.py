"""What a training set pins down: transfer between training and probe categories, in closed forms
and with intervals.

T[i, j]: change of the held-out body log-prob of category j per body token, by training on i (a
ratio of sums).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.curves import crossing
from sft_probe.analysis.stats.intervals import Bools, Estimate, Floats, add_runs, estimate


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What one training row moved on each held-out doc, of runs that share docs, categories and
    steps."""

    name: str
    target: str
    """The probe category that the row was trained on"""
    order_seeds: list[str]
    categories: list[str]
    steps: list[int]
    change: Floats
    """[seeds, docs, categories, steps], change of body log-prob in nats"""
    tokens: Floats
    """[docs, categories], body tokens"""
    clusters: Ints
    """[docs, categories]"""

    def column(self, category: str) -> int:
        """Return the number of a category. Raises `ValueError` where it was not probed."""
        return self.categories.index(category)

    def cell(self, category: str, place: Floats | None = None) -> "Cell":
        """Return the transfer to a category; `place`: see `Cell`."""
        column = self.column(category)
        change = self.change[:, :, column]
        return Cell(
            change=change if place is None else change @ place,
            tokens=self.tokens[:, column],
            clusters=self.clusters[:, column],
            order_seeds=self.order_seeds,
        )

    @property
    def last(self) -> Floats:
        """[steps, 1], the weights that take the last step."""
        return np.eye(len(self.steps))[:, -1:]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """T[i, j]: change over the first two axes and tokens over docs give a ratio of sums at each
    point.

    The points are the steps of a row, or a linear interpolation between them.
    """

    change: Floats
    """[seeds, docs, points]"""
    tokens: Floats
    """[docs]"""
    clusters: Ints
    """[docs]"""
    order_seeds: list[str]

    @property
    def value(self) -> Floats:
        """[points], the mean over seeds."""
        return np.asarray(self.change.mean(axis=0).sum(axis=0) / self.tokens.sum())

    @property
    def errors(self) -> Floats:
        """[seeds, docs, points], what each doc of each run adds to the error of the value; their
        mean is 0."""
        return np.asarray((self.change - self.value * self.tokens[:, None]) / self.tokens.sum())

    @property
    def gained(self) -> Bools:
        """[points], whether the interval of the value lies above 0."""
        return np.asarray(delta(self.value, [(self, np.ones(1))]).low > 0)


def delta(value: Floats, slopes: Sequence[tuple[Cell, Floats]]) -> Estimate:
    """Return the interval of a function of cells over other prompts, and other runs where each row
    has several.

    The delta method: the error of the value is the sum of those of the cells times the slopes of
    the function. Rows with the same order seeds are matched by them, so that their runs count as
    pairs; others are independent.

    Args:
        value: [points]
        slopes: cells with the derivative of the value by each, [points].
    """
    of_runs: dict[tuple[str, ...], Floats] = {}
    for cell, slope in slopes:
        order = sorted(range(len(cell.order_seeds)), key=cell.order_seeds.__getitem__)
        key = tuple(cell.order_seeds[number] for number in order)
        of_runs[key] = of_runs.get(key, np.zeros(1)) + cell.errors[order] * np.where(
            np.isfinite(slope), slope, np.nan
        )
    cells = [cell for cell, _ in slopes]
    weights = sum(cell.tokens / cell.tokens.sum() for cell in cells) / len(cells)
    errors = sum(part.mean(axis=0) for part in of_runs.values())
    found = estimate(
        np.asarray(errors),
        cluster_ids(*(cell.clusters for cell in cells)),
        denominators=np.broadcast_to(np.asarray(weights)[:, None], np.shape(errors)),
    )
    if min(map(len, of_runs)) > 1:
        found = add_runs(found, *(part.sum(axis=1) for part in of_runs.values()))
    return replace(found, mean=value)


def ratio(one: Cell, whole: Cell) -> Estimate:
    """Return one / whole with its interval; NaN where the interval of `whole` holds 0."""
    value = divide(one.value, whole.value)
    found = delta(value, [(one, divide(1.0, whole.value)), (whole, divide(-value, whole.value))])
    return keep(found, whole.gained)


def difference(one: Cell, two: Cell) -> Estimate:
    """Return how much more `one` gained than `two`, in nats per body token."""
    return delta(one.value - two.value, [(one, np.ones(1)), (two, -np.ones(1))])


def keep(found: Estimate, known: Bools) -> Estimate:
    """Return an estimate that is NaN where it is not defined."""
    return replace(
        found,
        mean=np.where(known, found.mean, np.nan),
        stderr=np.where(known, found.stderr, np.nan),
    )


def divide(above: Floats | float, below: Floats) -> Floats:
    """Return the quotient, NaN or infinite where `below` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above / below)


def selectivity(own: Floats, others: Floats) -> Floats:
    """Return 1 - mean over j != i of T[i, j] / T[i, i]: 1 where nothing else moves, 0 where all
    rises as much.

    The mean is signed: a mean of max(T, 0) would grow with the noise.

    Args:
        own: [points], T[i, i].
        others: [categories, points], T[i, j].
    """
    return 1 - divide(others.mean(axis=0), own)


def selectivity_of(gains: Gains) -> Estimate:
    """Return the selectivity of a row at its last step with its interval; NaN where its target's
    interval holds 0."""
    own = gains.cell(gains.target, gains.last)
    others = [gains.cell(name, gains.last) for name in gains.categories if name != gains.target]
    if not others:
        return keep(delta(own.value, [(own, np.ones(1))]), np.zeros(1, dtype=bool))
    value = selectivity(own.value, np.stack([cell.value for cell in others]))
    slope = divide(-1 / len(others), own.value)
    found = delta(value, [(own, divide(1 - value, own.value)), *((cell, slope) for cell in others)])
    return keep(found, own.gained)


def omega(t_ii: Floats, t_ij: Floats, t_ji: Floats, t_jj: Floats) -> Floats:
    """Return ((T_ii - T_ji) + (T_jj - T_ij)) / (T_ii + T_jj): 0 for targets that cannot be told
    apart, 1: no transfer.

    Each bracket compares two models on the same tokens, so that lengths and tokens cancel.
    """
    return divide(t_ii - t_ji + t_jj - t_ij, t_ii + t_jj)


def omega_of(one: Gains, two: Gains, places: tuple[Floats, Floats]) -> tuple[Floats, Estimate]:
    """Return the mean on-target gain and omega with its interval, [points] each.

    NaN where the interval of either on-target gain holds 0.

    Args:
        one: a row.
        two: another row, with another target.
        places: of each row, weights of its steps, [steps, points].
    """
    t_ii, t_ij = (one.cell(gains.target, places[0]) for gains in (one, two))
    t_jj, t_ji = (two.cell(gains.target, places[1]) for gains in (two, one))
    value = omega(t_ii.value, t_ij.value, t_ji.value, t_jj.value)
    slope = divide(1.0, t_ii.value + t_jj.value)
    own, other = (1 - value) * slope, -slope
    found = delta(value, [(t_ii, own), (t_jj, own), (t_ij, other), (t_ji, other)])
    return (t_ii.value + t_jj.value) / 2, keep(found, t_ii.gained & t_jj.gained)


def omega_curve(one: Gains, two: Gains) -> tuple[Floats, Estimate]:
    """Return the mean on-target gain and omega at each common step, [steps] each."""
    steps = [step for step in one.steps if step in two.steps]
    places = [
        np.eye(len(gains.steps))[:, [gains.steps.index(step) for step in steps]]
        for gains in (one, two)
    ]
    return omega_of(one, two, (places[0], places[1]))


def omega_at_matched_gain(one: Gains, two: Gains, gain: float) -> Estimate | None:
    """Return omega where both have first gained `gain` nats per body token on their own target,
    linear between steps.

    `None` where one of them never gains that much. The steps are those at which the point estimates
    reach the gain.
    """
    places = [crossing(gains.cell(gains.target).value, gain) for gains in (one, two)]
    if gain <= 0 or places[0] is None or places[1] is None:
        return None
    return omega_of(one, two, (places[0][:, None], places[1][:, None]))[1]


def noise_floor(one: Gains, two: Gains, num_splits: int = 1000, seed: int = 0) -> float:
    """Return what omega of two rows of one target would be by chance: sd over random halvings of
    the prompts / 2.

    On one category omega is 0 by its formula, so the held-out clusters are halved at random, the
    one half playing the target of the first row, the other that of the second. A half has twice the
    variance of all prompts, and the two halves differ by twice as much again: hence the 2. Whether
    the rows differ is for `difference` to say.
    """
    cells = [gains.cell(one.target, gains.last) for gains in (one, two)]
    member = np.eye(int(cells[0].clusters.max()) + 1)[cells[0].clusters].T  # [clusters, docs]
    tokens = member @ cells[0].tokens
    moved = [member @ cell.change.mean(axis=0)[:, 0] for cell in cells]
    generator = np.random.default_rng(seed)
    order = generator.permuted(np.tile(np.arange(len(tokens)), (num_splits, 1)), axis=1)
    first = order < len(tokens) // 2  # [splits, clusters]
    halves = (first.astype(np.float64), (~first).astype(np.float64))
    (t_ii, t_ij), (t_ji, t_jj) = (
        [divide(half @ own, half @ tokens) for half in halves] for own in moved
    )
    return float(np.nanstd(omega(t_ii, t_ij, t_ji, t_jj)) / 2)
