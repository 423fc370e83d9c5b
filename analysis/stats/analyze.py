"""`sft-probe analyze`: the verdict table, printed, and tidy tables beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.changes import change_table, groups_of_runs, table_over_runs
from sft_probe.analysis.stats.clusters import count_text
from sft_probe.analysis.stats.contrasts import contrast_table, pmi_sentence
from sft_probe.analysis.stats.generations import generations_text
from sft_probe.analysis.stats.measures import PARTS
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording, load_recordings
from sft_probe.analysis.stats.verdict import cluster_warnings, share_text, verdict_table
from sft_probe.errors import UserError, did_you_mean
from sft_probe.files import make_dir, write_text
from sft_probe.probe_set import SPLITS
from sft_probe.scores import write_parquet

_HEAD = (
    f"{'category':<22}{'start':>8}{'change':>8}  "
    f"{'95 % interval':<16}{'sign':>4}{'p (Holm)':>10}{'body':>8}"
    f"{'peak':>8} {'at':<7}{'half at':>8}{'first/body/EOS':>24}{'rank':>5}{'SE':>7}"
)

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
    over_runs: pd.DataFrame


def analyze(
    paths: Sequence[Path], *, include_eos: bool = False, categories: Sequence[str] | None = None
) -> Analysis:
    """Reads runs or files and computes their tables.

    Args:
        paths: what `load_recording` reads.
        include_eos: the headline is the sum with the terminator.
        categories: default: all.

    Raises:
        UserError: one of them holds no scores, or those of one step only.
    """
    recordings = load_recordings(paths)
    _check_categories(recordings, categories or ())
    measure = "logprob_with_eos" if include_eos else "logprob"
    for recording in recordings:
        if (
            include_eos
            and recording.means is None
            and recording.rows["logprob_with_eos"].isna().all()
        ):
            raise UserError(
                f"{recording.path} has no scores of the terminator: leave out --include-eos."
            )
    changes = pd.concat(
        [change_table(recording, categories) for recording in recordings], ignore_index=True
    )
    contrasts = [contrast_table(recording, measure) for recording in recordings]
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
        over_runs=pd.concat(groups, ignore_index=True) if groups else pd.DataFrame(),
    )


def _check_categories(recordings: Sequence[Recording], categories: Sequence[str]) -> None:
    known = {name: None for run in recordings for split in SPLITS for name in run.categories(split)}
    for name in categories:
        if name not in known:
            raise UserError(
                f"--categories {name}: the runs have only {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )


def write_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes `changes`, `verdict`, `contrasts` and, with several runs, `over_runs`, as CSV and
    parquet."""
    make_dir(folder)
    written = []
    for name in ("changes", "contrasts", "over_runs", "verdict"):
        table: pd.DataFrame = getattr(analysis, name)
        if table.empty:
            continue
        write_parquet(folder / f"{name}.parquet", pa.Table.from_pandas(table, preserve_index=False))
        write_text(folder / f"{name}.csv", table.round(6).to_csv(index=False))
        written += [folder / f"{name}.csv", folder / f"{name}.parquet"]
    return written


def default_folder(paths: Sequence[Path]) -> Path | None:
    """`RUN/analysis` for one run directory; else nothing is written unless it is asked for."""
    return paths[0] / "analysis" if len(paths) == 1 and paths[0].is_dir() else None


def verdict_text(analysis: Analysis) -> str:
    """What `sft-probe analyze` prints."""
    blocks = []
    for recording in analysis.recordings:
        own = analysis.verdict[analysis.verdict["run"] == recording.name]
        for split, rows in own.groupby("split", sort=False):
            blocks.append(_block(recording, str(split), rows, analysis))
        if recording.generations is not None:
            blocks.append(generations_text(recording.generations))
        blocks.append("\n".join(f"! {note}" for note in notes_of(recording, own)))
    blocks.append(over_runs_text(analysis.over_runs))
    return "\n\n".join(block for block in blocks if block)


