"""The figure of `sft-probe simplicity`: runs ranked by what their training sets cost and by how
soon they gain."""

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import Figure
from sft_probe.analysis.figures.style import Style, cell_width, colors_of
from sft_probe.analysis.studies.simplicity import Simplicity

_MEASURES = {
    "start_bits_per_byte": ("bits per byte", "before training"),
    "bits_per_byte": ("bits per byte", "prequential"),
    "half_gain_by_examples": ("examples to half gain", "half gain"),
}


def plot_simplicity(
    found: Simplicity, folder: Path, formats: tuple[str, ...] = ("png", "svg", "pdf")
) -> list[Path]:
    """Writes `simplicity_ranks` with its numbers; returns the paths."""
    style = Style()
    names = list(found.runs.sort_values("bits_per_byte")["run"])
    table = found.runs.melt(
        id_vars=["run", "train_category"],
        value_vars=list(_MEASURES),
        var_name="measure",
        value_name="value",
    ).dropna(subset="value")
    table["panel"] = [_MEASURES[name][0] for name in table["measure"]]
    table["what"] = [_MEASURES[name][1] for name in table["measure"]]
    figure = Figure(
        name="simplicity_ranks",
        title="Runs by the code length of their training set, and by examples to half gain",
        subtitle=[
            "A description, not a test: different texts differ in entropy, and ranks of a few runs "
            "decide nothing"
        ],
        table=table,
        build=lambda width: _dots(table, names, style, width),
    )
    return figure.save(folder, formats, style)


def _dots(table: pd.DataFrame, names: list[str], style: Style, width: float) -> Any:
    trained = [str(name) for name in dict.fromkeys(table["train_category"])]
    color = alt.Scale(domain=trained, range=list(colors_of(trained).values()))
    panels = list(dict.fromkeys(table["panel"]))
    charts = []
    for number, panel in enumerate(panels):
        own = table[table["panel"] == panel]
        kinds = list(dict.fromkeys(own["what"]))
        axis = alt.Axis(title=None) if number == 0 else None
        shapes = alt.Scale(
            domain=["before training", "prequential", "half gain"],
            range=["cross", "circle", "diamond"],
        )
        charts.append(
            alt.Chart(own)
            .mark_point(filled=True, size=50, opacity=1)
            .encode(
                x=alt.X("value:Q", title=panel, scale=alt.Scale(zero=False)),
                y=alt.Y("run:N", sort=names, axis=axis),
                color=alt.Color("train_category:N", scale=color, legend=alt.Legend(title=None)),
                shape=alt.Shape(
                    "what:N", scale=shapes, legend=alt.Legend(title=None, values=kinds)
                ),
                tooltip=["run:N", "train_category:N", "what:N", "value:Q"],
            )
            .properties(
                width=cell_width(width, len(panels), style),
                height=1.6 * style.font_size * len(names),
            )
        )
    return alt.hconcat(*charts).resolve_scale(shape="independent")
