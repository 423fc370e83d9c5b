"""Charts of the tidy change table: changes, levels, and the parts of changes."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import (
    PART_COLORS,
    Style,
    category_color,
    category_shape,
    cell_height,
    cell_width,
    colors_of,
    columns_for,
    facet,
    key_colors,
    legend_columns,
    step_axis,
    ticks,
)
from sft_probe.analysis.stats.changes import PER_RESPONSE

CHANGE_TITLE = "change of log p (nats per response)"
PANEL_TITLE = "nats per response"
_PARTS = {"first": "first token", "body": "body", "eos": "terminator"}


def curves_of(changes: pd.DataFrame, measure: str, split: str, style: Style) -> pd.DataFrame:
    """What a figure of changes draws: one measure per response of one split, with `label` and level
    bands."""
    table = changes[(changes["split"] == split) & (changes["unit"] == PER_RESPONSE)]
    shown = measure if (table["measure"] == measure).any() else "logprob_with_eos"
    table = table[table["measure"] == shown].copy()
    table["label"] = [style.label(str(name)) for name in table["category"]]
    start = table["level"] - table["change"]
    table["level_low"], table["level_high"] = start + table["band_low"], start + table["band_high"]
    return table.reset_index(drop=True)


def changes_chart(
    table: pd.DataFrame, categories: Sequence[str], marks: pd.DataFrame, style: Style, width: float
) -> Any:
    """All categories on one log-step axis; `marks` are `step what`, drawn as vertical rules."""
    color, shape = category_color(categories, style), category_shape(categories, style)
    panels = list(dict.fromkeys(table["run"]))
    layers = _layers(
        table,
        marks,
        color,
        shape,
        y="change",
        low="band_low",
        high="band_high",
        y_title=CHANGE_TITLE,
    )
    if len(panels) == 1:
        return layers.properties(width=width - 5 * style.font_size, height=0.5 * min(width, 600))
    columns = columns_for(len(panels), style)
    cell = cell_width(width, columns, style)
    return facet(
        layers.properties(width=cell, height=cell),
        panels,
        style,
        columns,
        column="run",
        own_scale=False,
    )


def levels_chart(table: pd.DataFrame, categories: Sequence[str], style: Style, width: float) -> Any:
    """Small multiples of the levels, as the forerunner drew them; bands are those of the paired
    change."""
    columns = columns_for(len(categories), style)
    cell = cell_width(width, columns, style)
    layers = _layers(
        table,
        pd.DataFrame(),
        category_color(categories, style, legend=False),
        alt.value("circle"),
        y="level",
        low="level_low",
        high="level_high",
        y_title=PANEL_TITLE,
    )
    names = [style.label(name) for name in categories]
    return facet(
        layers.properties(width=cell, height=cell_height(cell, style)), names, style, columns
    )


def runs_chart(table: pd.DataFrame, categories: Sequence[str], style: Style, width: float) -> Any:
    """Small multiples by category, a line per run, coloured by what tells runs apart."""
    keys = list(dict.fromkeys(table[style.color].astype(str)))
    colors = list(colors_of(keys).values()) if style.color == "train_category" else key_colors(keys)
    color = alt.Color(
        f"{style.color}:N",
        scale=alt.Scale(domain=keys, range=colors),
        sort=None,
        legend=alt.Legend(
            title=style.color.replace("_", " "),
            columns=legend_columns(keys, style),
            symbolOpacity=1,
        ),
    )
    columns = columns_for(len(categories), style)
    cell = cell_width(width, columns, style)
    layers = _layers(
        table,
        pd.DataFrame(),
        color,
        alt.value("circle"),
        y="change",
        low="band_low",
        high="band_high",
        y_title=PANEL_TITLE,
    )
    names = [style.label(name) for name in categories]
    return facet(
        layers.properties(width=cell, height=cell_height(cell, style)), names, style, columns
    )


def _layers(
    table: pd.DataFrame,
    marks: pd.DataFrame,
    color: Any,
    shape: Any,
    *,
    y: str,
    low: str,
    high: str,
    y_title: str,
) -> Any:
    """Band, line and points of curves, with a rule at 0 for changes."""
    unit = str(table["step_unit"].iloc[0])
    x = step_axis(table["step"].tolist(), f"{unit} (log)")
    scale = alt.Scale(zero=y == "change")
    base = alt.Chart(table).encode(x=x, color=color, detail="run:N")
    opacity = 0.15 if table["label"].nunique() <= 8 else 0.05
    band = base.mark_area(opacity=opacity).encode(
        y=alt.Y(f"{low}:Q", scale=scale, title=y_title), y2=f"{high}:Q"
    )
    line = base.mark_line(strokeWidth=1.6).encode(y=alt.Y(f"{y}:Q", scale=scale, title=y_title))
    tooltip = [
        "run:N",
        "category:N",
        "step:Q",
        *(alt.Tooltip(f"{name}:Q", format=".3f") for name in (y, low, high)),
    ]
    size = 34 if table["step"].nunique() <= 24 else 8
    points = base.mark_point(filled=True, size=size, opacity=1).encode(
        y=f"{y}:Q", shape=shape, tooltip=tooltip
    )
    layers = [band, line, points]
    if y == "change":
        layers.insert(0, table_rule(table))
    if len(marks):
        layers.insert(0, _marks(marks))
    return alt.layer(*layers, data=table)


def table_rule(table: pd.DataFrame) -> Any:
    """A rule at no change that facets can repeat: it draws from the same data."""
    return alt.Chart(table).mark_rule(color="#888", strokeDash=[4, 3]).encode(y=alt.datum(0))


def _marks(marks: pd.DataFrame) -> Any:
    rule = alt.Chart(marks).mark_rule(color="#bbb", strokeDash=[1, 2])
    return rule.encode(x=alt.X("step:Q"), tooltip=["what:N", "step:Q"])


def parts_of(changes: pd.DataFrame, split: str, style: Style) -> pd.DataFrame:
    """The change of first token, body and terminator at up to 8 steps of one run."""
    table = changes[(changes["split"] == split) & (changes["unit"] == PER_RESPONSE)]
    table = table[table["measure"].isin(_PARTS) & (table["step"] > table["step"].min())]
    table = table[table["step"].isin(ticks(table["step"].tolist()))] if len(table) else table
    part, part_order = table["measure"].map(_PARTS), table["measure"].map(list(_PARTS).index)
    label = [style.label(str(name)) for name in table["category"]]
    columns = ["run", "category", "label", "step", "part", "part_order", "change", "stderr"]
    return pd.DataFrame(
        table.assign(part=part, part_order=part_order, label=label), columns=columns
    )


def parts_chart(table: pd.DataFrame, categories: Sequence[str], style: Style, width: float) -> Any:
    """Stacked bars of the parts of a change; the dot is their sum."""
    columns = columns_for(len(categories), style)
    cell = cell_width(width, columns, style)
    scale = alt.Scale(domain=list(PART_COLORS), range=list(PART_COLORS.values()))
    x = alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0))
    y_title = "nats per response"
    base = alt.Chart(table)
    bars = base.mark_bar().encode(
        x=x,
        y=alt.Y("change:Q", stack="zero", title=y_title),
        color=alt.Color("part:N", scale=scale, sort=None, legend=alt.Legend(title=None)),
        order=alt.Order("part_order:Q"),
        tooltip=["category:N", "step:O", "part:N", alt.Tooltip("change:Q", format=".2f")],
    )
    total = base.mark_point(filled=True, size=26, color="#D00000", opacity=1).encode(
        x=x, y="sum(change):Q"
    )
    layers = alt.layer(bars, table_rule(table), total, data=table).properties(
        width=cell, height=cell_height(cell, style)
    )
    return facet(
        layers, [style.label(name) for name in categories], style, columns, own_scale=False
    )
