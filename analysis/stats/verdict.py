"""The verdict on each category: how much it moved, when, in which part, and one sentence."""

import math

import numpy as np
import pandas as pd
from scipy import stats

from sft_probe.analysis.stats.changes import PER_RESPONSE
from sft_probe.analysis.stats.curves import half_bracket, half_step
from sft_probe.analysis.stats.intervals import MAX_CLUSTER_SHARE, MIN_CLUSTERS, Bools, holm
from sft_probe.analysis.stats.measures import PARTS

ALPHA = 0.05
_TURN_SHARE = 0.1  # of the range of a curve without intervals: what counts as a turn
_BY = {
    "optimizer step": "by step",
    "training examples": "by example",
    "evaluation": "by evaluation",
    "epoch": "by epoch",
}
COLUMNS = [
    "run",
    "split",
    "category",
    "num_docs",
    "num_clusters",
    "first_step",
    "last_step",
    "start",
    "change",
    "low",
    "high",
    "stderr",
    "effective_clusters",
    "largest_cluster",
    "sign",
    "p_holm",
    "body",
    "peak",
    "peak_step",
    "half_step",
    *(f"share_{part}{end}" for part in PARTS for end in ("", "_low", "_high")),
    "rank",
    "moved",
    "measure",
    "sentence",
]


def verdict_table(changes: pd.DataFrame, measure: str = "logprob") -> pd.DataFrame:
    """Return one row per run, split and category, from `change_table`; nats per response.

    `change` is that of the last step with its 95 % interval over prompts; `sign` is +, - or 0 by a
    t-test of the last step, adjusted by Holm over the categories of a run and split (`p_holm`).
    `peak` is the turn that the sentence tells of, else the largest change by size; `half_step` the
    step at which the curve, linear between steps, first reaches half of the last change (only where
    that has a sign). Shares are those of first token, body and terminator in the change of all
    three with their intervals; null where the interval of that holds 0. `rank` 1 rose most; `moved`
    says whether the last change is certain. A sentence tells of a turn where the bands of the
    change up to it and from it exclude 0.
    """
    rows = []
    for (run, split), part in changes[changes["unit"] == PER_RESPONSE].groupby(
        ["run", "split"], sort=False
    ):
        own = part[part["measure"] == measure]
        curves = {
            str(name): curve.sort_values("step")
            for name, curve in own.groupby("category", sort=False)
        }
        adjusted = holm([float(curve["p_value"].iloc[-1]) for curve in curves.values()])
        last = [-curve["change"].iloc[-1] for curve in curves.values()]
        ranks = dict(zip(curves, stats.rankdata(last, nan_policy="omit"), strict=True))
        for (name, curve), p_holm in zip(curves.items(), adjusted, strict=True):
            row = _row(curve, float(p_holm), part[part["category"] == name])
            rows.append({"run": run, "split": split, "category": name, "rank": ranks[name], **row})
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(curve: pd.DataFrame, p_holm: float, parts: pd.DataFrame) -> dict[str, object]:
    last = curve.iloc[-1]
    known = not math.isnan(last["stderr"])
    sign = "?" if not known else "0" if not p_holm < ALPHA else "+" if last["change"] > 0 else "-"
    turn = _turn(curve) if known or curve["change"].notna().all() else None
    sizes = curve["change"].abs().fillna(0.0).to_numpy()
    peak = curve.iloc[int(sizes.argmax()) if turn is None else turn]
    return {
        "num_docs": int(last["num_docs"]),
        "num_clusters": int(last["num_clusters"]),
        "first_step": int(curve["step"].iloc[0]),
        "last_step": int(last["step"]),
        "start": float(curve["level"].iloc[0]),
        "change": float(last["change"]),
        "low": float(last["low"]),
        "high": float(last["high"]),
        "stderr": float(last["stderr"]),
        "effective_clusters": float(last["effective_clusters"]),
        "largest_cluster": float(last["largest_cluster"]),
        "sign": sign,
        "p_holm": p_holm,
        "peak": float(peak["change"]),
        "peak_step": int(peak["step"]),
        "half_step": half_step(curve["step"], curve["change"]) if sign != "0" else math.nan,
        **_shares(parts, int(last["step"])),
        "moved": has_moved(curve, sign),
        "measure": str(curve["measure"].iloc[0]),
        "sentence": sentence(curve, sign),
    }


def _shares(parts: pd.DataFrame, step: int) -> dict[str, float]:
    last = parts[parts["step"] == step].set_index("measure")
    ends = ("", "_low", "_high")
    shares = {
        f"share_{name}{end}": float(last[f"share{end}"].get(name, math.nan))
        for name in PARTS
        for end in ends
    }
    return {**shares, "body": float(last["change"].get("body", math.nan))}


