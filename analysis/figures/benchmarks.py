"""The figure of benchmarks and other measures, on the step axis of the probes and against them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.categories import changes_chart, curves_of
from sft_probe.analysis.figures.figure import Figure, Style, small_multiples, step_axis
from sft_probe.analysis.stats.benchmarks import benchmark_changes
from sft_probe.analysis.stats.changes import PER_RESPONSE
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording

MAX_PANELS = 12
_NORMAL = 1.96


def benchmark_figure(recording: Recording, changes: pd.DataFrame, style: Style) -> Iterator[Figure]:
    """Yield the figure of each benchmark below the probes, and against the change of the training
    category; with many, of those that moved most."""
    table = recording.benchmarks
    if table is None or table.empty:
        return
    own_filter = (", " + table["filter"].astype(str)).where(table["filter"] != "none", "")
    error = _NORMAL * table["stderr"].fillna(0.0)
    table = table.assign(
        name=table["task"] + ", " + table["metric"] + own_filter,
        low=table["value"] - error,
        high=table["value"] + error,
    )
    ordered = benchmark_changes(table.assign(task=table["name"], metric="", filter=""))["task"]
    names = list(dict.fromkeys([*ordered, *table["name"]]))
    split = next(iter(recording.splits), "heldout")
    own = recording.target(recording.categories(split)) or "chosen"
    probe = probe_change(recording, changes, own)[["step", "change"]]
    probe = probe.astype({"step": "int64", "change": "float64"})
    table = table.merge(probe.rename(columns={"change": "probe_change"}), on="step", how="left")
    curves = changes[changes["run"] == recording.name]
    curves = curves_of(curves, _measure(recording), split, style)
    subtitle = ["Intervals of benchmarks: 95 % over items, where they are known"]
    if len(curves):
        subtitle.append(
            f"Above the probes, {SPLIT_NAMES[split]}; below each benchmark against {own}: points "
            "of one run, not independent"
        )
    if more := names[MAX_PANELS:]:
        subtitle.append(
            f"The {MAX_PANELS} that moved most for their standard error; {len(more)} more are in "
            f"the CSV alone: {', '.join(more[:5])}{', ...' if len(more) > 5 else ''}"
        )
    titles = (recording.step_unit, style.label(own))
    yield Figure(
        name="benchmarks",
        title="Benchmarks beside probes" if len(curves) else "Benchmarks by step",
        subtitle=subtitle,
        table=table,
        build=partial(_chart, table, names[:MAX_PANELS], curves, titles=titles, style=style),
    )


def probe_change(recording: Recording, changes: pd.DataFrame, category: str) -> pd.DataFrame:
    """Return `step change band_low band_high` of a category on held-out prompts, where there are
    any, in nats per response, without terminator, where that is known."""
    return changes[
        (changes["run"] == recording.name)
        & (changes["split"] == next(iter(recording.splits), None))
        & (changes["category"] == category)
        & (changes["measure"] == _measure(recording))
        & (changes["unit"] == PER_RESPONSE)
    ][["step", "change", "band_low", "band_high"]]


def _measure(recording: Recording) -> str:
    return "logprob" if recording.has("logprob") else "logprob_with_eos"


def _chart(
    table: pd.DataFrame,
    names: Sequence[str],
    curves: pd.DataFrame,
    width: float,
    *,
    titles: tuple[str, str],
    style: Style,
) -> Any:
    """Return the probes, benchmarks on the same step axis, and benchmarks against the target.

    Args:
        table: benchmarks, with `name low high probe_change`.
        names: of the panels, in order.
        curves: from `curves_of`; empty where there are no probes.
        width: width of the content.
        titles: what steps count, and the target's label.
        style: how it looks.
    """
    shown = table[table["name"].isin(names)]
    y = alt.Y("value:Q", title="value", scale=alt.Scale(zero=False))
    base = alt.Chart(shown).encode(y=y)
    steps = [*shown["step"], *(curves["step"] if len(curves) else ())]
    x = step_axis(steps, f"{titles[0]} (log)", style.num_ticks(panels=True))
    band = base.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", title="value"), y2="high:Q")
    line = base.mark_line(point=True).encode(
        x=x, tooltip=["name:N", "step:Q", "value:Q", "stderr:Q", "n:Q"]
    )
    layers = [alt.layer(band, line, data=shown)]
    if shown["probe_change"].notna().any():
        against = base.mark_line(point=True, color="#D55E00").encode(
            x=alt.X("probe_change:Q", title=f"change of {titles[1]} (nats)"),
            order="step:Q",
            tooltip=["step:Q", "value:Q"],
        )
        layers.append(alt.layer(against, data=shown))
    panels = partial(small_multiples, names=names, style=style, width=width, column="name")
    charts = [panels(layer, ratio=0.6, own_scale=True) for layer in layers]
    if len(curves):
        categories = list(dict.fromkeys(curves["category"]))
        charts.insert(0, changes_chart(curves, categories, pd.DataFrame(), style, width))
    chart = alt.vconcat(*charts, spacing=2 * style.font_size)
    return chart.resolve_scale(color="independent", shape="independent", strokeDash="independent")
