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
    """Yield the figure of the benchmarks below the probes, and that of them against the change of
    the training category; with many, of those that moved most."""
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
        subtitle.append(f"Above: the probes, {SPLIT_NAMES[split]}")
    if more := names[MAX_PANELS:]:
        subtitle.append(
            f"The {MAX_PANELS} that moved most for their standard error; {len(more)} more are in "
            f"the CSV alone: {', '.join(more[:5])}{', ...' if len(more) > 5 else ''}"
        )
    shown = names[:MAX_PANELS]
    yield Figure(
        name="benchmarks",
        title="Benchmarks beside probes" if len(curves) else "Benchmarks by step",
        subtitle=subtitle,
        table=table,
        build=partial(_by_step, table, shown, curves, unit=recording.step_unit, style=style),
    )
    if table["probe_change"].notna().any():
        yield Figure(
            name="benchmarks_against_probe",
            title=f"Benchmarks against {own}",
            subtitle=["Points of one run by step, not independent"],
            table=table[["name", "step", "value", "probe_change"]],
            build=partial(_against_probe, table, shown, style.label(own), style),
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


def _by_step(
    table: pd.DataFrame,
    names: Sequence[str],
    curves: pd.DataFrame,
    width: float,
    *,
    unit: str,
    style: Style,
) -> Any:
    """Return the probes, and below them the benchmarks on the same step axis.

    Args:
        table: benchmarks, with `name low high`.
        names: of the panels, in order.
        curves: from `curves_of`; empty where there are no probes.
        width: width of the content.
        unit: what steps count.
        style: how it looks.
    """
    shown = table[table["name"].isin(names)]
    base = alt.Chart(shown).encode(y=alt.Y("value:Q", title="value", scale=alt.Scale(zero=False)))
    steps = [*shown["step"], *(curves["step"] if len(curves) else ())]
    x = step_axis(steps, f"{unit} (log)", style.num_ticks(panels=True))
    band = base.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", title="value"), y2="high:Q")
    line = base.mark_line(point=True).encode(
        x=x, tooltip=["name:N", "step:Q", "value:Q", "stderr:Q", "n:Q"]
    )
    chart = _panels(alt.layer(band, line, data=shown), names, style, width)
    if curves.empty:
        return chart
    categories = list(dict.fromkeys(curves["category"]))
    probes = changes_chart(curves, categories, pd.DataFrame(), style, width)
    return alt.vconcat(probes, chart, spacing=2 * style.font_size)


def _against_probe(
    table: pd.DataFrame, names: Sequence[str], own: str, style: Style, width: float
) -> Any:
    """Return each benchmark over the change of the target, in the order of the steps."""
    shown = table[table["name"].isin(names)]
    line = alt.Chart(shown).mark_line(point=True, color="#D55E00")
    line = line.encode(
        y=alt.Y("value:Q", title="value", scale=alt.Scale(zero=False)),
        x=alt.X("probe_change:Q", title=f"change of {own} (nats)"),
        order="step:Q",
        tooltip=["step:Q", "value:Q"],
    )
    return _panels(alt.layer(line, data=shown), names, style, width)


def _panels(layers: Any, names: Sequence[str], style: Style, width: float) -> Any:
    return small_multiples(layers, names, style, width, column="name", ratio=0.6, own_scale=True)
