"""Figures of whole runs: greedy answers, code lengths, transfer, simplicity."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from sft_probe.analysis.figures.benchmarks import probe_change
from sft_probe.analysis.figures.categories import differences_chart
from sft_probe.analysis.figures.figure import (
    Figure,
    Keys,
    Style,
    colors_of,
    key_colors,
    small_multiples,
    step_axis,
)
from sft_probe.analysis.stats.comparison import Comparison
from sft_probe.analysis.stats.generations import on_common_docs
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.trajectory import mean_interval
from sft_probe.analysis.studies.simplicity import Simplicity, first_epoch
from sft_probe.analysis.studies.transfer import Transfer
from sft_probe.files import make_dir

MAX_PANELS = 12
MAX_POINTS = 400  # of one curve: a report holds them all
PAPER_FORMATS = ("png", "pdf")
_HATCH = "M-1,-.5L-.5,-1M-1,0L0,-1M-1,.5L.5,-1M-1,1L1,-1M-.5,1L1,-.5M0,1L1,0M.5,1L1,.5"
_ANSWERS = {
    "num_tokens": "length (tokens)",
    "ended": "share that ended",
    "repetition": "repeated 4-grams",
}


def generation_figure(
    recording: Recording, changes: pd.DataFrame, style: Style
) -> Iterator[Figure]:
    """Yield the figure of length, end and repetition of greedy answers beside the change of the
    training category, by step."""
    if recording.generations is None:
        return
    answers = on_common_docs(recording.generations)
    own = recording.target(recording.categories("heldout")) or "chosen"
    parts = [_means(answers, column).assign(name=name) for column, name in _ANSWERS.items()]
    change = probe_change(recording, changes, own)
    if len(change):
        bands = {"change": "value", "band_low": "low", "band_high": "high"}
        name = f"change of {style.label(own)} (nats)"
        parts.insert(0, change.rename(columns=bands).assign(name=name))
    table = pd.concat(parts, ignore_index=True)[["name", "step", "value", "low", "high"]]
    names = list(dict.fromkeys(table["name"]))

    def build(width: float) -> Any:
        base = alt.Chart(table).encode(
            x=step_axis(
                table["step"].tolist(), "optimizer step (log)", style.num_ticks(panels=True)
            )
        )
        band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
        line = base.mark_line(point=True).encode(
            y=alt.Y("value:Q", title=None),
            tooltip=["name:N", "step:Q", "value:Q", "low:Q", "high:Q"],
        )
        layers = alt.layer(band, line, data=table)
        return small_multiples(
            layers, names, style, width, column="name", max_columns=2, own_scale=True
        )

    subtitle = [
        f"Answers to {answers['doc_id'].nunique()} held-out prompts, at most "
        f"{answers['max_new_tokens'].max()} tokens",
        "95 % over prompts, one run: each mean alone (t; shares that ended: Wilson), the change "
        "for all steps at once",
    ]
    yield Figure(
        name="generations", title="Greedy answers", subtitle=subtitle, table=table, build=build
    )


def _means(answers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return `step value low high`: means over prompts with 95 % intervals, of no width where there
    is one conversation only."""
    rows = []
    for step, own in answers.groupby("step"):
        values = own[column].dropna().to_numpy(dtype=float)
        if not len(values):
            continue  # no answer of this step is long enough for a 4-gram
        if column == "ended":  # a t-interval of a share near 0 or 1 has no width
            test = stats.binomtest(int(values.sum()), len(values))
            low, high = test.proportion_ci(method="wilson")
        else:
            low, high = mean_interval(
                own[column].to_numpy(dtype=float), own["conversation_id"].to_numpy()
            )
        mean = float(values.mean())
        ends = (mean, mean) if math.isnan(low) else (low, high)
        rows.append({"step": step, "value": mean, "low": ends[0], "high": ends[1]})
    return pd.DataFrame(rows)


def code_length_figure(recordings: Sequence[Recording], style: Style) -> Iterator[Figure]:
    """Yield the figure of bits per byte of each example before it was trained on: running, and the
    sum so far."""
    tables = [
        _code_lengths(losses).assign(run=recording.name)
        for recording in recordings
        if (losses := first_epoch(recording.path)) is not None
    ]
    if not tables:
        return
    table = pd.concat(tables, ignore_index=True)[["run", "example", "kind", "bits"]]
    names = list(dict.fromkeys(table["run"]))
    colors = key_colors(names)
    keys = Keys(column="run", colors=colors, style=style, legend=len(names) > 1, markers=False)

    def build(width: float) -> Any:
        y = alt.Y("bits:Q", title="bits per byte", scale=alt.Scale(zero=False))
        line = alt.Chart(table).encode(
            x=alt.X("example:Q", title="training examples"),
            y=y,
            color=keys.color,
            strokeDash=keys.dash,
            tooltip=["run:N", "example:Q", "bits:Q"],
        )
        kinds = list(dict.fromkeys(table["kind"]))
        return small_multiples(line.mark_line(), kinds, style, width, column="kind", max_columns=2)

    yield Figure(
        name="code_length",
        title="Code length of the training set",
        subtitle=[
            "Loss of each example of the first epoch before its update, response and terminator"
        ],
        table=table,
        build=build,
    )


