"""`sft-probe analyze`: the verdict table, printed, and tidy tables beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.benchmarks import shown_benchmarks
from sft_probe.analysis.stats.chain import chained
from sft_probe.analysis.stats.changes import (
    COLUMNS,
    HEADLINES,
    PER_TOKEN,
    change_table,
    groups_of_runs,
    table_over_runs,
)
from sft_probe.analysis.stats.clusters import count_text
from sft_probe.analysis.stats.comparison import (
    Comparison,
    cautions,
    compare_recordings,
    comparison_text,
)
from sft_probe.analysis.stats.contrasts import contrast_table, pmi_sentence
from sft_probe.analysis.stats.distribution import (
    distribution_table,
    distribution_text,
    squeezing_sentence,
)
from sft_probe.analysis.stats.generations import generations_text
from sft_probe.analysis.stats.items import item_table, shown_items
from sft_probe.analysis.stats.measures import PARTS
from sft_probe.analysis.stats.places import named_path
from sft_probe.analysis.stats.runs import (
    SPLIT_NAMES,
    Recording,
    load_recordings,
)
from sft_probe.analysis.stats.verdict import cluster_warnings, share_text, verdict_table
from sft_probe.errors import UserError, check_names, doing
from sft_probe.files import make_dir, write_text
from sft_probe.probe_set import SPLITS
from sft_probe.scores import write_parquet
from sft_probe.text_table import Form, Shown, interval, number, p_value, shown_text, text_table

_COLUMNS = (
    *("category", "start", "change", "95 % interval", "sign", "p (Holm)", "body", "peak", "at"),
    *("half at", "first/body/EOS", "rank", "SE"),
)

_PAPER_COLUMNS = ("category", "start", "change", "change per token", "p")
_ONE_RUN = "intervals hold for other prompts; this is one run, so they leave out training noise"
_TABLES = ("changes", "contrasts", "distribution", "items", "over_runs", "verdict")
FEW_RUNS_COVERAGE = {2: 0.87, 3: 0.92}
"""At worst, where the variance between runs is 10 to 30 times that over prompts: docs/claims.md"""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All tables of some runs."""

    recordings: list[Recording]
    measure: str
    """`logprob`, or `logprob_with_eos`."""
    changes: pd.DataFrame
    verdict: pd.DataFrame
    contrasts: pd.DataFrame
    distribution: pd.DataFrame
    """Changes of argmax mass, entropy and others; empty where rows have no such columns."""
    items: pd.DataFrame
    """Single items of benchmarks; empty without samples of them."""
    over_runs: pd.DataFrame
    comparison: Comparison | None = None
    """The first run less the second one, where there are two."""


def analyze(
    paths: Sequence[Path],
    *,
    include_eos: bool = False,
    categories: Sequence[str] | None = None,
    chain: bool = False,
) -> Analysis:
    """Read runs or files and compute their tables.

    Args:
        paths: what `load_recording` reads.
        include_eos: the headline is the sum with the terminator.
        categories: default: all.
        chain: take them as stages of one training, as `chained` does.

    Raises:
        UserError: one of them holds no scores, or those of one step only.
    """
    with doing("reading scores and computing intervals"):
        recordings = load_recordings(paths)
        if chain:
            recordings = [chained(recordings)]
        return tables_of(recordings, include_eos=include_eos, categories=categories)


