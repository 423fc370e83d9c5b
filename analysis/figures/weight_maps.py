"""The figure of `sft-probe weights`: which layers moved, by kind of weight, over the steps."""

from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import Figure, Style, small_multiples
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
    shown = table[table["kind"].isin(_KINDS) & (table["relative_change"] > 0)]
    kinds = [kind for kind in _KINDS if kind in set(shown["kind"])]
    color = alt.Color(
        "relative_change:Q",
        scale=alt.Scale(scheme="viridis", type="log"),
        legend=alt.Legend(title="relative change", format=".0e"),
    )
    layers = (
        alt.Chart(shown)
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="step"),
            y=alt.Y("layer:O", title="layer", sort="descending"),
            color=color,
            tooltip=["step:O", "layer:O", "kind:N", "relative_change:Q"],
        )
    )
    height = style.font_size * max(shown["layer"].nunique(), 10)
    return small_multiples(layers, kinds, style, width, column="kind", height=height)
