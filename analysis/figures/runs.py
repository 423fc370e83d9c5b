"""Figures of whole runs: benchmarks beside probes, code lengths."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from sft_probe.analysis.figures.figure import Figure
from sft_probe.analysis.figures.style import (
    Style,
    cell_height,
    cell_width,
    columns_for,
    facet,
    key_colors,
    step_axis,
)
from sft_probe.analysis.stats.changes import PER_RESPONSE
from sft_probe.analysis.stats.generations import on_common_docs
from sft_probe.analysis.stats.runs import Recording
from sft_probe.analysis.stats.trajectory import mean_interval
from sft_probe.analysis.studies.simplicity import first_epoch

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