def tables_of(
    recordings: list[Recording],
    *,
    include_eos: bool = False,
    categories: Sequence[str] | None = None,
) -> Analysis:
    """Compute the tables of runs that were read; arguments as for `analyze`."""
    _check_categories(recordings, categories or ())
    measure = common_measure(recordings, include_eos=include_eos)
    tables = [change_table(recording, categories) for recording in recordings if recording.splits]
    changes = pd.concat(tables or [pd.DataFrame(columns=COLUMNS)], ignore_index=True)
    contrasts = [contrast_table(recording, measure) for recording in recordings]
    distribution = [distribution_table(recording, categories) for recording in recordings]
    groups = [
        table_over_runs(group, measure, categories).assign(
            model=group[0].model,
            train_category=group[0].train_category,
            order_seeds=", ".join(recording.order_seed for recording in group),
            runs=", ".join(recording.name for recording in group),
        )
        for group in groups_of_runs(recordings)
    ]
    return Analysis(
        recordings=recordings,
        measure=measure,
        changes=changes,
        verdict=verdict_table(changes, measure),
        contrasts=pd.concat(contrasts, ignore_index=True),
        distribution=pd.concat(distribution, ignore_index=True),
        items=pd.concat([item_table(recording) for recording in recordings], ignore_index=True),
        over_runs=pd.concat(groups, ignore_index=True) if groups else pd.DataFrame(),
        comparison=compare_recordings(recordings[0], recordings[1], measure, categories)
        if len(recordings) == 2
        else None,
    )


def common_measure(recordings: Sequence[Recording], *, include_eos: bool = False) -> str:
    """Return the log-prob that all runs have: without the terminator, where that is known.

    Raises:
        UserError: there is none, or only one with the terminator, which was not asked for; names
            the runs.
    """
    probed = [recording for recording in recordings if recording.splits]
    plain, whole = ([run.name for run in probed if run.has(name)] for name in HEADLINES)
    if include_eos or not plain:
        for run in probed:
            if not run.has("logprob_with_eos"):
                raise UserError(
                    f"{run.path} has no scores of the terminator: leave out --include-eos."
                )
        return "logprob_with_eos"
    if others := [run.name for run in probed if run.name not in plain]:
        remedy = "Give --include-eos, to count it in everywhere."
        if lacking := [name for name in plain if name not in whole]:
            remedy = f"{', '.join(lacking)} has no scores of it: they cannot be shown together."
        raise UserError(f"sums of {', '.join(others)} hold the terminator, as published. {remedy}")
    return "logprob"


def _check_categories(recordings: Sequence[Recording], categories: Sequence[str]) -> None:
    known = {name: None for run in recordings for split in SPLITS for name in run.categories(split)}
    check_names("--categories", "category", categories, list(known))


