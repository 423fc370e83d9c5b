"""The figure of `sft-probe weights`: which layers moved, by kind of weight, over the steps."""

from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import Figure, Style, cell_width
from sft_probe.analysis.studies.weight_changes import by_layer

_KINDS = ("attention", "mlp", "norm")


def plot_weights(
    changes: pd.DataFrame, folder: Path, formats: tuple[str, ...] = ("png", "pdf")
) -> list[Path]:
    """Write the figure `weights_by_layer` with its numbers; return the paths."""
    table = by_layer(changes).dropna(subset="layer")
    if table.empty:
        return []
    style = Style()
    figure = Figure(
        name="weights_by_layer",
        title="Change of the weights, relative to their size at the first snapshot",
        subtitle=["Frobenius norms of all weights of a layer and kind; one run"],
        table=table.astype({"layer": int}),
        build=partial(_heat_maps, table.astype({"layer": int}), style),
    )
    return figure.save(folder, formats, style)


def _heat_maps(table: pd.DataFrame, style: Style, width: float) -> Any:
    kinds = [kind for kind in _KINDS if kind in set(table["kind"])]
    color = alt.Color(
        "relative_change:Q",
        scale=alt.Scale(scheme="viridis", type="log"),
        legend=alt.Legend(title="relative change", format=".0e"),
    )
    charts = [
        alt.Chart(table[(table["kind"] == kind) & (table["relative_change"] > 0)])
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="step"),
            y=alt.Y("layer:O", title="layer" if number == 0 else None, sort="descending"),
            color=color,
            tooltip=["step:O", "layer:O", "kind:N", "relative_change:Q"],
        )
        .properties(
            title=kind,
            width=cell_width(width, len(kinds), style),
            height=style.font_size * max(table["layer"].nunique(), 8),
        )
        for number, kind in enumerate(kinds)
    ]
    return alt.hconcat(*charts)