def share_text(row: pd.Series, part: str) -> str:
    """Return a share in percent with the half width of its 95 % interval, the wider one, or -.

    Args:
        row: of the verdict.
        part: one of `PARTS`.
    """
    share, low, high = (row[f"share_{part}{end}"] for end in ("", "_low", "_high"))
    return (
        "-" if math.isnan(low) else f"{100 * share:z.0f}±{100 * max(high - share, share - low):.0f}"
    )


def sentence(curve: pd.DataFrame, sign: str) -> str:
    """Return what the curve of one category did, in one sentence that says what its interval holds
    for.

    `sign` is that of the last change, as in `verdict_table`; where it is ?, a tenth of the curve's
    range counts as moved.
    """
    name = str(curve["category"].iloc[0])
    curve = curve[curve["change"].notna()]
    if len(curve) < 2:
        return f"{name} was scored at one step only"
    x, y = curve["step"].to_numpy(), curve["change"].to_numpy(float)
    by = _BY[curve["step_unit"].iloc[0]]
    scope = "intervals over prompts; one run"
    if curve["stderr"].isna().all():
        scope = "too few prompts for an interval" if curve["num_docs"].any() else "means only"
    certain = has_moved(curve, sign)
    turn = _turn(curve)
    if turn is not None:
        verb, back = ("rose", "fell") if y[turn] > 0 else ("fell", "rose")
        where = _place(y[-1], turned=y[turn], certain=certain)
        return (
            f"{name} {verb} {abs(y[turn]):.1f} nats {by} {x[turn]}, then {back} to {where}; {scope}"
        )
    if not certain:
        return f"{name} did not change clearly ({y[-1]:+z.1f} nats {by} {x[-1]}); {scope}"
    _, half = half_bracket(x.tolist(), y.tolist())
    moved = f"{name} {'rose' if y[-1] > 0 else 'fell'} {abs(y[-1]):.1f} nats {by} {x[-1]}"
    return f"{moved}, half of it {by} {half:.0f}; {scope}"


def cluster_warnings(rows: pd.DataFrame) -> list[str]:
    """Return for which categories the intervals may cover less than 95 %.

    Args:
        rows: `category effective_clusters largest_cluster` of one split.
    """
    found = []
    few = rows[rows["effective_clusters"] < MIN_CLUSTERS]
    if len(few):
        names = ", ".join(
            f"{row['category']} ({row['effective_clusters']:.1f})" for _, row in few.iterrows()
        )
        found.append(
            f"under {MIN_CLUSTERS} effective clusters: {names}: intervals may cover less than 95 "
            "%, without a band"
        )
    uneven = rows[
        (rows["effective_clusters"] >= MIN_CLUSTERS) & (rows["largest_cluster"] > MAX_CLUSTER_SHARE)
    ]
    if len(uneven):
        names = ", ".join(
            f"{row['category']} ({row['largest_cluster']:.0%})" for _, row in uneven.iterrows()
        )
        found.append(
            f"one cluster holds over {MAX_CLUSTER_SHARE:.0%} of the docs: {names}: intervals may "
            "cover less"
        )
    return found


def has_moved(curve: pd.DataFrame, sign: str) -> bool:
    """Return whether the last change is certain: by its sign, or for means without any error by
    their size."""
    return sign in "+-" or (sign == "?" and bool(_is_certain(curve, "band_low", "band_high")[-1]))


def _place(last: float, *, turned: float, certain: bool) -> str:
    if not certain:
        return f"about its start ({last:+z.1f})"
    side = "above" if last > 0 else "below"
    return f"{abs(last):.1f} {side} its start" if last * turned < 0 else f"{last:+z.1f}"


def _is_certain(curve: pd.DataFrame, low: str, high: str) -> Bools:
    """Return whether the band of each step excludes 0; for means without any error, whether a
    change is a tenth of the range.

    Where errors are known and bands are not, nothing is certain.
    """
    if curve["stderr"].isna().all():
        change = curve["change"].to_numpy(float)
        size = np.abs(change if low == "band_low" else change[-1] - change)
        return np.asarray((size > 0) & (size >= _TURN_SHARE * np.ptp(change)))
    return np.asarray(curve[low] * curve[high] > 0)


def _turn(curve: pd.DataFrame) -> int | None:
    """Return the index of a peak or trough between the ends, certain in itself, from which the
    curve certainly went back.

    Of two, the one that is further from the last step.
    """
    y = curve["change"].to_numpy(float)
    certain = _is_certain(curve, "band_low", "band_high") & _is_certain(
        curve, "rest_low", "rest_high"
    )
    found = [
        (abs(y[index] - y[-1]), index)
        for index, sign in ((int(np.nanargmax(y)), 1), (int(np.nanargmin(y)), -1))
        if 0 < index < len(y) - 1 and sign * y[index] > 0 and certain[index]
    ]
    return max(found)[1] if found else None
