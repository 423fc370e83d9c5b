"""Figures of single docs: the data card, curves of docs, tokens of one doc, change by length."""

import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sft_probe.analysis.figures.figure import (
    Figure,
    Style,
    category_keys,
    panel_width,
    small_multiples,
    step_axis,
    ticks,
    zero_rule,
)
from sft_probe.analysis.stats.intervals import weighted_mean
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tokens import token_texts

_MAX_LINES = 60
_MAX_TOKENS = 48
_WORD_EMS = 4
_LENGTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHANGES = (0.1, 0.5, 0.9)


def data_card(recording: Recording, split: str, arrays: Cube, style: Style) -> Iterator[Figure]:
    """Yield the figure of lengths, leading spaces, duplicates and writers of the responses."""
    table = _card(recording, arrays, style)
    keys = category_keys(arrays.categories, style, legend=False)
    order = list(keys.colors)

    def build(width: float) -> Any:
        height = 2.2 * style.font_size * len(order)
        ems = {"repeated": 5.0, "leading space": 6.5, "writer": 20.0}
        if style.width < 400:
            del ems["writer"]
        left = width - style.font_size * (sum(ems.values()) + 6)
        return alt.hconcat(
            _length_boxes(table, keys.color, order, style).properties(
                width=max(left, 60.0), height=height
            ),
            *(
                _card_column(table, title, order, style).properties(
                    width=letters * style.font_size, height=height
                )
                for title, letters in ems.items()
            ),
            spacing=4,
        )

    dropped = len(recording.probe.get("dropped", []))
    subtitle = [
        f"{len(arrays.doc_ids)} {SPLIT_NAMES[split]} in {arrays.cluster_text}; {dropped} docs left "
        "out",
        "Bars: middle half of the lengths; white tick: median; line: 5 to 95 %",
    ]
    yield Figure(
        name=f"data_card_{split}", title="Data card", subtitle=subtitle, table=table, build=build
    )


def _length_boxes(table: pd.DataFrame, color: alt.Color, order: list[str], style: Style) -> Any:
    """Return a box of lengths for each category."""
    y = alt.Y("label:N", sort=order, title=None)
    base = alt.Chart(table).encode(y=y)
    x = alt.X(
        "q05:Q", title="tokens per response", scale=alt.Scale(zero=False, nice=True, padding=4)
    )
    whisker = base.mark_rule(strokeWidth=1).encode(x=x, x2="q95:Q", color=color)
    box = base.mark_bar(height=style.font_size).encode(x="q25:Q", x2="q75:Q", color=color)
    median = base.mark_tick(color="white", thickness=2, height=style.font_size).encode(x="q50:Q")
    return alt.layer(whisker, box, median)


def _card_column(table: pd.DataFrame, title: str, order: list[str], style: Style) -> Any:
    """Return a column of text beside the boxes."""
    head = alt.TitleParams(
        title, fontSize=style.font_size * 0.95, fontWeight="normal", anchor="start"
    )
    text = alt.Chart(table).mark_text(align="left", fontSize=style.font_size * 0.9)
    return text.encode(
        y=alt.Y("label:N", sort=order, axis=None),
        x=alt.value(0),
        text=f"{title.replace(' ', '_')}_text:N",
    ).properties(title=head, view={"stroke": None})


def _card(recording: Recording, arrays: Cube, style: Style) -> pd.DataFrame:
    """Return a row of the data card for each category."""
    writers = recording.probe_set.manifest.get("categories", {}) if recording.probe_set else {}
    rows: list[dict[str, object]] = []
    for number, category in enumerate(arrays.categories):
        lengths = arrays.at_start("num_tokens")[:, number, 0]
        if np.isnan(lengths).all():
            lengths = arrays.at_start("num_bytes")[:, number, 0]
        lengths = lengths[~np.isnan(lengths)]
        texts = [
            recording.texts[name][category]
            for name in arrays.doc_ids
            if category in recording.texts.get(name, {})
        ]
        spaces = [text[:1].isspace() for text in texts]
        quantiles = np.quantile(lengths, _LENGTHS) if len(lengths) else [np.nan] * len(_LENGTHS)
        rows.append(
            {
                "category": category,
                "label": style.label(category),
                "writer": str(writers.get(category, "?")),
                "num_docs": len(arrays.doc_ids),
                "mean_bytes": float(weighted_mean(arrays.at_start("num_bytes")[:, number, 0])),
                **dict(zip(("q05", "q25", "q50", "q75", "q95"), quantiles, strict=True)),
                "repeated": 1 - len(set(texts)) / len(texts) if texts else np.nan,
                "leading_space": np.mean(spaces) if texts else np.nan,
            }
        )
    table = pd.DataFrame(rows)
    for name in ("repeated", "leading_space"):
        table[f"{name}_text"] = [
            "?" if np.isnan(share) else f"{100 * share:.0f} %" for share in table[name]
        ]
    short = [textwrap.shorten(writer, 44, placeholder="...") for writer in table["writer"]]
    return table.assign(writer_text=short)