def write_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Write every table that is not empty as CSV and parquet; return the paths.

    They are `changes`, `contrasts`, `distribution`, `verdict`, with repeats of a run `over_runs`,
    and for two runs `comparison`, `comparison_benchmarks` and `comparison_settings`.
    """
    make_dir(folder)
    tables = {name: getattr(analysis, name) for name in _TABLES}
    if (found := analysis.comparison) is not None:
        tables["comparison"] = found.table
        tables["comparison_benchmarks"] = found.benchmarks
        tables["comparison_settings"] = found.settings
    written = []
    for name, table in tables.items():
        if table.empty:
            continue
        write_parquet(folder / f"{name}.parquet", pa.Table.from_pandas(table, preserve_index=False))
        write_text(folder / f"{name}.csv", table.round(6).to_csv(index=False))
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    return written


def default_folder(paths: Sequence[Path]) -> Path | None:
    """Return where the tables go: `RUN/analysis` for one run, `tables` for several, and nowhere for
    one file."""
    if len(paths) > 1:
        return Path("tables")
    path = named_path(paths[0])[1]
    return path / "analysis" if path.is_dir() else None


def verdict_text(analysis: Analysis, form: Form = "text") -> str:
    """Return what `sft-probe analyze` prints: tables in that form, sentences and notes."""
    blocks = []
    for recording in analysis.recordings:
        own = analysis.verdict[analysis.verdict["run"] == recording.name]
        for split, rows in own.groupby("split", sort=False):
            blocks.append(_block(recording, str(split), rows, analysis, form))
            blocks.append(distribution_text(analysis.distribution, recording, str(split), form))
        blocks += [
            shown_text(shown, form, left=2) for shown in benchmark_tables(analysis, recording)
        ]
        if recording.generations is not None:
            blocks.append(generations_text(recording.generations))
        blocks.append("\n".join(f"! {note}" for note in (*recording.notes, *_scope(recording))))
    blocks.append("\n".join(f"! {caution}" for caution in cautions(analysis.recordings)))
    blocks.append(over_runs_text(analysis.over_runs, form))
    if analysis.comparison is not None:
        blocks.append(comparison_text(analysis.comparison, form))
    return "\n\n".join(block for block in blocks if block)


def benchmark_tables(analysis: Analysis, recording: Recording) -> list[Shown]:
    """Return what is printed of the benchmarks of a run: changes paired by item where the items are
    known, else those of results alone."""
    items, others = analysis.items, recording.benchmarks
    if len(items):
        items = items[items["run"] == recording.name]
    if len(items) and others is not None:
        known = {*zip(items["task"], items["metric"], strict=True)}
        known |= {(task, "bits_per_byte") for task in items["task"]}
        places = zip(others["task"], others["metric"], strict=True)
        others = others[[place not in known for place in places]]
    found = (shown_items(items), shown_benchmarks(others, recording.step_unit))
    return [shown for shown in found if shown]


def verdict_tables(analysis: Analysis, form: Form) -> str:
    """Return the tables alone in a form for a paper or a spreadsheet, one after the other.

    As LaTeX each has the columns that fit a page, with intervals beside the changes.
    """
    tables = []
    for _, rows in analysis.verdict.groupby(["run", "split"], sort=False):
        if form == "latex":
            cells = [_paper_cells(row, analysis.changes) for _, row in rows.iterrows()]
            tables.append(text_table(_PAPER_COLUMNS, cells, form))
        else:
            tables.append(text_table(_COLUMNS, [_cells(row) for _, row in rows.iterrows()], form))
    return "\n\n".join(tables)


def _paper_cells(row: "pd.Series[Any]", changes: pd.DataFrame) -> list[str]:
    """Return a row of the verdict as a paper prints it, by `_PAPER_COLUMNS`."""
    place = {"run": row["run"], "split": row["split"], "category": row["category"]}
    place |= {"step": row["last_step"], "unit": PER_TOKEN}
    found = changes[(changes[list(place)] == pd.Series(place)).all(axis=1)]
    body = found.iloc[0] if len(found) else {"change": math.nan, "low": math.nan, "high": math.nan}
    return [
        str(row["category"]),
        number(row["start"], ".1f"),
        _with_interval(row, "+.1f"),
        _with_interval(body, "+.3f"),
        p_value(row["p_holm"]),
    ]


def _with_interval(row: Any, form: str) -> str:
    """Return a change and its interval as `+1.2 [+0.3, +2.1]`; the change alone without one."""
    ends = "" if math.isnan(row["low"]) else " " + interval(row["low"], row["high"], form)
    return number(row["change"], form) + ends


def p_note(rows: pd.DataFrame) -> str:
    """Return what p is adjusted for, where there is one.

    Args:
        rows: of the verdict, of one run and split.
    """
    count = int(rows["p_holm"].notna().sum())
    if count < 2:
        return ""
    return (
        f"p is adjusted for the {count} categories shown (Holm); each interval is for its category "
        'alone. So a category may "not change clearly" although its interval leaves out 0.'
    )


def _scope(recording: Recording) -> list[str]:
    """Return what the intervals of one run hold for; nothing where only means are known."""
    return [_ONE_RUN] if len(recording.rows) else []


def notes_of(recording: Recording, verdict: pd.DataFrame) -> list[str]:
    """Return the notes of a recording, what its clusters cost, and what one run cannot say.

    Args:
        recording: a run.
        verdict: its rows of the verdict.
    """
    if recording.rows.empty:
        return list(recording.notes)
    warnings = [
        f"{SPLIT_NAMES[str(split)]}: {warning}"
        for split, rows in verdict.groupby("split", sort=False)
        for warning in cluster_warnings(rows)
    ]
    return [*recording.notes, *warnings, *_scope(recording)]


def sentences_of(rows: pd.DataFrame, analysis: Analysis) -> list[str]:
    """Return the sentences on one run and split: one per category, one on what hangs on the
    prompt, and one where argmax mass rises while categories fall.

    Args:
        rows: of the verdict.
        analysis: all tables.
    """
    pmi = pmi_sentence(analysis.contrasts, str(rows["run"].iloc[0]), str(rows["split"].iloc[0]))
    more = [
        sentence for sentence in (pmi, squeezing_sentence(rows, analysis.distribution)) if sentence
    ]
    return [
        *rows["sentence"],
        *(f"{sentence}; intervals over prompts; one run" for sentence in more),
    ]


def _block(
    recording: Recording, split: str, rows: pd.DataFrame, analysis: Analysis, form: Form
) -> str:
    """Return head, warnings, table and sentences of one run and split."""
    first = rows.iloc[0]
    docs = count_text(rows["num_docs"].to_numpy(), SPLIT_NAMES[split])
    docs += f" in {count_text(rows['num_clusters'].to_numpy())}"
    if recording.means is not None:
        docs = "means over an unknown number of prompts"
    return "\n".join(
        [
            f"{recording.name}: model {recording.model}, trained on {recording.trained_on}; {docs}",
            f"change of log p(response | prompt) from {recording.step_unit} {first['first_step']} "
            f"to {first['last_step']}, nats per response {recording.sums(analysis.measure)}",
            *(f"! {warning}" for warning in cluster_warnings(rows)),
            "",
            text_table(_COLUMNS, [_cells(row) for _, row in rows.iterrows()], form),
            p_note(rows),
            "",
            *(f"- {sentence}" for sentence in sentences_of(rows, analysis)),
        ]
    )


def _cells(row: "pd.Series[Any]") -> list[str]:
    """Return a row of the verdict as it is printed, by `_COLUMNS`."""
    shares = [share_text(row, part) for part in PARTS]
    return [
        str(row["category"]),
        number(row["start"], ".1f"),
        number(row["change"], "+z.1f"),
        interval(row["low"], row["high"]),
        row["sign"],
        p_value(row["p_holm"]),
        number(row["body"], "+z.1f"),
        number(row["peak"], "+z.1f"),
        str(row["peak_step"]),
        number(row["half_step"], ".1f"),
        "-" if "-" in shares else "/".join(shares) + " %",
        number(row["rank"], ".0f"),
        number(row["stderr"], ".2f"),
    ]


def over_runs_text(table: pd.DataFrame, form: Form = "text") -> str:
    """Return the last step of the means over runs; empty without."""
    if table.empty:
        return ""
    blocks = []
    for (runs, split), part in table.groupby(["runs", "split"], sort=False):
        last = part[part["step"] == part["step"].max()]
        first = last.iloc[0]
        head = (
            f"mean of {first['num_runs']} runs of {first['model']} on {first['train_category']} "
            f"that differ in their order seed alone ({first['order_seeds']}): {runs}\n"
            f"{SPLIT_NAMES[str(split)]} that all runs scored at steps {part['step'].min()} and "
            f"{first['step']}"
        )
        rows = [
            [
                row["category"],
                row["num_docs"],
                number(row["change"], "+z.1f"),
                interval(row["low"], row["high"]),
                interval(row["both_low"], row["both_high"]),
            ]
            for _, row in last.iterrows()
        ]
        columns = ["category", "docs", "change", "other runs", "other runs and prompts"]
        notes = [*cluster_warnings(last), *few_runs_note(int(first["num_runs"]))]
        lines = [head, *(f"! {note}" for note in notes), text_table(columns, rows, form)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def few_runs_note(num_runs: int) -> list[str]:
    """Return how often an interval over so few runs and prompts holds the truth, as measured; empty
    from 4 runs on."""
    if num_runs not in FEW_RUNS_COVERAGE:
        return []
    return [
        f"{num_runs} runs: intervals for other runs and prompts hold the truth in "
        f"{FEW_RUNS_COVERAGE[num_runs]:.0%} of "
        "cases, not in 95 %, where runs vary much more than prompts"
    ]
