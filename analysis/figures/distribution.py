"""Figures of what a model's distributions do: argmax mass beside the log-prob of every category,
the distance from a reference by position, and what is forgotten at that distance."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import (
    Figure,
    Style,
    key_colors,
    legend_columns,
    small_multiples,
    step_axis,
    ticks,
    zero_rule,
)
from sft_probe.analysis.stats.measures import POSITIONS, at_position
from sft_probe.analysis.stats.runs import SPLIT_NAMES

_POSITIONS = dict(zip(POSITIONS, ("1", "2-4", "5-16", "17-64", "65+"), strict=True))
DISTANCES = {
    "kl": ("kl_forward", "KL(reference || model) by position", "nats per token"),
    "shift": ("shifted", "Shifted places by position", "share of tokens"),
}
"""Figures of the distance from a reference: measure, title and unit."""
_MAX_STEPS = 5
_MAX_PANELS = 12
_CHANGED = {"lost": "1 → 0", "gained": "0 → 1"}
_LINES = {"response": "#0072B2", "most likely tokens": "#D55E00"}


def squeezing_figure(
    curves: pd.DataFrame, distribution: pd.DataFrame, split: str, style: Style
) -> Iterator[Figure]:
    """Yield the figure of argmax mass beside the log-prob of each category; nothing without the
    columns.

    Args:
        curves: from `curves_of`.
        distribution: from `distribution_table`.
        split: which prompts.
        style: how it looks.
    """
    if distribution.empty:
        return
    own = distribution[(distribution["split"] == split) & (distribution["measure"] == "argmax")]
    parts = zip(_LINES, (curves, own), strict=True)
    table = pd.concat([part.assign(line=line) for line, part in parts], ignore_index=True)
    table["label"] = [style.label(str(name)) for name in table["category"]]
    columns = ["run", "category", "label", "step", "step_unit", "line", "level", "change"]
    table = table[[*columns, "low", "high", "band_low", "band_high"]]
    yield Figure(
        name=f"squeezing_{split}",
        title=f"Argmax mass beside every category, {SPLIT_NAMES[split]}",
        subtitle=[
            "Change of the summed log p of the response, and of the most likely token at each of "
            "its places",
            "Squeezing: the second rises while the first falls. Bands: 95 % for all categories and "
            "steps of a line at once; one run",
        ],
        table=table,
        build=partial(_squeezing_chart, table, style),
    )


def _squeezing_chart(table: pd.DataFrame, style: Style, width: float) -> Any:
    scale = alt.Scale(domain=list(_LINES), range=list(_LINES.values()))
    dashes = alt.Scale(domain=list(_LINES), range=[[1, 0], [5, 3]])
    legend = alt.Legend(title=None, columns=2, symbolType="stroke", symbolOpacity=1)
    x = step_axis(
        table["step"].tolist(),
        f"{table['step_unit'].iloc[0]} (log)",
        style.num_ticks(panels=True),
    )
    base = alt.Chart(table).encode(x=x, color=alt.Color("line:N", scale=scale, legend=legend))
    y = alt.Y("change:Q", title="nats per response")
    band = base.mark_area(opacity=0.15).encode(y="band_low:Q", y2="band_high:Q")
    line = base.mark_line(strokeWidth=1.6, point=True).encode(
        y=y,
        strokeDash=alt.StrokeDash("line:N", scale=dashes, legend=legend),
        tooltip=["category:N", "line:N", "step:Q", alt.Tooltip("change:Q", format=".2f")],
    )
    layers = alt.layer(zero_rule(table), band, line, data=table)
    return small_multiples(layers, list(dict.fromkeys(table["label"])), style, width)


def distance_figure(
    name: str, distribution: pd.DataFrame, reference: str, split: str, style: Style
) -> Iterator[Figure]:
    """Yield a figure of the distance from a reference by position of the token; nothing without
    one.

    Args:
        name: one of `DISTANCES`.
        distribution: from `distribution_table`.
        reference: its name.
        split: which prompts.
        style: how it looks.
    """
    measure, title, unit = DISTANCES[name]
    names = {at_position(measure, part): text for part, text in _POSITIONS.items()}
    if distribution.empty or not distribution["measure"].isin(names).any():
        return
    is_own = (distribution["split"] == split) & distribution["measure"].isin(names)
    table = distribution[is_own & (distribution["num_clusters"] > 1)]
    table = table[table["step"].isin(ticks(table["step"].tolist(), _MAX_STEPS))].copy()
    table["position"] = table["measure"].map(names)
    table["label"] = [style.label(str(category)) for category in table["category"]]
    start = table["level"] - table["change"]
    for end in ("low", "high"):
        table[f"level_{end}"] = (start + table[end]).clip(lower=0)
    columns = ["run", "category", "label", "step", "position", "level", "level_low"]
    table = table[[*columns, "level_high", "num_docs"]].reset_index(drop=True)
    yield Figure(
        name=f"{name}_{split}",
        title=f"{title}, {SPLIT_NAMES[split]}",
        subtitle=[
            f"Reference: {reference}; positions count the tokens of the response",
            "Shifted: the most likely token is none of the reference's first three",
            "Bars: 95 % intervals of the change from the first step, each alone; one run",
        ],
        table=table,
        build=partial(_position_chart, table, unit, style),
    )


def _position_chart(table: pd.DataFrame, unit: str, style: Style, width: float) -> Any:
    steps = sorted(table["step"].unique().tolist())
    scale = alt.Scale(scheme="viridis", domain=steps, reverse=True)
    legend = alt.Legend(title="step", columns=len(steps), symbolOpacity=1)
    axis = alt.Axis(labelAngle=0)
    x = alt.X("position:O", sort=list(_POSITIONS.values()), title="token", axis=axis)
    base = alt.Chart(table).encode(x=x, color=alt.Color("step:O", scale=scale, legend=legend))
    ends = base.mark_rule(strokeWidth=1.5).encode(y="level_low:Q", y2="level_high:Q")
    numbers = [alt.Tooltip(f"level{end}:Q", format=".4f") for end in ("", "_low", "_high")]
    line = base.mark_line(strokeWidth=1.6, point=True).encode(
        y=alt.Y("level:Q", title=unit), tooltip=["category:N", "step:O", "position:O", *numbers]
    )
    layers = alt.layer(ends, line, data=table)
    return small_multiples(layers, list(dict.fromkeys(table["label"])), style, width)


def forgetting_figure(items: pd.DataFrame, style: Style) -> Iterator[Figure]:
    """Yield the figure of what is forgotten against the distance from the reference; nothing
    without both.

    Args:
        items: from `item_table`, of some runs.
        style: how it looks.
    """
    if items.empty:
        return
    table = items[items["measure"].isin(_CHANGED) & items["kl"].notna()].reset_index(drop=True)
    if table.empty:
        return
    table["line"] = table["measure"].map(_CHANGED)
    table["name"] = table["task"] + ", " + table["metric"]
    moved = table.groupby("name")["change"].apply(lambda change: change.abs().max())
    names = moved.sort_values(ascending=False).index[:_MAX_PANELS].tolist()
    more = [f"The {_MAX_PANELS} that moved most; {len(moved) - _MAX_PANELS} more are in the CSV"]
    yield Figure(
        name="forgetting",
        title="Forgetting against the distance from the reference",
        subtitle=[
            "Share of items that were right at the first step and are wrong now (1 → 0), and the "
            "reverse; 95 % intervals over items",
            "Points of a line are steps of one run, and not independent",
            *(more if len(moved) > _MAX_PANELS else []),
        ],
        table=table,
        build=partial(_forgetting_chart, table, names, style),
    )


def _forgetting_chart(table: pd.DataFrame, names: list[str], style: Style, width: float) -> Any:
    shown = table[table["name"].isin(names)]
    column = "run" if shown["run"].nunique() > 1 else "line"
    lines = list(dict.fromkeys(shown[column]))
    colors = key_colors(lines)
    scale = alt.Scale(domain=lines, range=[colors[line] for line in lines])
    legend = alt.Legend(title=None, columns=legend_columns(lines, style), symbolType="stroke")
    dashes = alt.Scale(domain=list(_CHANGED.values()), range=[[1, 0], [5, 3]])
    x = alt.X("kl:Q", title="KL(reference || model), nats per token", axis=alt.Axis(tickCount=4))
    base = alt.Chart(shown).encode(x=x, color=alt.Color(f"{column}:N", scale=scale, legend=legend))
    ends = base.mark_rule().encode(y="low:Q", y2="high:Q")
    line = base.mark_line(point=True, strokeWidth=1.2).encode(
        y=alt.Y("change:Q", title="share of items"),
        order="step:Q",
        strokeDash=alt.StrokeDash("line:N", scale=dashes, legend=legend),
        tooltip=["run:N", "name:N", "line:N", "step:Q", "kl:Q", "change:Q"],
    )
    layers = alt.layer(zero_rule(shown), ends, line, data=shown)
    return small_multiples(layers, names, style, width, column="name")
