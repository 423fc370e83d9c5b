"""Charts of the tidy change table: changes, levels, and the parts of changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sft_probe.analysis.figures.figure import (
    MAX_MARKED_STEPS,
    PART_COLORS,
    Keys,
    Style,
    category_keys,
    colors_of,
    key_colors,
    panel_width,
    small_multiples,
    step_axis,
    ticks,
    zero_rule,
)
from sft_probe.analysis.stats.changes import PER_RESPONSE

CHANGE_TITLE = "change of log p (nats per response)"
PANEL_TITLE = "nats per response"
_PARTS = {"first": "first token", "body": "body", "eos": "terminator"}


def curves_of(changes: pd.DataFrame, measure: str, split: str, style: Style) -> pd.DataFrame:
    """Return what a figure of changes draws: one measure per response of one split, with `label`
    and bands of levels, which end at log p = 0."""
    table = changes[(changes["split"] == split) & (changes["unit"] == PER_RESPONSE)]
    table = table[table["measure"] == measure].copy()
    table["label"] = [style.label(str(name)) for name in table["category"]]
    start = table["level"] - table["change"]
    table["level_low"] = np.minimum(start + table["band_low"], 0.0)
    table["level_high"] = np.minimum(start + table["band_high"], 0.0)
    return table.reset_index(drop=True)


def changes_chart(
    table: pd.DataFrame,
    categories: Sequence[str],
    marks: pd.DataFrame,
    style: Style,
    width: float,
) -> Any:
    """Return all categories on one log-step axis, in a panel for each run.

    Args:
        table: from `curves_of`.
        categories: in their order.
        marks: `step what`, drawn as vertical rules.
        style: how it looks.
        width: width of the content.
    """
    keys = category_keys(categories, style)
    panels = list(dict.fromkeys(table["run"]))
    most = style.num_ticks(panels=len(panels) > 1)
    if table["step_unit"].nunique() > 1:
        return _own_axes(table, keys, panels, style, width)
    layers = _curves(table, keys, value="change", title=CHANGE_TITLE, marks=marks, most=most)
    if len(panels) == 1:
        return layers.properties(width=width - 5 * style.font_size, height=0.5 * min(width, 600))
    return small_multiples(layers, panels, style, width, column="run", ratio=1)


def _own_axes(
    table: pd.DataFrame, keys: Keys, runs: Sequence[str], style: Style, width: float
) -> Any:
    """Return a panel for each run with a step axis of its own, since steps count different
    things."""
    columns = min(len(runs), 3 if style.width >= 400 else 2)
    cell = panel_width(width, columns, style)
    most = style.num_ticks(panels=True)
    charts = [
        _curves(
            table[table["run"] == run], keys, value="change", title=CHANGE_TITLE, most=most
        ).properties(
            width=cell,
            height=min(cell, 300.0),
            title=alt.Title(run, anchor="start", fontSize=style.font_size),
        )
        for run in runs
    ]
    return alt.concat(*charts, columns=columns).resolve_scale(y="shared")


def levels_chart(table: pd.DataFrame, categories: Sequence[str], style: Style, width: float) -> Any:
    """Return a panel of levels for each category; bands are those of the paired change."""
    keys = category_keys(categories, style, legend=False)
    layers = _curves(
        table, keys, value="level", title=PANEL_TITLE, most=style.num_ticks(panels=True)
    )
    return small_multiples(layers, list(keys.colors), style, width, own_scale=True)


def differences_chart(
    table: pd.DataFrame, categories: Sequence[str], style: Style, width: float
) -> Any:
    """Return a panel of differences between two runs for each category, on one scale."""
    keys = category_keys(categories, style, legend=False)
    most = style.num_ticks(panels=True)
    layers = _curves(table, keys, value="change", title=PANEL_TITLE, most=most)
    return small_multiples(layers, list(keys.colors), style, width)


def runs_chart(table: pd.DataFrame, categories: Sequence[str], style: Style, width: float) -> Any:
    """Return a panel for each category with a line per run, told apart by `style.color`."""
    names = list(dict.fromkeys(table[style.color].astype(str)))
    colors = colors_of(names) if style.color == "train_category" else key_colors(names)
    title = style.color.replace("_", " ")
    keys = Keys(column=style.color, colors=colors, style=style, title=title)
    layers = _curves(
        table, keys, value="change", title=PANEL_TITLE, most=style.num_ticks(panels=True)
    )
    labels = [style.label(name) for name in categories]
    return small_multiples(layers, labels, style, width, own_scale=True)


def _curves(
    table: pd.DataFrame,
    keys: Keys,
    *,
    value: str,
    title: str,
    most: int,
    marks: pd.DataFrame | None = None,
) -> Any:
    """Return bands, lines and markers of curves, with a rule at 0 for changes.

    Args:
        table: from `curves_of`.
        keys: what tells the lines apart.
        value: `change` or `level`.
        title: title of the y axis.
        marks: `step what`, drawn as vertical rules. most: most steps that are named on the axis.
    """
    low, high = ("band_low", "band_high") if value == "change" else ("level_low", "level_high")
    steps = table["step"].tolist()
    scale = alt.Scale(zero=value == "change")
    x = step_axis(steps, f"{table['step_unit'].iloc[0]} (log)", most)
    base = alt.Chart(table).encode(x=x, color=keys.color, detail="run:N")
    y = alt.Y(f"{value}:Q", scale=scale, title=title)
    line = base.mark_line(strokeWidth=1.6).encode(y=y, strokeDash=keys.dash)
    numbers = [alt.Tooltip(f"{name}:Q", format=".3f") for name in (value, low, high)]
    points = base.mark_point(filled=True, size=34, opacity=1).encode(
        y=y, shape=keys.shape, tooltip=["run:N", "category:N", "step:Q", *numbers]
    )
    if table["step"].nunique() > MAX_MARKED_STEPS:
        points = points.transform_filter(alt.FieldOneOfPredicate("step", ticks(steps)))
    layers = [line, points]
    if table[low].notna().any():
        opacity = 0.15 if table["label"].nunique() <= 8 else 0.05
        bounds = alt.Y(f"{low}:Q", scale=scale, title=title)
        layers.insert(0, base.mark_area(opacity=opacity).encode(y=bounds, y2=f"{high}:Q"))
    if value == "change":
        layers.insert(0, zero_rule(table))
    if marks is not None and len(marks):
        rule = alt.Chart(marks).mark_rule(color="#bbb", strokeDash=[1, 2])
        layers.insert(0, rule.encode(x="step:Q", tooltip=["what:N", "step:Q"]))
    return alt.layer(*layers, data=table)


def parts_of(changes: pd.DataFrame, split: str, style: Style) -> pd.DataFrame:
    """Return the change of first token, body and terminator at up to 8 steps of one run."""
    table = changes[(changes["split"] == split) & (changes["unit"] == PER_RESPONSE)]
    table = table[table["measure"].isin(_PARTS) & (table["step"] > table["step"].min())]
    table = table[table["step"].isin(ticks(table["step"].tolist()))] if len(table) else table
    part, part_order = table["measure"].map(_PARTS), table["measure"].map(list(_PARTS).index)
    label = [style.label(str(name)) for name in table["category"]]
    columns = ["run", "category", "label", "step", "part", "part_order", "change", "stderr"]
    return pd.DataFrame(
        table.assign(part=part, part_order=part_order, label=label), columns=columns
    )


def parts_chart(
    table: pd.DataFrame,
    categories: Sequence[str],
    style: Style,
    width: float,
    colors: Mapping[str, str] = PART_COLORS,
) -> Any:
    """Return stacked bars of the parts of a change for each category; the dot is their sum.

    Args:
        table: `category label step part part_order change`, a row for each part.
        categories: in their order.
        style: how it looks.
        width: width of the content.
        colors: part to colour, in the order of the stack.
    """
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    x = alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0))
    base = alt.Chart(table).encode(x=x)
    bars = base.mark_bar().encode(
        y=alt.Y("change:Q", stack="zero", title=PANEL_TITLE),
        color=alt.Color("part:N", scale=scale, sort=None, legend=alt.Legend(title=None)),
        order=alt.Order("part_order:Q"),
        tooltip=["category:N", "step:O", "part:N", alt.Tooltip("change:Q", format=".2f")],
    )
    total = base.mark_point(filled=True, size=26, color="#D00000", opacity=1).encode(
        y="sum(change):Q"
    )
    layers = alt.layer(bars, zero_rule(table), total, data=table)
    return small_multiples(layers, [style.label(name) for name in categories], style, width)
