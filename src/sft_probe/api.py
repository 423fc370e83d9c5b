"""The Python interface, for notebooks and scripts: runs as tables and figures."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sft_probe.analysis.stats.analyze import Analysis, common_measure, tables_of, verdict_text
from sft_probe.analysis.stats.comparison import Comparison, compare_recordings
from sft_probe.analysis.stats.runs import Recording, load_recordings
from sft_probe.errors import UserError, check_names
from sft_probe.probe_set import DEFAULT_PROBE_SET, ProbeSet
from sft_probe.probe_set import load_probe_set as _load_probe_set

if TYPE_CHECKING:
    from altair import TopLevelMixin


def load(*paths: str | Path) -> "Runs":
    """Read finished runs.

    Args:
        paths: run directories, parquet files of score rows, or what `sft-probe import` reads.

    Example:
        runs = sft_probe.load("runs/a", "runs/b")
        runs.verdict()
    """
    if not paths:
        raise UserError("load needs the path of at least one run.")
    return Runs(load_recordings([Path(path) for path in paths]))


class Runs(Sequence["Runs"]):
    """One run or several, as `load` returns them. `runs[0]` and a loop give them one by one.

    Example:
        runs = sft_probe.load("runs/a", "runs/b")
        for run in runs:
            print(run.name, len(run.scores))
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._recordings = list(recordings)

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, index: Any) -> "Runs":
        found = self._recordings[index]
        return Runs(found if isinstance(index, slice) else [found])

    def __iter__(self) -> Iterator["Runs"]:
        return (Runs([recording]) for recording in self._recordings)

    def __repr__(self) -> str:
        return f"Runs({self.name})"

    @property
    def name(self) -> str:
        """The name of the run; of several, all names with commas.

        Example:
            sft_probe.load("runs/a").name
        """
        return ", ".join(recording.name for recording in self._recordings)

    @property
    def scores(self) -> pd.DataFrame:
        """The score rows: one per run, step, split, category and doc, log-probs in nats.

        `first`, `body`, `eos` and `tokens_*` are the parts of a response. docs/data.md lists the
        columns.

        Example:
            runs.scores.groupby(["step", "category"])["logprob"].mean()
        """
        return self._concat(lambda recording: recording.rows)

    @property
    def benchmarks(self) -> pd.DataFrame:
        """The benchmark results of a sweep with `--tasks`; empty without.

        Example:
            runs.benchmarks.pivot(index="step", columns="task", values="value")
        """
        return self._concat(lambda recording: recording.benchmarks)

    @property
    def generations(self) -> pd.DataFrame:
        """The greedy answers of a sweep with `--generate`; empty without.

        Example:
            runs.generations[["step", "doc_id", "text"]]
        """
        return self._concat(lambda recording: recording.generations)

    @property
    def texts(self) -> pd.DataFrame:
        """The responses that were scored: `run doc_id category prompt response`.

        Empty where the probe set is no longer there.

        Example:
            runs.texts.query("category == 'chosen'")
        """
        return self._concat(_texts)

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the numbers.

        Example:
            print("\\n".join(runs.notes))
        """
        return [note for recording in self._recordings for note in recording.notes]

    def changes(
        self, *, categories: Sequence[str] | None = None, include_eos: bool = False
    ) -> pd.DataFrame:
        """Return every change from the first step with its interval, as `changes.csv` has it.

        Args:
            categories: default: all.
            include_eos: whether the log-prob of the terminator must be there.

        Example:
            runs.changes().query("measure == 'logprob' and unit == 'nats/response'")
        """
        return self.analysis(categories=categories, include_eos=include_eos).changes

    def verdict(
        self, *, categories: Sequence[str] | None = None, include_eos: bool = False
    ) -> pd.DataFrame:
        """Return one row per run, split and category: how much it changed, when, and a sentence.

        Args:
            categories: default: all.
            include_eos: whether the terminator is counted in.

        Example:
            runs.verdict()[["run", "category", "change", "low", "high", "sentence"]]
        """
        return self.analysis(categories=categories, include_eos=include_eos).verdict

    def analysis(
        self, *, categories: Sequence[str] | None = None, include_eos: bool = False
    ) -> Analysis:
        """Return all tables of `sft-probe analyze`: `changes`, `verdict`, `contrasts`,
        `distribution`, `items`, `over_runs` and, of two runs, `comparison`.

        Args:
            categories: default: all.
            include_eos: whether the terminator is counted in.

        Example:
            runs.analysis().over_runs
        """
        return tables_of(self._recordings, include_eos=include_eos, categories=categories)

    def summary(self) -> str:
        """Return what `sft-probe analyze` prints.

        Example:
            print(runs.summary())
        """
        return verdict_text(self.analysis())

    def plot(
        self,
        figure: str = "changes",
        *,
        split: str = "heldout",
        categories: Sequence[str] | None = None,
        include_eos: bool = False,
        color: str = "category",
        width: float = 620,
    ) -> "TopLevelMixin":
        """Return a figure of `sft-probe plot` as an Altair chart, which shows itself in a notebook.

        Args:
            figure: `changes`, `levels`, `trajectory`, `parts`, `squeezing`, `kl`, `shift`, `docs`,
                `tokens`, `length`, `data_card`, `benchmarks`, `forgetting`, `generations` or
                `code_length`.
            split: `heldout` or `train`.
            categories: default: all.
            include_eos: whether the terminator is counted in.
            color: what the colours of several runs tell apart: `category`, `run`, `order_seed`,
                `train_category` or `model`.
            width: of the figure, in points.

        Example:
            runs.plot("parts").save("parts.html")
        """
        from sft_probe.analysis.figures.figure import Style
        from sft_probe.analysis.figures.names import FIGURES
        from sft_probe.analysis.figures.plot import figures_of

        check_names("plot", "figure", [figure], FIGURES)
        analysis = self.analysis(categories=categories, include_eos=include_eos)
        style = Style(color=color, width=width)
        drawn = {found.name: found for found in figures_of(analysis, style, [figure])}
        ours = [name for name in drawn if split in name.split("_")] or [
            name for name in drawn if not {"heldout", "train"} & set(name.split("_"))
        ]
        if not ours:
            raise UserError(f"{self.name}: there is nothing to draw for {figure!r}, {split}.")
        return _chart(drawn[ours[0]].spec(style))

    def _concat(self, table_of: Callable[[Recording], pd.DataFrame | None]) -> pd.DataFrame:
        """Return the tables of all runs below each other, under the names that the runs have
        here."""
        found = [(recording.name, table_of(recording)) for recording in self._recordings]
        tables = [table.assign(run=name) for name, table in found if table is not None]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _texts(recording: Recording) -> pd.DataFrame:
    rows = [
        {
            "run": recording.name,
            "doc_id": doc_id,
            "category": category,
            "prompt": recording.prompts.get(doc_id),
            "response": response,
        }
        for doc_id, responses in recording.texts.items()
        for category, response in responses.items()
    ]
    return pd.DataFrame(rows, columns=["run", "doc_id", "category", "prompt", "response"])


def _chart(spec: dict[str, Any]) -> "TopLevelMixin":
    import altair as alt

    for kind in ("vconcat", "hconcat"):
        if kind in spec:
            return (alt.VConcatChart if kind == "vconcat" else alt.HConcatChart).from_dict(
                spec, validate=False
            )
    return alt.Chart.from_dict(spec, validate=False)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    categories: Sequence[str] | None = None,
    include_eos: bool = False,
) -> Comparison:
    """Compare two runs: paired differences A - B with intervals, benchmarks, and the settings that
    differ. Its tables are `table`, `benchmarks` and `settings`; printed, it is a text.

    Args:
        a: a run.
        b: the run that is subtracted from it.
        categories: default: all.
        include_eos: whether the terminator is counted in.

    Example:
        print(sft_probe.compare("runs/a", "runs/b"))
    """
    runs = load_recordings([Path(a), Path(b)])
    measure = common_measure(runs, include_eos=include_eos)
    return compare_recordings(runs[0], runs[1], measure, categories)


def probe_set(source: str | Path = DEFAULT_PROBE_SET) -> ProbeSet:
    """Read a probe set: its `docs`, `categories` and `prompt_format`.

    Args:
        source: a directory, a `.jsonl` file, a hub id or an embedded name.

    Example:
        sft_probe.probe_set("helpful-mini").docs[0].responses["chosen"]
    """
    return _load_probe_set(str(source))


def load_probe_set(source: str | Path = DEFAULT_PROBE_SET) -> ProbeSet:
    """Read a probe set: the earlier name of `probe_set`, with a warning."""
    warnings.warn(
        "sft_probe.load_probe_set is now sft_probe.probe_set; please use the new name.",
        DeprecationWarning,
        stacklevel=2,
    )
    return probe_set(source)