def doc_curves(split: str, arrays: Cube, measure: str, style: Style) -> Iterator[Figure]:
    """Yield the figure of the change of single docs, with quantiles of all."""
    shown = np.unique(np.linspace(0, len(arrays.doc_ids) - 1, _MAX_LINES).astype(int))
    table = _doc_table(arrays, arrays.change(measure), shown, style)
    keys = category_keys(arrays.categories, style, legend=False)

    def build(width: float) -> Any:
        x = step_axis(arrays.steps, "step (log)", style.num_ticks(panels=True))
        y = alt.Y("change:Q", title="nats per response")
        base = alt.Chart(table).encode(x=x, y=y, detail="doc_id:N")
        single = base.transform_filter("!isValid(datum.quantile)").mark_line(
            strokeWidth=0.6, opacity=0.35
        )
        quantiles = base.transform_filter("isValid(datum.quantile)").mark_line(
            color="black", strokeWidth=1.4
        )
        scale = alt.Scale(domain=_CHANGES, range=[[3, 2], [1, 0], [3, 2]])
        layers = alt.layer(
            zero_rule(table),
            single.encode(color=keys.color, tooltip=["doc_id:N", "step:Q", "change:Q"]),
            quantiles.encode(strokeDash=alt.StrokeDash("quantile:N", scale=scale, legend=None)),
            data=table,
        )
        return small_multiples(layers, list(keys.colors), style, width)

    yield Figure(
        name=f"docs_{split}",
        title=f"Change of single docs, {SPLIT_NAMES[split]}",
        subtitle=[
            f"Thin: {len(shown)} of {len(arrays.doc_ids)} docs; black: median, dashed: 10 and 90 % "
            "of all docs; one run"
        ],
        table=table,
        build=build,
    )


def _doc_table(arrays: Cube, change: np.ndarray, shown: np.ndarray, style: Style) -> pd.DataFrame:
    """Return the change of each doc that is shown at up to 8 steps, then quantiles of all docs."""
    rows: list[dict[str, object]] = []
    for number, category in enumerate(arrays.categories):
        for step in ticks(arrays.steps):
            values = change[:, number, arrays.steps.index(step)]
            row = {"category": category, "label": style.label(category), "step": step}
            rows += [{**row, "doc_id": arrays.doc_ids[doc], "change": values[doc]} for doc in shown]
            if not np.isnan(values).all():
                rows += [
                    {
                        **row,
                        "doc_id": f"quantile {q:g}",
                        "change": np.nanquantile(values, q),
                        "quantile": q,
                    }
                    for q in _CHANGES
                ]
    return pd.DataFrame(rows)


