"""`sft-probe plot`: every figure from one specification as PNG, SVG, PDF or HTML, and its numbers
as CSV."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.categories import (
    changes_chart,
    curves_of,
    levels_chart,
    parts_chart,
    parts_of,
    runs_chart,
)
from sft_probe.analysis.figures.docs import data_card, doc_lines, length_figure, token_figure
from sft_probe.analysis.figures.figure import Figure, Style
from sft_probe.analysis.figures.runs import benchmark_figure, code_length_figure, generation_figure
from sft_probe.analysis.stats.analyze import Analysis, analyze
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tables import write_tables
from sft_probe.errors import UserError
from sft_probe.files import make_dir

FORMATS = ("png", "svg", "pdf", "html")
DEFAULT_FORMATS = ("png", "svg", "pdf")
_LEVEL_BANDS = (
    "Around levels: the bands of the paired change, which are narrower than those of a level"
)
_BANDS = "Bands: 95 % for all categories and steps at once, over prompts"


def plot(
    paths: Sequence[Path],
    *,
    style: Style,
    categories: Sequence[str] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    include_eos: bool = False,
    out: Path | None = None,
) -> Iterator[Path]:
    """Writes all figures of the runs and yields the paths: into RUN/figures for one run, else into
    `figures`.

    Raises:
        UserError: there is nothing to draw.
    """
    if unknown := set(formats) - set(FORMATS):
        raise UserError(f"--format: {', '.join(sorted(unknown))} is none of {', '.join(FORMATS)}.")
    for path in paths:
        if (path / "probe").is_dir():
            write_tables(path)  # training writes no tables
    analysis = analyze(paths, include_eos=include_eos, categories=categories)
    own = paths[0] / "figures" if len(paths) == 1 and paths[0].is_dir() else Path("figures")
    folder = make_dir(out or own)
    for figure in (*figures_of(analysis, style), *code_length_figure(analysis.recordings, style)):
        yield from figure.save(folder, formats, style)


def figures_of(analysis: Analysis, style: Style) -> Iterator[Figure]:
    """The figures that these tables and rows allow, the data card first; all but
    `code_length_figure`."""
    recordings = analysis.recordings
    if len(recordings) > 1 or style.color != "category":
        yield from _of_several(analysis, style)
    else:
        for split in recordings[0].splits:
            yield from _of_one(analysis, recordings[0], split, style)
        yield from benchmark_figure(recordings[0], analysis.changes, style)
        yield from generation_figure(recordings[0], analysis.changes, style)


def _of_one(analysis: Analysis, recording: Recording, split: str, style: Style) -> Iterator[Figure]:
    table = curves_of(analysis.changes, analysis.measure, split, style)
    if table.empty:
        return
    categories = list(dict.fromkeys(table["category"]))
    subtitle = _subtitle(recording, split, table)
    what = f"log p(response | prompt) while fine-tuning on {recording.train_category or '?'}"
    marks = boundaries(recording)
    arrays = recording.cube(split, categories) if recording.means is None else None
    if arrays is not None:
        yield from data_card(recording, split, arrays, style)

    def both(width: float) -> Any:
        top = changes_chart(table, categories, marks, style, width)
        bottom = levels_chart(table, categories, style, width)
        return alt.vconcat(top, bottom, spacing=24).resolve_scale(
            color="independent", shape="independent"
        )

    about_levels = [*subtitle, _LEVEL_BANDS] if table["band_low"].notna().any() else subtitle
    yield Figure(
        name=f"trajectory_{split}", title=what, subtitle=about_levels, table=table, build=both
    )
    yield Figure(
        name=f"changes_{split}",
        title=f"Change of {what}",
        subtitle=subtitle,
        table=table,
        build=partial(changes_chart, table, categories, marks, style),
    )
    yield Figure(
        name=f"levels_{split}",
        title=what,
        subtitle=about_levels,
        table=table,
        build=partial(levels_chart, table, categories, style),
    )
    parts = parts_of(analysis.changes, split, style)
    if len(parts):
        yield Figure(
            name=f"parts_{split}",
            title=f"Where the change comes from, {SPLIT_NAMES[split]}",
            subtitle=[
                "Stacked: first token, body and terminator; red dot: their sum; means of one run"
            ],
            table=parts,
            build=partial(parts_chart, parts, categories, style),
        )
    if arrays is not None:
        yield from doc_lines(split, arrays, analysis.measure, style)
        yield from token_figure(recording, split, arrays, style)
        yield from length_figure(split, arrays, analysis.measure, style)


def _of_several(analysis: Analysis, style: Style) -> Iterator[Figure]:
    keys = pd.DataFrame(
        [
            {
                "run": item.name,
                "order_seed": item.order_seed,
                "train_category": item.train_category or "?",
                "model": item.model,
            }
            for item in analysis.recordings
        ]
    )
    for split in dict.fromkeys(analysis.changes["split"]):
        table = curves_of(analysis.changes, analysis.measure, str(split), style).merge(
            keys, on="run"
        )
        categories = list(dict.fromkeys(table["category"]))
        title = (
            f"Change of log p(response | prompt), {SPLIT_NAMES[str(split)]}, "
            f"{len(analysis.recordings)} runs"
        )
        subtitle = [f"{_BANDS} of one run; they say nothing of training noise"]
        if style.color == "category":
            yield Figure(
                name=f"changes_{split}",
                title=title,
                subtitle=subtitle,
                table=table,
                build=partial(changes_chart, table, categories, pd.DataFrame(), style),
            )
        else:
            yield Figure(
                name=f"changes_{split}_by_{style.color}",
                title=title,
                subtitle=subtitle,
                table=table,
                build=partial(runs_chart, table, categories, style),
            )


def boundaries(recording: Recording) -> pd.DataFrame:
    """Steps at which an epoch or the warm-up ends, as `step what`; drawn since curves bend
    there."""
    if recording.means is not None or not recording.manifest:
        return pd.DataFrame()
    last = recording.rows.sort_values("step").iloc[-1]
    marks = []
    if last["epoch"] and last["epoch"] > 0 and last["step"]:
        per_epoch = last["step"] / last["epoch"]
        marks += [
            (per_epoch * number, f"end of epoch {number}")
            for number in range(1, int(last["epoch"]) + 1)
        ]
    warmup = recording.manifest.get("arguments", {}).get("warmup_steps") or 0
    if 0 < warmup <= last["step"]:
        marks.append((float(warmup), "end of warm-up"))
    inside = [mark for mark in marks if mark[0] < last["step"]]
    return pd.DataFrame(inside, columns=["step", "what"]) if inside else pd.DataFrame()


def _subtitle(recording: Recording, split: str, table: pd.DataFrame) -> list[str]:
    sums = recording.sums(str(table["measure"].iloc[0]))
    docs = f"{int(table['num_docs'].max())} {SPLIT_NAMES[split]}"
    if recording.means is not None:
        return ["Means over prompts as published; no intervals"]
    probe = recording.probe
    lines = [
        f"Model {recording.model}; probe set {probe.get('probe_set', '?')}, {docs}; prompt format "
        f"{probe.get('prompt_format', '?')}; {probe.get('dtype', '?')}; sums {sums}",
        "Too few prompts for intervals"
        if table["stderr"].isna().all()
        else f"{_BANDS} of one run; they say nothing of training noise",
    ]
    return [*lines, *(note[0].upper() + note[1:] for note in recording.notes)]
