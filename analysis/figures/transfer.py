"""Heat maps of transfer and omega, and omega against on-target gain."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import Figure
from sft_probe.analysis.figures.style import Style, key_colors, legend_columns
from sft_probe.analysis.studies.transfer import Transfer
from sft_probe.files import make_dir

_HATCH = "M-1,-.5L-.5,-1M-1,0L0,-1M-1,.5L.5,-1M-1,1L1,-1M-.5,1L1,-.5M0,1L1,0M.5,1L1,.5"


def plot_transfer(
    found: Transfer, folder: Path, formats: tuple[str, ...] = ("png", "svg", "pdf")
) -> list[Path]:
    """Writes the figures with their numbers; returns the paths."""
    make_dir(folder)
    return [
        path for figure in figures(found, Style()) for path in figure.save(folder, formats, Style())
    ]


def figures(found: Transfer, style: Style) -> Iterator[Figure]:
    """`transfer`, and where they are defined `omega` and `omega_curve`."""
    noise = f"{found.num_docs} held-out prompts; hatched: the 95 % interval over prompts holds 0"
    yield Figure(
        name="transfer",
        title=f"Transfer at step {found.step}: nats per body token",
        subtitle=[noise],
        table=found.matrix,
        build=partial(_heat, found.matrix, ("row", "category", "transfer"), style),
    )
    omegas = found.omega[~found.omega["is_null"]] if len(found.omega) else found.omega
    if len(omegas):
        mirrored = omegas.rename(columns={"row": "other", "other": "row"})
        table = pd.concat([omegas, mirrored], ignore_index=True)
        yield Figure(
            name="omega",
            title="Omega: 0 cannot be told apart, 1 no transfer",
            subtitle=[f"{noise}, or omega is not defined"],
            table=table,
            build=partial(_heat, table, ("row", "other", "omega"), style),
        )
    if len(found.curves) and found.curves["omega"].notna().any():
        yield Figure(
            name="omega_curve",
            title="Omega against on-target gain",
            table=found.curves,
            subtitle=["Bands: 95 % over prompts; drawn where both on-target gains have a sign"],
            build=partial(_curves, found.curves, style),
        )


def _heat(table: pd.DataFrame, columns: tuple[str, str, str], style: Style, width: float) -> Any:
    row, column, value = columns
    known = table[value].notna() & (table["low"] * table["high"] > 0)
    table = table.assign(
        hatched=~known, text=table[value].map("{:+.2f}".format).where(table[value].notna(), "?")
    )
    cell = min(90.0, (width - 12 * style.font_size) / max(1, table[column].nunique()))
    order = list(dict.fromkeys(table[row]))
    across = order if set(order) == set(table[column]) else list(dict.fromkeys(table[column]))
    x = alt.X(f"{column}:N", sort=across, title=None, axis=alt.Axis(labelAngle=-30, orient="top"))
    y = alt.Y(f"{row}:N", sort=order, title="trained on" if column == "category" else None)
    largest = max(float(table[value].abs().fillna(0.0).max()), 1e-9)
    scale = alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True)
    base = alt.Chart(table).encode(x=x, y=y)
    legend = alt.Legend(title=None, gradientLength=min(200.0, width / 2))
    fill = base.mark_rect(stroke="white").encode(
        color=alt.Color(f"{value}:Q", scale=scale, legend=legend),
        tooltip=[row, column, value, "low", "high"],
    )
    hatch = base.mark_point(
        shape=_HATCH, size=(0.42 * cell) ** 2 * 2, stroke="#777", strokeWidth=0.8, filled=False
    )
    hatched = hatch.transform_filter("datum.hatched")
    words = alt.condition(
        f"abs(datum.{value}) > {0.55 * largest}", alt.value("white"), alt.value("black")
    )
    text = base.mark_text(fontSize=style.font_size).encode(text="text:N", color=words)
    return alt.layer(fill, hatched, text).properties(
        width=cell * table[column].nunique(), height=0.6 * cell * len(order)
    )


def _curves(table: pd.DataFrame, style: Style, width: float) -> Any:
    table = table.assign(pair=table["row"] + " / " + table["other"])
    names = list(dict.fromkeys(table["pair"]))
    legend = alt.Legend(title=None, columns=legend_columns(names, style), symbolOpacity=1)
    color = alt.Color(
        "pair:N", scale=alt.Scale(domain=names, range=key_colors(names)), legend=legend
    )
    base = alt.Chart(table.dropna()).encode(
        x=alt.X("gain:Q", title="mean on-target gain (nats per body token)"), color=color
    )
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title="omega"), y2="high:Q")
    line = base.mark_line(point=True).encode(
        y="omega:Q", order="step:Q", tooltip=["pair:N", "step:Q", "omega:Q"]
    )
    return alt.layer(band, line).properties(width=width - 5 * style.font_size, height=0.45 * width)