def length_figure(split: str, arrays: Cube, measure: str, style: Style) -> Iterator[Figure]:
    """Yield the figure of the last change of each doc against the length of its response."""
    lengths, change = arrays.at_start("num_tokens")[:, :, 0], arrays.change(measure)[:, :, -1]
    if np.isnan(lengths).all():
        return
    rows = [
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
    table = pd.DataFrame(rows).dropna()
    keys = category_keys(arrays.categories, style, legend=False)

    def build(width: float) -> Any:
        scale = alt.Scale(zero=False, nice=True)
        x = alt.X("num_tokens:Q", title="tokens of the response", scale=scale)
        base = alt.Chart(table).encode(x=x, y=alt.Y("change:Q", title="nats per response"))
        points = base.mark_circle(size=18, opacity=0.6).encode(
            color=keys.color, tooltip=["doc_id:N", "num_tokens:Q", "change:Q"]
        )
        line = base.transform_regression("num_tokens", "change", groupby=["label"]).mark_line(
            color="black", strokeWidth=1.2
        )
        layers = alt.layer(zero_rule(table), points, line, data=table)
        return small_multiples(layers, list(keys.colors), style, width)

    yield Figure(
        name=f"length_{split}",
        title=f"Change by step {arrays.steps[-1]} against length, {SPLIT_NAMES[split]}",
        subtitle=["A dot is a doc; line: least squares; one run"],
        table=table,
        build=build,
    )


def token_figure(recording: Recording, split: str, arrays: Cube, style: Style) -> Iterator[Figure]:
    """Yield the figure of the change of each token of one doc: the one whose change is the median
    of the training category's."""
    if recording.tokens is None:
        return
    own = recording.train_category
    number = arrays.categories.index(own) if own in arrays.categories else 0
    change = arrays.change("logprob")[:, number, -1]
    known = np.flatnonzero(~np.isnan(change))
    if not len(known):
        return
    doc_id = arrays.doc_ids[known[np.argsort(change[known])[len(known) // 2]]]
    first, last = arrays.steps[0], arrays.steps[-1]
    rows = recording.rows[recording.rows["doc_id"] == doc_id]
    table = _token_table(recording, rows[rows["split"] == split], doc_id, arrays, style)
    if table.empty:
        return
    names = list(dict.fromkeys(table["label"]))
    yield Figure(
        name=f"tokens_{split}",
        title=f"Change of each token of one doc, {SPLIT_NAMES[split]}",
        subtitle=[f"Doc {doc_id}, step {first} to {last}; at most {_MAX_TOKENS} tokens; one run"],
        table=table,
        build=partial(_token_chart, table, names, style),
    )


def _token_table(
    recording: Recording, rows: pd.DataFrame, doc_id: str, arrays: Cube, style: Style
) -> pd.DataFrame:
    """Return rows `category label position token before after change top` of one doc, in nats."""
    levels = token_levels(recording, rows)
    tables = []
    for category in arrays.categories:
        ends = [levels.get(category, {}).get(arrays.steps[point]) for point in (0, -1)]
        if ends[0] is None or ends[1] is None or len(ends[0]) != len(ends[1]):
            continue
        words = token_texts(recording, doc_id, category)
        table = pd.DataFrame({"before": ends[0], "after": ends[1]})
        tables.append(
            table.assign(
                category=category,
                label=style.label(category),
                position=table.index + 1,
                token=words if len(words) == len(table) else "",
                change=table["after"] - table["before"],
            )[:_MAX_TOKENS]
        )
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables, ignore_index=True).assign(top=lambda own: own["change"].clip(lower=0))


def _token_chart(table: pd.DataFrame, names: Sequence[str], style: Style, width: float) -> Any:
    """Return a row of bars for each category, with the token above each bar."""
    largest = max(float(table["change"].abs().max()), 1e-6)
    scale = alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True)
    legend = alt.Legend(title="change (nats)", gradientLength=min(200.0, width / 2))
    axis = alt.Axis(labelAngle=0, values=[1, *range(5, _MAX_TOKENS + 1, 5)])
    base = alt.Chart(table).encode(x=alt.X("position:O", title="token of the response", axis=axis))
    low, high = min(float(table["change"].min()), 0.0), float(table["top"].max())
    room = (high - low) * _WORD_EMS / 5  # for words above the highest bar
    y = alt.Y("change:Q", title="nats", scale=alt.Scale(domain=[low, high + room], nice=False))
    bars = base.mark_bar().encode(
        y=y,
        color=alt.Color("change:Q", scale=scale, legend=legend),
        tooltip=["token:N", "position:O", "change:Q"],
    )
    space = 0.8 * panel_width(width, 1, style) / table["position"].max()
    words = base.mark_text(
        angle=270,
        align="left",
        baseline="middle",
        dx=3,
        fontSize=min(style.font_size * 0.75, space),
        limit=_WORD_EMS * style.font_size,
    ).encode(y="top:Q", text="token:N")
    layers = alt.layer(zero_rule(table), bars, words, data=table)
    height = (_WORD_EMS + 5) * style.font_size
    return small_multiples(layers, names, style, width, max_columns=1, height=height)


def token_levels(
    recording: Recording, rows: pd.DataFrame, column: str = "token_logprobs"
) -> dict[str, dict[int, list[float]]]:
    """Return one column of each token by category and step.

    Args:
        recording: the run; nothing is returned where it did not keep its tokens.
        rows: its score rows of one doc and split.
        column: `token_logprobs`, or one of `TOKEN_COLUMNS`.
    """
    found: dict[str, dict[int, list[float]]] = {}
    if recording.tokens is not None:
        values = recording.tokens[column]
        places = zip(rows.index, rows["category"], rows["step"], strict=True)
        for index, category, step in places:
            levels = values[int(index)].as_py()
            if levels:
                found.setdefault(str(category), {})[int(step)] = levels
    return found
