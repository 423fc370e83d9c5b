"""Figures of what a model's distributions do: argmax mass beside the log-prob of every category."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import (
    Figure,
    Style,
    small_multiples,
    step_axis,
    zero_rule,
)
from sft_probe.analysis.stats.runs import SPLIT_NAMES

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