def notes_of(recording: Recording, verdict: pd.DataFrame) -> list[str]:
    """Return the notes of a recording, what its clusters cost, and what one run cannot say.

    Args:
        recording: a run.
        verdict: its rows of the verdict.
    """
    if recording.means is not None:
        return list(recording.notes)
    warnings = [
        f"{SPLIT_NAMES[str(split)]}: {warning}"
        for split, rows in verdict.groupby("split", sort=False)
        for warning in cluster_warnings(rows)
    ]
    alone = "intervals hold for other prompts; one run says nothing of training noise"
    return [*recording.notes, *warnings, alone]


def sentences_of(rows: pd.DataFrame, contrasts: pd.DataFrame) -> list[str]:
    """Return the sentences on one run and split: one per category, and one on what hangs on the
    prompt.

    Args:
        rows: of the verdict.
        contrasts: from `contrast_table`.
    """
    pmi = pmi_sentence(contrasts, str(rows["run"].iloc[0]), str(rows["split"].iloc[0]))
    return [*rows["sentence"], *([f"{pmi}; prompts only"] if pmi else [])]


def _block(recording: Recording, split: str, rows: pd.DataFrame, analysis: Analysis) -> str:
    first = rows.iloc[0]
    docs = count_text(rows["num_docs"].to_numpy(), SPLIT_NAMES[split])
    docs += f" in {count_text(rows['num_clusters'].to_numpy())}"
    if recording.means is not None:
        docs = "means over an unknown number of prompts"
    return "\n".join(
        [
            f"{recording.name}: model {recording.model}, trained on "
            f"{recording.train_category or '?'}; {docs}",
            f"change of log p(response | prompt) from {recording.step_unit} {first['first_step']} "
            f"to {first['last_step']}, nats per response {recording.sums(analysis.measure)}",
            "",
            _HEAD,
            *(_line(row) for _, row in rows.iterrows()),
            "",
            *(f"- {sentence}" for sentence in sentences_of(rows, analysis.contrasts)),
        ]
    )


def _line(row: pd.Series) -> str:
    interval = "-" if math.isnan(row["low"]) else f"[{row['low']:+.1f}, {row['high']:+.1f}]"
    shares = [share_text(row, part) for part in PARTS]
    split = "-" if "-" in shares else "/".join(shares) + " %"
    numbers = {name: _number(row[name], "+.1f") for name in ("change", "body", "peak")}
    p_holm = (
        "-"
        if math.isnan(row["p_holm"])
        else f"{row['p_holm']:.1g}"
        if row["p_holm"] >= 1e-4
        else "<0.0001"
    )
    return (
        f"{row['category'][:21]:<22}{row['start']:>8.1f}{numbers['change']:>8}  "
        f"{interval:<16}{row['sign']:>4}"
        f"{p_holm:>10}{numbers['body']:>8}{numbers['peak']:>8} {row['peak_step']:<7}"
        f"{_number(row['half_step'], '.1f'):>8}{split:>24}"
        f"{row['rank']:>5.0f}{_number(row['stderr'], '.2f'):>7}"
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def over_runs_text(table: pd.DataFrame) -> str:
    """The last step of the means over runs; empty without."""
    if table.empty:
        return ""
    blocks = []
    for (runs, split), part in table.groupby(["runs", "split"], sort=False):
        last = part[part["step"] == part["step"].max()]
        first = last.iloc[0]
        head = (
            f"mean of {first['num_runs']} runs of {first['model']} on {first['train_category']} "
            "that differ in their "
            f"order seed alone ({first['order_seeds']}): {runs}\n"
            f"{SPLIT_NAMES[str(split)]} that all runs scored at steps {part['step'].min()} and "
            f"{first['step']}\n"
            f"{'category':<22}{'docs':>6}{'change':>8}  {'other runs':<20}other runs and prompts"
        )
        lines = [
            f"{str(row['category'])[:21]:<22}{row['num_docs']:>6}"
            f"{_number(row['change'], '+.1f'):>8}  "
            f"{_interval(row['low'], row['high']):<20}"
            f"{_interval(row['both_low'], row['both_high'])}"
            for _, row in last.iterrows()
        ]
        notes = [*cluster_warnings(last), *few_runs_note(int(first["num_runs"]))]
        blocks.append("\n".join([head, *lines, *(f"! {note}" for note in notes)]))
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


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