def _code_lengths(losses: pd.DataFrame) -> pd.DataFrame:
    """Return rows `example kind bits` of at most 400 examples of one run."""
    window = max(4, len(losses) // 16)
    kept = np.linspace(0, len(losses) - 1, min(len(losses), MAX_POINTS)).round().astype(int)
    nats, size = losses["loss_sum"], losses["num_bytes"]
    kinds = {
        "running mean": nats.rolling(window).sum() / size.rolling(window).sum(),
        "prequential, so far": nats.cumsum() / size.cumsum(),
    }
    table = pd.DataFrame({"example": np.arange(1, len(losses) + 1), **kinds})
    long = table.iloc[np.unique(kept)].melt("example", var_name="kind", value_name="bits").dropna()
    return long.assign(bits=long["bits"] / np.log(2))


def comparison_figures(found: Comparison, style: Style) -> Iterator[Figure]:
    """Yield what one of two runs moved more than the other: by step for each split, and in the
    benchmarks at the last common step."""
    names = f"{found.a.name} - {found.b.name}"
    table = found.table
    for split in dict.fromkeys(table["split"]) if len(table) else ():
        own = table[(table["split"] == split) & (table["quantity"] == "change")]
        own = own.rename(columns={"difference": "change"})
        own = own.assign(run=names, label=own["category"].map(style.label))
        categories = list(dict.fromkeys(own["category"]))
        yield Figure(
            name=f"comparison_{split}",
            title=f"Change of log p(response | prompt), {names}, {SPLIT_NAMES[split]}",
            subtitle=[
                f"Paired over {int(own['num_docs'].max())} docs that both runs scored; bands: 95 % "
                "for all categories and steps at once, over prompts; two runs say nothing of "
                "training noise"
            ],
            table=own,
            build=partial(differences_chart, own, categories, style),
        )
    if len(found.benchmarks):
        last = found.benchmarks[found.benchmarks["step"] == found.benchmarks["step"].max()]
        last = last.assign(name=last["task"] + ", " + last["metric"])
        yield Figure(
            name="comparison_benchmarks",
            title=f"Benchmarks at step {last['step'].iloc[0]}, {names}",
            subtitle=["Lines: 95 % over questions, the runs taken as independent"],
            table=last,
            build=partial(_benchmark_differences, last, names, style),
        )


def _benchmark_differences(table: pd.DataFrame, names: str, style: Style, width: float) -> Any:
    """Return a dot with its interval for each benchmark."""
    base = alt.Chart(table).encode(y=alt.Y("name:N", sort=None, title=None))
    line = base.mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q", title=names), x2="high:Q")
    dot = base.mark_point(filled=True, size=40, opacity=1).encode(
        x="difference:Q", tooltip=["name:N", "a:Q", "b:Q", "difference:Q", "low:Q", "high:Q"]
    )
    zero = alt.Chart(table).mark_rule(color="#888", strokeDash=[4, 3]).encode(x=alt.datum(0))
    size = {"width": width - 12 * style.font_size, "height": 1.8 * style.font_size * len(table)}
    return alt.layer(zero, line, dot).properties(**size)


def plot_transfer(
    found: Transfer,
    folder: Path,
    formats: Sequence[str] = PAPER_FORMATS,
    style: Style = Style(),  # noqa: B008 - frozen
) -> list[Path]:
    """Write the figures of transfer with their numbers; return the paths."""
    make_dir(folder)
    figures = transfer_figures(found, style)
    return [path for figure in figures for path in figure.save(folder, formats, style)]


def transfer_figures(found: Transfer, style: Style) -> Iterator[Figure]:
    """Yield `transfer`, and where they are defined `omega` and `omega_curve`."""
    noise = f"{found.num_docs} held-out prompts; hatched: the 95 % interval over prompts holds 0"
    yield Figure(
        name="transfer",
        title=f"Transfer at step {found.step}: nats per body token",
        subtitle=[noise],
        table=found.matrix,
        build=partial(_heat_map, found.matrix, ("row", "category", "transfer"), style),
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
            build=partial(_heat_map, table, ("row", "other", "omega"), style),
        )
    if len(found.curves) and found.curves["omega"].notna().any():
        yield Figure(
            name="omega_curve",
            title="Omega against on-target gain",
            table=found.curves,
            subtitle=["Bands: 95 % over prompts; drawn where both on-target gains have a sign"],
            build=partial(_omega_curves, found.curves, style),
        )


def _heat_map(
    table: pd.DataFrame, columns: tuple[str, str, str], style: Style, width: float
) -> Any:
    """Return a cell for each pair, hatched where its interval holds 0."""
    row, column, value = columns
    known = table[value].notna() & (table["low"] * table["high"] > 0)
    text = table[value].map("{:+z.2f}".format).where(table[value].notna(), "?")
    table = table.assign(hatched=~known, text=text)
    order = list(dict.fromkeys(table[row]))
    across = order if set(order) == set(table[column]) else list(dict.fromkeys(table[column]))
    cell = (width - 8 * style.font_size) / max(1, len(across))
    tall = min(0.6 * cell, 6 * style.font_size)
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
        shape=_HATCH, size=(0.7 * tall) ** 2 * 2, stroke="#777", strokeWidth=0.8, filled=False
    )
    dark = f"abs(datum.{value}) > {0.55 * largest}"
    words = base.mark_text(fontSize=min(style.font_size, 0.28 * cell)).encode(
        text="text:N", color=alt.condition(dark, alt.value("white"), alt.value("black"))
    )
    layers = alt.layer(fill, hatch.transform_filter("datum.hatched"), words)
    return layers.properties(width=cell * len(across), height=tall * len(order))


