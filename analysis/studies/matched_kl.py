"""How far runs have moved where they have gained the same: forward KL from the reference at matched
gain, from score rows."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.curves import matched_gain
from sft_probe.analysis.stats.runs import Recording

_PLACES = ("before", "at")
_CURVE = ["kl_step", "kl_gain", "kl"]


def at_matched_gain(
    recordings: Sequence[Recording], gains: Sequence[pd.DataFrame | None]
) -> pd.DataFrame:
    """Return the KL of each run at the two steps between which its own target reaches the matched
    gain; no columns where no run was swept with `--reference`.

    The matched gain is half of the least last gain of the runs. Nothing is interpolated: the curve
    between two steps is not known. Columns: `matched_gain kl_category`, and `kl_step kl_gain kl`
    each with `_before` and `_at`; both are the first step where the gain is there from the start,
    NaN where there is no matched gain. KL(reference || model) is in nats per token of the held-out
    `chosen` responses (arXiv 2509.04259), or of the first category.

    Args:
        recordings: the runs.
        gains: `step gain` of each, nats per body token; `None` where it is not known.
    """
    if not any("kl_forward" in recording.rows for recording in recordings):
        return pd.DataFrame()
    last = [math.nan if gain is None else float(gain["gain"].iloc[-1]) for gain in gains]
    matched = matched_gain(last)
    rows = []
    for recording, gain in zip(recordings, gains, strict=True):
        names = recording.categories("heldout")
        category = "chosen" if "chosen" in names else next(iter(names), "")
        curve = _curve(recording, category, gain)
        reached = np.flatnonzero(curve["kl_gain"] >= matched)
        row: dict[str, object] = {"matched_gain": matched, "kl_category": category}
        for back, place in zip((1, 0), _PLACES, strict=True):
            empty = pd.Series(dtype=float)
            found = curve.iloc[max(int(reached[0]) - back, 0)] if len(reached) else empty
            row |= {f"{name}_{place}": found.get(name, math.nan) for name in _CURVE}
        rows.append(row)
    return pd.DataFrame(rows)


def _curve(recording: Recording, category: str, gain: pd.DataFrame | None) -> pd.DataFrame:
    """Return `kl_step kl_gain kl` of the steps where both are known."""
    if gain is None or "kl_forward" not in recording.rows:
        return pd.DataFrame(columns=_CURVE)
    rows = recording.rows
    own = rows[(rows["split"] == "heldout") & (rows["category"] == category)]
    sums = own.dropna(subset="kl_forward").groupby("step")[["kl_forward", "num_tokens"]].sum()
    kl = (sums["kl_forward"] / sums["num_tokens"]).rename("kl")
    both = pd.concat([gain.set_index("step")["gain"].rename("kl_gain"), kl], axis=1).dropna()
    return both.rename_axis("kl_step").reset_index()[_CURVE]


def kl_text(runs: pd.DataFrame) -> list[str]:
    """Return what `sft-probe simplicity` prints of the KL, a line per run."""
    lines = []
    for _, row in runs.iterrows():
        head = (
            f"forward KL of {row['run']} from its reference, nats per token of held-out "
            f"{row['kl_category']} responses"
        )
        if math.isnan(row["kl_at"]):
            lines.append(
                f"{head}: no matched gain (a run's own target did not gain, or a step has no KL)"
            )
            continue
        before = (
            f"{row['kl_before']:.4f} at step {row['kl_step_before']:.0f} (gain "
            f"{row['kl_gain_before']:.4f}), "
        )
        lines.append(
            f"{head}: "
            f"{before if row['kl_step_before'] < row['kl_step_at'] else ''}{row['kl_at']:.4f} at "
            f"step {row['kl_step_at']:.0f} (gain {row['kl_gain_at']:.4f}); matched gain "
            f"{row['matched_gain']:.4f}, half of the least last gain of the runs"
        )
    return lines
