"""Figures of single docs: the data card, curves of docs, tokens of one doc, change by length."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sft_probe.analysis.figures.categories import table_rule
from sft_probe.analysis.figures.figure import (
    Figure,
    Style,
    category_color,
    cell_height,
    cell_width,
    columns_for,
    facet,
    step_axis,
    ticks,
)
from sft_probe.analysis.stats.intervals import weighted_mean
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tokens import token_texts

_MAX_LINES = 60
_MAX_TOKENS = 48
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def data_card(recording: Recording, split: str, arrays: Cube, style: Style) -> Iterator[Figure]:
    """Lengths, leading spaces, duplicates and writers of the responses."""
    table = _card(recording, arrays, style)
    order = [style.label(name) for name in arrays.categories]
    y = alt.Y("label:N", sort=order, title=None)
    color = category_color(arrays.categories, style, legend=False)

    def build(width: float) -> Any:
        height = 2.2 * style.font_size * len(order)
        columns = [
            ("repeated", 5.0),
            ("leading space", 7.5),
            ("writer", 20.0),
        ]  # widths in letters' heights
        columns = columns if style.width >= 400 else columns[:2]
        left = width - style.font_size * sum(size for _, size in columns)
        base = alt.Chart(table)
        length = alt.X("q05:Q", title="tokens per response", scale=alt.Scale(zero=False))
        whisker = base.mark_rule(strokeWidth=1).encode(x=length, x2="q95:Q", y=y, color=color)
        box = base.mark_bar(height=style.font_size).encode(
            x=alt.X("q25:Q"), x2="q75:Q", y=y, color=color
        )
        median = base.mark_tick(color="white", thickness=2, height=style.font_size).encode(
            x="q50:Q", y=y
        )
        panels = [
            alt.layer(whisker, box, median).properties(width=max(left - 60, 60.0), height=height)
        ]
        for title, letters in columns:
            text = base.mark_text(align="left", fontSize=style.font_size * 0.9).encode(
                y=alt.Y("label:N", sort=order, axis=None),
                x=alt.value(0),
                text=f"{title.replace(' ', '_')}_text:N",
            )
            head = alt.TitleParams(
                title, fontSize=style.font_size * 0.95, fontWeight="normal", anchor="start"
            )
            size = letters * style.font_size
            panels.append(
                text.properties(width=size, height=height, title=head, view={"stroke": None})
            )
        return alt.hconcat(*panels, spacing=4)

    dropped = len(recording.probe.get("dropped", []))
    subtitle = [
        f"{len(arrays.doc_ids)} {SPLIT_NAMES[split]} in {arrays.cluster_text}; {dropped} docs left "
        "out; bars: middle half, tick: median, line: 5 to 95 %"
    ]
    yield Figure(
        name=f"data_card_{split}", title="Data card", subtitle=subtitle, table=table, build=build
    )


def _card(recording: Recording, arrays: Cube, style: Style) -> pd.DataFrame:
    writers = recording.probe_set.manifest.get("categories", {}) if recording.probe_set else {}
    rows: list[dict[str, object]] = []
    for number, category in enumerate(arrays.categories):
        lengths = arrays.at_start("num_tokens")[:, number, 0]
        if np.isnan(lengths).all():
            lengths = arrays.at_start("num_bytes")[:, number, 0]
        lengths = lengths[~np.isnan(lengths)]
        quantiles = (
            np.quantile(lengths, _QUANTILES) if len(lengths) else np.full(len(_QUANTILES), np.nan)
        )
        texts = [
            recording.texts[name][category]
            for name in arrays.doc_ids
            if category in recording.texts.get(name, {})
        ]
        rows.append(
            {
                "category": category,
                "label": style.label(category),
                "writer": str(writers.get(category, "?")),
                "num_docs": len(arrays.doc_ids),
                "mean_bytes": float(weighted_mean(arrays.at_start("num_bytes")[:, number, 0])),
                **{
                    f"q{100 * q:02.0f}": value
                    for q, value in zip(_QUANTILES, quantiles, strict=True)
                },
                "repeated": 1 - len(set(texts)) / len(texts) if texts else np.nan,
                "leading_space": np.mean([text[:1].isspace() for text in texts])
                if texts
                else np.nan,
            }
        )
    table = pd.DataFrame(rows)
    for name in ("repeated", "leading_space"):
        table[f"{name}_text"] = [
            "?" if np.isnan(share) else f"{100 * share:.0f} %" for share in table[name]
        ]
    return table.assign(
        writer_text=[textwrap.shorten(writer, 44, placeholder="...") for writer in table["writer"]]
    )


def doc_lines(split: str, arrays: Cube, measure: str, style: Style) -> Iterator[Figure]:
    """The change of single docs, with quantiles of all."""
    change = arrays.change(measure)
    points = [arrays.steps.index(step) for step in ticks(arrays.steps)]
    shown = np.unique(np.linspace(0, len(arrays.doc_ids) - 1, _MAX_LINES).astype(int))
    rows = []
    for number, category in enumerate(arrays.categories):
        for point in points:
            step = {
                "category": category,
                "label": style.label(category),
                "step": arrays.steps[point],
            }
            values = change[:, number, point]
            rows += [
                {**step, "doc_id": arrays.doc_ids[doc], "change": values[doc]} for doc in shown
            ]
            if not np.isnan(values).all():
                for q in (0.1, 0.5, 0.9):
                    rows.append(
                        {
                            **step,
                            "doc_id": f"quantile {q:g}",
                            "change": np.nanquantile(values, q),
                            "quantile": q,
                        }
                    )
    table = pd.DataFrame(rows)
    names = [style.label(name) for name in arrays.categories]

    def build(width: float) -> Any:
        columns = columns_for(len(names), style)
        cell = cell_width(width, columns, style)
        y = alt.Y("change:Q", title="nats per response")
        base = alt.Chart(table).encode(
            x=step_axis(arrays.steps, "step (log)"), y=y, detail="doc_id:N"
        )
        color = category_color(arrays.categories, style, legend=False)
        single = base.transform_filter("!isValid(datum.quantile)").mark_line(
            strokeWidth=0.6, opacity=0.35
        )
        quantiles = base.transform_filter("isValid(datum.quantile)").mark_line(color="black")
        dash = alt.StrokeDash(
            "quantile:N",
            scale=alt.Scale(domain=[0.1, 0.5, 0.9], range=[[3, 2], [1, 0], [3, 2]]),
            legend=None,
        )
        layers = alt.layer(
            table_rule(table),
            single.encode(color=color, tooltip=["doc_id:N", "step:Q", "change:Q"]),
            quantiles.encode(strokeDash=dash),
            data=table,
        )
        return facet(
            layers.properties(width=cell, height=cell_height(cell, style)),
            names,
            style,
            columns,
            own_scale=False,
        )

    subtitle = [
        f"Thin: {len(shown)} of {len(arrays.doc_ids)} docs; black: median, dashed: 10 and 90 % of "
        "all docs; one run"
    ]
    yield Figure(
        name=f"docs_{split}",
        title=f"Change of single docs, {SPLIT_NAMES[split]}",
        subtitle=subtitle,
        table=table,
        build=build,
    )


def length_figure(split: str, arrays: Cube, measure: str, style: Style) -> Iterator[Figure]:
    """The last change of each doc against the length of its response."""
    lengths, change = arrays.at_start("num_tokens")[:, :, 0], arrays.change(measure)[:, :, -1]
    if np.isnan(lengths).all():
        return
    table = pd.DataFrame(
        [
            {
                "category": category,
                "label": style.label(category),
                "doc_id": doc_id,
                "num_tokens": lengths[doc, number],
                "change": change[doc, number],
            }
            for number, category in enumerate(arrays.categories)
            for doc, doc_id in enumerate(arrays.doc_ids)
        ]
    ).dropna()
    names = [style.label(name) for name in arrays.categories]

    def build(width: float) -> Any:
        columns = columns_for(len(names), style)
        cell = cell_width(width, columns, style)
        x = alt.X(
            "num_tokens:Q", title="tokens of the response", scale=alt.Scale(zero=False, nice=True)
        )
        y = alt.Y("change:Q", title="nats per response")
        color = category_color(arrays.categories, style, legend=False)
        base = alt.Chart(table).encode(x=x, y=y)
        points = base.mark_circle(size=18, opacity=0.6).encode(
            color=color, tooltip=["doc_id:N", "num_tokens:Q", "change:Q"]
        )
        line = base.transform_regression("num_tokens", "change", groupby=["label"]).mark_line(
            color="black", strokeWidth=1.2
        )
        layers = alt.layer(table_rule(table), points, line, data=table).properties(
            width=cell, height=cell_height(cell, style)
        )
        return facet(layers, names, style, columns, own_scale=False)

    title = f"Change by step {arrays.steps[-1]} against length, {SPLIT_NAMES[split]}"
    yield Figure(
        name=f"length_{split}",
        title=title,
        subtitle=["A dot is a doc; line: least squares; one run"],
        table=table,
        build=build,
    )


def token_figure(recording: Recording, split: str, arrays: Cube, style: Style) -> Iterator[Figure]:
    """The change of each token of one doc: the one whose change is the median of the training
    category's."""
    if recording.tokens is None:
        return
    own = recording.train_category
    number = arrays.categories.index(own) if own in arrays.categories else 0
    change = arrays.change("logprob")[:, number, -1]
    known = np.flatnonzero(~np.isnan(change))
    if not len(known):
        return
    doc_id = arrays.doc_ids[known[np.argsort(change[known])[len(known) // 2]]]
    table = token_changes(
        recording, split, doc_id, arrays.categories, (arrays.steps[0], arrays.steps[-1])
    )
    if table.empty:
        return
    table["label"] = [style.label(name) for name in table["category"]]
    table = table[table["position"] <= _MAX_TOKENS]
    names = [style.label(name) for name in arrays.categories if name in set(table["category"])]
    largest = max(float(table["change"].abs().max()), 1e-6)

    def build(width: float) -> Any:
        cell = cell_width(width, 1, style)
        color = alt.Color(
            "change:Q",
            scale=alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True),
            legend=alt.Legend(
                title="change (nats)", orient="bottom", gradientLength=min(200.0, width / 2)
            ),
        )
        x = alt.X(
            "position:O",
            title="token of the response",
            axis=alt.Axis(labelAngle=0, values=[1, *range(5, _MAX_TOKENS + 1, 5)]),
        )
        bars = (
            alt.Chart(table)
            .mark_bar()
            .encode(
                x=x,
                y=alt.Y("change:Q", title="nats"),
                color=color,
                tooltip=["token:N", "position:O", "change:Q"],
            )
        )
        size = min(style.font_size * 0.75, 0.8 * cell / table["position"].max())
        words = (
            alt.Chart(table)
            .mark_text(angle=270, align="left", dx=3, fontSize=size, baseline="middle")
            .encode(x=x, y=alt.Y("top:Q"), text="token:N")
        )
        layers = alt.layer(table_rule(table), bars, words, data=table).properties(
            width=cell, height=8 * style.font_size
        )
        return facet(layers, names, style, 1)

    subtitle = [
        f"Doc {doc_id}, step {arrays.steps[0]} to {arrays.steps[-1]}; at most {_MAX_TOKENS} "
        "tokens; one run"
    ]
    title = f"Change of each token of one doc, {SPLIT_NAMES[split]}"
    yield Figure(name=f"tokens_{split}", title=title, subtitle=subtitle, table=table, build=build)


def token_changes(
    recording: Recording, split: str, doc_id: str, categories: Sequence[str], steps: tuple[int, int]
) -> pd.DataFrame:
    """Rows `category position token change before after` of one doc, in nats; empty where tokens
    were not kept."""
    tokens = recording.tokens
    rows = recording.rows[(recording.rows["split"] == split) & (recording.rows["doc_id"] == doc_id)]
    found = []
    for category in categories:
        own = rows[rows["category"] == category]
        pair = [own.index[own["step"] == step] for step in steps]
        if tokens is None or any(len(index) != 1 for index in pair):
            continue
        before, after = (tokens[int(index[0])].as_py() or [] for index in pair)
        texts = token_texts(recording, doc_id, category) or [""] * len(before)
        if len(texts) != len(before) or len(before) != len(after):
            texts = [""] * min(len(before), len(after))
        for position, (text, first, last) in enumerate(
            zip(texts, before, after, strict=False), start=1
        ):
            found.append(
                {
                    "category": category,
                    "position": position,
                    "token": text,
                    "before": first,
                    "after": last,
                    "change": last - first,
                    "top": max(last - first, 0.0),
                }
            )
    return pd.DataFrame(found)
