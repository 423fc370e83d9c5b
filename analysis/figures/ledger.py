"""Figures of `sft-probe ledger`: parts of a gain stacked over the steps; layers that carry it."""

from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.figure import Figure, Style, small_multiples
from sft_probe.analysis.studies.ledger import MEASURES, WHOLE

_COLORS = ("#bdbdbd", "#9ecae1", "#4292c6", "#08519c")


def parts_figure(parts: pd.DataFrame) -> Figure:
    """Return the figure `ledger_parts` of the rows of `Ledger.parts`."""
    style = Style()
    table = parts[parts["measure"] == MEASURES[0]]
    return Figure(
        name="ledger_parts",
        title="The gain by the prompt that it shows under",
        subtitle=[
            "Nats per response, terminator included; bars add up to the whole (black, with its "
            "95 % interval over docs); one run"
        ],
        table=table,
        build=partial(_stacks, table, style),
    )


def path_figure(parts: pd.DataFrame) -> Figure:
    """Return the figure `ledger_path` of the rows of `PathLedger.parts`."""
    style = Style()
    sums = parts.groupby(["category", "first_step", "last_step", "layer"], dropna=False)
    table = sums["change"].sum().reset_index().sort_values(["first_step", "layer"])
    table["layer"] = [
        "other" if pd.isna(layer) else str(int(layer)) for layer in table["layer"].astype(object)
    ]
    table["steps"] = table["first_step"].astype(str) + "-" + table["last_step"].astype(str)
    return Figure(
        name="ledger_path",
        title="Where the gain lies: share of the path by layer and interval of steps",
        subtitle=["Nats per response; other: embeddings, head and last norm; one run"],
        table=table,
        build=partial(_layers, table, style),
    )


def written_figures(folder: Path) -> list[Figure]:
    """Return the figures of the tables that `sft-probe ledger` has written into a directory."""
    tables = {"ledger": parts_figure, "path": path_figure}
    paths = {folder / f"{name}.csv": make for name, make in tables.items()}
    return [make(pd.read_csv(path)) for path, make in paths.items() if path.is_file()]


def _layers(table: pd.DataFrame, style: Style, width: float) -> Any:
    names = sorted(set(table["layer"]) - {"other"}, key=int, reverse=True)
    order = [*names, *(["other"] if "other" in set(table["layer"]) else [])]
    largest = max(float(table["change"].abs().max()), 1e-9)
    scale = alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True)
    cells = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X(
                "steps:N", sort=list(dict.fromkeys(table["steps"])), axis=alt.Axis(labelAngle=-30)
            ),
            y=alt.Y("layer:N", sort=order, title="layer"),
            color=alt.Color("change:Q", scale=scale, legend=alt.Legend(title="nats")),
            tooltip=["category:N", "steps:N", "layer:N", "change:Q"],
        )
    )
    categories = list(dict.fromkeys(table["category"]))
    height = style.font_size * max(len(order), 10)
    return small_multiples(cells, categories, style, width, column="category", height=height)


def _stacks(table: pd.DataFrame, style: Style, width: float) -> Any:
    parts = [part for part in dict.fromkeys(table["part"]) if part != WHOLE]
    table = table.assign(order=table["part"].map({part: i for i, part in enumerate(parts)}))
    x = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0))
    color = alt.Color(
        "part:N",
        scale=alt.Scale(domain=parts, range=list(_COLORS[-len(parts) :])),
        legend=alt.Legend(title=None, columns=len(parts)),
    )
    base = alt.Chart(table)
    bars = (
        base.transform_filter(f"datum.part != '{WHOLE}'")
        .mark_bar()
        .encode(x=x, y=alt.Y("change:Q", title="nats"), color=color, order="order:Q")
    )
    whole = base.transform_filter(f"datum.part == '{WHOLE}'")
    point = whole.mark_point(filled=True, color="black", size=30).encode(x=x, y="change:Q")
    rule = whole.mark_rule(color="black").encode(x=x, y="low:Q", y2="high:Q")
    layers = alt.layer(bars, rule, point, data=table)
    categories = list(dict.fromkeys(table["category"]))
    return small_multiples(layers, categories, style, width, column="category")
