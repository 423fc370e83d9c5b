"""Where a curve, linear between its points, reaches a level."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.intervals import Floats


def crossing(curve: Floats, level: float) -> Floats | None:
    """Return weights over the points of `curve`, linear between them, that give where it first
    reaches `level`.

    `None` where it stays below.
    """
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return None
    weights = np.zeros(len(curve))
    after = int(above[0])
    if after == 0:
        weights[0] = 1.0
        return weights
    share = (level - curve[after - 1]) / (curve[after] - curve[after - 1])
    weights[after], weights[after - 1] = share, 1 - share
    return weights


def matched_gain(last_gains: Sequence[float]) -> float:
    """Return the gain at which runs are compared: half of the least last one; NaN where that is not
    above 0.

    It is fixed before any comparison, so that every run has passed it and none is compared at its
    noisy end.
    """
    least = min((gain for gain in last_gains if not math.isnan(gain)), default=math.nan)
    return least / 2 if least > 0 else math.nan


def half_step(steps: Sequence[float] | pd.Series, changes: Sequence[float] | pd.Series) -> float:
    """Return where a curve, linear between its points, first reaches half of its last value; NaN
    where that is 0."""
    x, y = np.asarray(steps, dtype=float), np.asarray(changes, dtype=float)
    if math.isnan(y[-1]) or y[-1] == 0:
        return math.nan
    weights = crossing(y / y[-1], 0.5)
    return math.nan if weights is None else float(weights @ x)


def half_bracket(
    steps: Sequence[float] | pd.Series, changes: Sequence[float] | pd.Series
) -> tuple[float, float]:
    """Return the two neighbouring points between which a curve first reaches half of its last
    value.

    Both are the first point where the curve starts there, and NaN where the last value is 0 or NaN.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(changes, dtype=float)
    if math.isnan(y[-1]) or y[-1] == 0:
        return math.nan, math.nan
    reached = int(np.flatnonzero(y / y[-1] >= 0.5)[0])
    return float(x[max(reached - 1, 0)]), float(x[reached])