def _omega_curves(table: pd.DataFrame, style: Style, width: float) -> Any:
    """Return a curve of omega for each pair of training categories."""
    table = table.assign(pair=table["row"] + " / " + table["other"]).dropna()
    keys = Keys(column="pair", colors=key_colors(list(dict.fromkeys(table["pair"]))), style=style)
    x = alt.X("gain:Q", title="mean on-target gain (nats per body token)")
    base = alt.Chart(table).encode(x=x, color=keys.color)
    band = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title="omega"), y2="high:Q")
    line = base.mark_line().encode(y="omega:Q", order="step:Q", strokeDash=keys.dash)
    points = base.mark_point(filled=True, size=34, opacity=1).encode(
        y="omega:Q", shape=keys.shape, tooltip=["pair:N", "step:Q", "omega:Q"]
    )
    size = {"width": width - 5 * style.font_size, "height": 0.45 * min(width, 600)}
    return alt.layer(band, line, points).properties(**size)


def plot_simplicity(
    found: Simplicity,
    folder: Path,
    formats: Sequence[str] = PAPER_FORMATS,
    style: Style = Style(),  # noqa: B008 - frozen
) -> list[Path]:
    """Write `simplicity_excess` with its numbers, where a category has a description length; return
    the paths."""
    if not len(found.excess):
        return []
    figure = Figure(
        name="simplicity_excess",
        title="Excess description length of the examples seen so far",
        subtitle=[
            "Bits saved on held-out texts, for as many tokens, less bits saved on the examples "
            "while they were learnt",
            "95 % over data orders, training texts and held-out texts, each point alone",
        ],
        table=found.excess,
        build=partial(_excess_chart, found.excess, style),
    )
    return figure.save(folder, formats, style)


def _excess_chart(table: pd.DataFrame, style: Style, width: float) -> Any:
    """Return a curve with its band for each training category."""
    trained = [str(name) for name in dict.fromkeys(table["train_category"])]
    keys = Keys(column="train_category", colors=colors_of(trained), style=style)
    table = table.assign(step=table["examples_seen"])
    base = alt.Chart(table).encode(
        x=step_axis(table["step"].tolist(), "examples seen (log)"), color=keys.color
    )
    y = alt.Y("low:Q", title="excess description length (bits)")
    band = base.mark_area(opacity=0.12).encode(y=y, y2="high:Q")
    line = base.mark_line().encode(y="excess_bits:Q", strokeDash=keys.dash)
    points = base.mark_point(filled=True, size=34, opacity=1).encode(
        y="excess_bits:Q",
        shape=keys.shape,
        tooltip=["train_category:N", "examples_seen:Q", "excess_bits:Q", "low:Q", "high:Q"],
    )
    size = {"width": width - 5 * style.font_size, "height": 0.45 * min(width, 600)}
    return alt.layer(band, line, points).properties(**size)
