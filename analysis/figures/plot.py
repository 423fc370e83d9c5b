"""`sft-probe plot`: every figure from one specification in any format, with its numbers as CSV."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.figures.benchmarks import benchmark_figure
from sft_probe.analysis.figures.categories import (
    changes_chart,
    curves_of,
    levels_chart,
    parts_chart,
    parts_of,
    runs_chart,
)
from sft_probe.analysis.figures.distribution import (
    DISTANCES,
    distance_figure,
    forgetting_figure,
    squeezing_figure,
)
from sft_probe.analysis.figures.docs import data_card, doc_curves, length_figure, token_figure
from sft_probe.analysis.figures.figure import Figure, Style
from sft_probe.analysis.figures.names import DEFAULT_FORMATS
from sft_probe.analysis.figures.runs import (
    code_length_figure,
    comparison_figures,
    generation_figure,
)
from sft_probe.analysis.stats.analyze import Analysis, analyze
from sft_probe.analysis.stats.comparison import cautions
from sft_probe.analysis.stats.intervals import MIN_CLUSTERS
from sft_probe.analysis.stats.places import named_path
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tables import write_tables
from sft_probe.errors import UserError
from sft_probe.files import make_dir

log = logging.getLogger(__name__)

_MAX_EPOCHS = 12
_LEVEL_BANDS = (
    "Around levels: the bands of the paired change, which are narrower than those of a level"
)
_BANDS = "Bands: 95 % for all categories and steps at once, over prompts"


def plot(
    paths: Sequence[Path],
    *,
    style: Style,
    figures: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    include_eos: bool = False,
    chain: bool = False,
    out: Path | None = None,
) -> Iterator[Path]:
    """Write figures of runs and yield their paths: into RUN/figures for one run, else into
    `figures`.

    Args:
        paths: runs, or what else `load_recording` reads.
        style: how the figures look.
        figures: of `FIGURES`; default: all that the runs allow.
        categories: default: all.
        formats: of `FORMATS`.
        include_eos: whether sums count the terminator.
        chain: whether the runs are stages of one training.
        out: folder of the figures.

    Raises:
        UserError: there is nothing to draw.
    """
    folders = [named_path(path)[1] for path in paths]
    for path in folders:
        if (path / "probe").is_dir():
            write_tables(path)  # training writes no tables
    analysis = analyze(paths, include_eos=include_eos, categories=categories, chain=chain)
    if style.color != "category" and not share_steps(analysis.recordings):
        reason = cautions(analysis.recordings)[0]
        raise UserError(f"--color {style.color} puts all runs on one axis, but {reason}.")
    own = folders[0] / "figures" if len(paths) == 1 and folders[0].is_dir() else Path("figures")
    folder = make_dir(out or own)
    drawn = set()
    for figure in figures_of(analysis, style, figures):
        drawn.add(figure.name)
        yield from figure.save(folder, formats, style)
    missing = [name for name in figures or () if not any(found.startswith(name) for found in drawn)]
    if missing:
        log.warning("nothing to draw of these runs: %s", ", ".join(missing))


def share_steps(recordings: Sequence[Recording]) -> bool:
    """Return whether the steps of all runs with scores count the same."""
    return len({recording.step_unit for recording in recordings if recording.splits}) < 2


def figures_of(
    analysis: Analysis, style: Style, wanted: Collection[str] | None = None
) -> Iterator[Figure]:
    """Yield the figures that these tables and rows allow, the data card first.

    Args:
        analysis: the tables of some runs.
        style: how the figures look.
        wanted: of `FIGURES`; default: all.
    """
    recordings = analysis.recordings
    if len(recordings) > 1 or style.color != "category":
        makers = dict(_makers_of_several(analysis, style))
    else:
        makers = dict(_makers_of_one(analysis, recordings[0], style))
    makers["forgetting", ""] = partial(forgetting_figure, analysis.items, style)
    makers["code_length", ""] = partial(code_length_figure, recordings, style)
    for (name, _), make in makers.items():
        if not wanted or name in wanted:
            yield from make()


_Makers = Iterator[tuple[tuple[str, str], Callable[[], Iterable[Figure]]]]


def _makers_of_one(analysis: Analysis, recording: Recording, style: Style) -> _Makers:
    """Yield ((name, split), what makes the figures) of one run; nothing is drawn yet."""
    changes = analysis.changes
    for split in recording.splits:
        table = curves_of(changes, analysis.measure, split, style)
        if table.empty:
            continue
        categories = list(dict.fromkeys(table["category"]))
        if recording.means is None:
            arrays = recording.cube(split, categories)
            yield ("data_card", split), partial(data_card, recording, split, arrays, style)
        for name in ("trajectory", "changes", "levels"):
            yield (name, split), partial(_curve_figure, name, recording, split, table, style)
        yield ("parts", split), partial(_parts_figure, changes, split, categories, style)
        yield (
            ("squeezing", split),
            partial(squeezing_figure, table, analysis.distribution, split, style),
        )
        reference = str(recording.probe.get("reference") or "another model")
        for name in DISTANCES:
            yield (
                (name, split),
                partial(distance_figure, name, analysis.distribution, reference, split, style),
            )
        if recording.means is None:
            measure = analysis.measure
            yield ("docs", split), partial(doc_curves, split, arrays, measure, style)
            yield ("tokens", split), partial(token_figure, recording, split, arrays, style)
            yield ("length", split), partial(length_figure, split, arrays, measure, style)
    yield ("benchmarks", ""), partial(benchmark_figure, recording, changes, style)
    yield ("generations", ""), partial(generation_figure, recording, changes, style)


def _curve_figure(
    name: str, recording: Recording, split: str, table: pd.DataFrame, style: Style
) -> Iterator[Figure]:
    """Yield the figure of changes, of levels, or of both (`trajectory`) of one run and split."""
    categories = list(dict.fromkeys(table["category"]))
    marks = boundaries(recording)

    def top(width: float) -> Any:
        return changes_chart(table, categories, marks, style, width)

    def bottom(width: float) -> Any:
        return levels_chart(table, categories, style, width)

    def both(width: float) -> Any:
        charts = alt.vconcat(top(width), bottom(width), spacing=24)
        return charts.resolve_scale(
            color="independent", shape="independent", strokeDash="independent"
        )

    subtitle = _subtitle(recording, split, table)
    if name != "changes" and table["band_low"].notna().any():
        subtitle.append(_LEVEL_BANDS)
    what = f"log p(response | prompt) while fine-tuning on {recording.trained_on}"
    yield Figure(
        name=f"{name}_{split}",
        title=f"Change of {what}" if name == "changes" else what,
        subtitle=subtitle,
        table=table,
        build={"trajectory": both, "changes": top, "levels": bottom}[name],
    )


def _parts_figure(
    changes: pd.DataFrame, split: str, categories: Sequence[str], style: Style
) -> Iterator[Figure]:
    """Yield the figure of first token, body and terminator, where they are known."""
    table = parts_of(changes, split, style)
    if len(table):
        yield Figure(
            name=f"parts_{split}",
            title=f"Where the change comes from, {SPLIT_NAMES[split]}",
            subtitle=[
                "Stacked: first token, body and terminator; red dot: their sum; means of one run"
            ],
            table=table,
            build=partial(parts_chart, table, categories, style),
        )


def _makers_of_several(analysis: Analysis, style: Style) -> _Makers:
    """Yield ((name, split), what makes the figure) of several runs."""
    for split in dict.fromkeys(str(name) for name in analysis.changes["split"]):
        yield ("changes", split), partial(_runs_figure, analysis, split, style)
    if analysis.comparison is not None:
        yield ("comparison", ""), partial(comparison_figures, analysis.comparison, style)


def _runs_figure(analysis: Analysis, split: str, style: Style) -> Iterator[Figure]:
    """Yield the changes of several runs: a panel for each run, or, with `style.color`, for each
    category."""
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
    table = curves_of(analysis.changes, analysis.measure, split, style).merge(keys, on="run")
    categories = list(dict.fromkeys(table["category"]))
    by_run = style.color == "category"
    yield Figure(
        name=f"changes_{split}" if by_run else f"changes_{split}_by_{style.color}",
        title=(
            f"Change of log p(response | prompt), {SPLIT_NAMES[split]}, "
            f"{len(analysis.recordings)} runs"
        ),
        subtitle=[
            _bands_text(table),
            *(f"{text[0].upper()}{text[1:]}" for text in cautions(analysis.recordings)),
        ],
        table=table,
        build=partial(changes_chart, table, categories, pd.DataFrame(), style)
        if by_run
        else partial(runs_chart, table, categories, style),
    )


def boundaries(recording: Recording) -> pd.DataFrame:
    """Return the steps at which an epoch or the warm-up ends, as `step what`: curves bend there. Of
    a chain, where its stages start.

    Of over 12 epochs none is marked, since the rules would hide the curves.
    """
    if recording.stages:
        return pd.DataFrame(recording.stages, columns=["step", "what"])
    if recording.means is not None or not recording.manifest:
        return pd.DataFrame()
    last = recording.rows.sort_values("step").iloc[-1]
    marks = []
    if last["step"] and 0 < (last["epoch"] or 0) <= _MAX_EPOCHS:
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


def _bands_text(table: pd.DataFrame) -> str:
    """Return what the bands of one run are, or why none is drawn."""
    if not table["num_docs"].any():
        return "Means over prompts as published; no intervals"
    if table["stderr"].isna().all():
        return "Too few prompts for intervals"
    if table["band_low"].isna().all():
        return f"Too few prompts for bands (under {MIN_CLUSTERS} effective clusters)"
    return f"{_BANDS} of one run; they say nothing of training noise"


def _subtitle(recording: Recording, split: str, table: pd.DataFrame) -> list[str]:
    """Return what a reader must know of the curves of one run."""
    sums = recording.sums(str(table["measure"].iloc[0]))
    docs = f"{int(table['num_docs'].max())} {SPLIT_NAMES[split]}"
    if recording.means is not None:
        return ["Means over prompts as published; no intervals"]
    probe = recording.probe
    lines = [
        f"Model {recording.model}; probe set {probe.get('probe_set', '?')}, {docs}; prompt format "
        f"{probe.get('prompt_format', '?')}; {probe.get('dtype', '?')}; sums {sums}",
        _bands_text(table),
    ]
    return [*lines, *(note[0].upper() + note[1:] for note in recording.notes)]
