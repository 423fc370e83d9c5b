"""Figures of whole runs: benchmarks, greedy answers, code lengths, transfer, simplicity."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from sft_probe.analysis.figures.figure import (
    Figure,
    Style,
    cell_height,
    cell_width,
    colors_of,
    columns_for,
    facet,
    key_colors,
    legend_columns,
    step_axis,
)
from sft_probe.analysis.stats.changes import PER_RESPONSE
from sft_probe.analysis.stats.generations import on_common_docs
from sft_probe.analysis.stats.runs import Recording
from sft_probe.analysis.stats.trajectory import mean_interval
from sft_probe.analysis.studies.simplicity import Simplicity, first_epoch
from sft_probe.analysis.studies.transfer import Transfer
from sft_probe.files import make_dir

MAX_PANELS = 12
MAX_POINTS = 400  # of one curve: a report holds them all


def benchmark_figure(recording: Recording, changes: pd.DataFrame, style: Style) -> Iterator[Figure]:
    """Each benchmark on the step axis, and against the change of the training category on held-out
    prompts."""
    table = recording.benchmarks
    if table is None or table.empty:
        return
    own_filter = (", " + table["filter"].astype(str)).where(table["filter"] != "none", "")
    table = table.assign(name=table["task"] + ", " + table["metric"] + own_filter)
    names = list(dict.fromkeys(table["name"]))
    kept = names[:MAX_PANELS]
    table = table.assign(
        low=lambda frame: frame["value"] - 1.96 * frame["stderr"].fillna(0.0),
        high=lambda frame: frame["value"] + 1.96 * frame["stderr"].fillna(0.0),
    )
    own = recording.target(recording.categories("heldout")) or "chosen"
    probe = _probe_change(recording, changes, own)[["step", "change"]].rename(
        columns={"change": "probe_change"}
    )
    table = table.merge(probe, on="step", how="left")

    def build(width: float) -> Any:
        columns = columns_for(len(kept), style)
        size = {
            "width": cell_width(width, columns, style),
            "height": 0.6 * cell_width(width, columns, style),
        }
        y = alt.Y("value:Q", title="value", scale=alt.Scale(zero=False))
        shown = table[table["name"].isin(kept)]
        base = alt.Chart(shown).encode(y=y)
        x = step_axis(table["step"].tolist(), "step (log)")
        band = base.mark_area(opacity=0.15).encode(
            x=x, y=alt.Y("low:Q", title="value"), y2="high:Q"
        )
        line = base.mark_line(point=True).encode(
            x=x, tooltip=["name:N", "step:Q", "value:Q", "stderr:Q", "n:Q"]
        )
        against = base.mark_line(point=True, color="#D55E00").encode(
            x=alt.X("probe_change:Q", title=f"change of {own} (nats)"),
            order="step:Q",
            tooltip=["step:Q", "value:Q"],
        )
        rows = [
            facet(
                alt.layer(band, line, data=shown).properties(**size),
                kept,
                style,
                columns,
                column="name",
            )
        ]
        if shown["probe_change"].notna().any():
            rows.append(
                facet(
                    alt.layer(against, data=shown).properties(**size),
                    kept,
                    style,
                    columns,
                    column="name",
                )
            )
        return alt.vconcat(*rows)

    subtitle = [
        "Above by step, with 95 % intervals over questions; below against the probe: points of one "
        "run, not independent"
    ]
    if len(names) > len(kept):
        subtitle.append(
            f"{len(names) - len(kept)} more are in the CSV alone: "
            f"{', '.join(names[MAX_PANELS:][:5])}, ..."
        )
    yield Figure(
        name="benchmarks",
        title="Benchmarks beside probes",
        subtitle=subtitle,
        table=table,
        build=build,
    )


def generation_figure(
    recording: Recording, changes: pd.DataFrame, style: Style
) -> Iterator[Figure]:
    """Length, end and repetition of greedy answers beside the change of the training category, by
    step."""
    if recording.generations is None:
        return
    answers = on_common_docs(recording.generations)
    own = recording.target(recording.categories("heldout")) or "chosen"
    measures = {
        "num_tokens": "length (tokens)",
        "ended": "share that ended",
        "repetition": "share of repeated 4-grams",
    }
    parts = [_means(answers, column).assign(name=name) for column, name in measures.items()]
    change = _probe_change(recording, changes, own)
    if len(change):
        panel = f"change of {own} (nats)"
        bands = {"change": "value", "band_low": "low", "band_high": "high"}
        parts.insert(0, change.rename(columns=bands).assign(name=panel))
    table = pd.concat(parts, ignore_index=True)[["name", "step", "value", "low", "high"]]
    names = list(dict.fromkeys(table["name"]))

    def build(width: float) -> Any:
        columns = min(2, columns_for(len(names), style))
        cell = cell_width(width, columns, style)
        base = alt.Chart(table).encode(x=step_axis(table["step"].tolist(), "optimizer step (log)"))
        band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
        line = base.mark_line(point=True).encode(
            y=alt.Y("value:Q", title=None),
            tooltip=["name:N", "step:Q", "value:Q", "low:Q", "high:Q"],
        )
        layers = alt.layer(band, line, data=table).properties(
            width=cell, height=cell_height(cell, style)
        )
        return facet(layers, names, style, columns, column="name")

    subtitle = [
        f"Answers to {answers['doc_id'].nunique()} held-out prompts, at most "
        f"{answers['max_new_tokens'].max()} tokens; "
        "95 % over prompts, one run: each mean alone (t; shares that ended: Wilson), the change "
        "for all steps at once"
    ]
    yield Figure(
        name="generations", title="Greedy answers", subtitle=subtitle, table=table, build=build
    )


def _means(answers: pd.DataFrame, column: str) -> pd.DataFrame:
    """`step value low high`: means over prompts with 95 % intervals, of no width where one
    conversation is all."""
    rows = []
    for step, own in answers.groupby("step"):
        values = own[column].dropna().to_numpy(dtype=float)
        if not len(values):
            continue  # no answer of this step is long enough for a 4-gram
        if column == "ended":  # a t-interval of a share near 0 or 1 has no width
            low, high = stats.binomtest(int(values.sum()), len(values)).proportion_ci(
                method="wilson"
            )
        else:
            low, high = mean_interval(
                own[column].to_numpy(dtype=float), own["conversation_id"].to_numpy()
            )
        mean = float(values.mean())
        known = not math.isnan(low)
        rows.append(
            {
                "step": step,
                "value": mean,
                "low": low if known else mean,
                "high": high if known else mean,
            }
        )
    return pd.DataFrame(rows)


def _probe_change(recording: Recording, changes: pd.DataFrame, category: str) -> pd.DataFrame:
    """`step change band_low band_high` of a category on held-out prompts, nats per response without
    terminator."""
    return changes[
        (changes["run"] == recording.name)
        & (changes["split"] == "heldout")
        & (changes["category"] == category)
        & (changes["measure"] == "logprob")
        & (changes["unit"] == PER_RESPONSE)
    ][["step", "change", "band_low", "band_high"]]


def code_length_figure(recordings: Sequence[Recording], style: Style) -> Iterator[Figure]:
    """Bits per byte of each example before it was trained on, running, and the sum so far."""
    tables = []
    for recording in recordings:
        losses = first_epoch(recording.path)
        if losses is None:
            continue
        bits = losses["loss_sum"].cumsum() / np.log(2)
        window = max(4, len(losses) // 16)
        kept = np.unique(
            np.linspace(0, len(losses) - 1, min(len(losses), MAX_POINTS)).round().astype(int)
        )
        running = (
            losses["loss_sum"].rolling(window).sum()
            / losses["num_bytes"].rolling(window).sum()
            / np.log(2)
        )
        tables.append(
            pd.DataFrame(
                {
                    "run": recording.name,
                    "train_category": recording.train_category,
                    "model": recording.model,
                    "order_seed": recording.order_seed,
                    "example": np.arange(1, len(losses) + 1),
                    "running": running,
                    "so_far": bits / losses["num_bytes"].cumsum(),
                }
            ).iloc[kept]
        )
    if not tables:
        return
    table = pd.concat(tables, ignore_index=True)
    long = table.melt(
        id_vars=["run", "example"],
        value_vars=["running", "so_far"],
        var_name="kind",
        value_name="bits",
    ).dropna()
    long["kind"] = long["kind"].map(
        {"running": "running mean", "so_far": "all so far (prequential)"}
    )
    names = [recording.name for recording in recordings if recording.name in set(table["run"])]
    shown = dict(zip(names, key_colors(names), strict=True))

    def build(width: float) -> Any:
        cell = cell_width(width, 2, style)
        scale = alt.Scale(domain=names, range=list(shown.values()))
        y = alt.Y("bits:Q", title="bits per byte", scale=alt.Scale(zero=False))
        line = (
            alt.Chart(long)
            .mark_line()
            .encode(
                x=alt.X("example:Q", title="training examples"),
                y=y,
                color=alt.Color(
                    "run:N", scale=scale, legend=alt.Legend(title=None) if len(names) > 1 else None
                ),
                tooltip=["run:N", "example:Q", "bits:Q"],
            )
        )
        kinds = ["running mean", "all so far (prequential)"]
        return facet(
            line.properties(width=cell, height=cell_height(cell, style)),
            kinds,
            style,
            2,
            column="kind",
            own_scale=False,
        )

    subtitle = [
        "Loss of each example of the first epoch before its update, response and terminator"
    ]
    yield Figure(
        name="code_length",
        title="Code length of the training set",
        subtitle=subtitle,
        table=long,
        build=build,
    )


_HATCH = "M-1,-.5L-.5,-1M-1,0L0,-1M-1,.5L.5,-1M-1,1L1,-1M-.5,1L1,-.5M0,1L1,0M.5,1L1,.5"


def plot_transfer(
    found: Transfer, folder: Path, formats: tuple[str, ...] = ("png", "svg", "pdf")
) -> list[Path]:
    """Writes the figures with their numbers; returns the paths."""
    make_dir(folder)
    return [
        path
        for figure in transfer_figures(found, Style())
        for path in figure.save(folder, formats, Style())
    ]


def transfer_figures(found: Transfer, style: Style) -> Iterator[Figure]:
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
