"""The commands that read scores: analyze, plot, report, simplicity, transfer. Heavy imports wait
until one runs."""

import argparse
import logging
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sft_probe.analysis.figures.names import FIGURES, FORMATS
from sft_probe.analysis.stats.places import check_runs
from sft_probe.analysis.sweep.checkpoints import snapshots_of_run
from sft_probe.command_line import config_of, log_written, write_config
from sft_probe.errors import UserError, check_names, doing
from sft_probe.files import check_exists
from sft_probe.options import (
    Command,
    Names,
    OldName,
    Positional,
    Positive,
    Reader,
    Replayable,
    Shard,
)
from sft_probe.recipes import find_recipe

log = logging.getLogger(__name__)


def _points(text: str) -> float:
    """Return a length in points, 1/72 inch."""
    match = re.fullmatch(r"([\d.]+)(in|cm|mm|pt)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no length like 3.25in, 8cm or 234pt")
    points = float(match[1]) * {"in": 72, "cm": 72 / 2.54, "mm": 7.2 / 2.54, "pt": 1}[match[2]]
    if not 120 <= points <= 5000:
        raise argparse.ArgumentTypeError(f"{text} is under 120pt or over 5000pt")
    return points


@dataclass(frozen=True, kw_only=True)
class Selection(Command):
    """What is read"""

    categories: Names | None = None
    """Categories to show. Default: all."""
    include_eos: bool = False
    """Count the log-probability of the terminator in."""
    chain: bool = False
    """Take the runs as stages of one training, such as SFT and DPO after it, on one axis."""


@dataclass(frozen=True, kw_only=True)
class Analyze(Selection):
    """Say how much each category moved: a table, and a sentence for each.

    Intervals come from a bootstrap over prompts. The tables are written as CSV files too.

    Examples:
        sft-probe analyze runs/mine
        sft-probe analyze runs/a runs/b --categories chosen,rejected --format latex
    """

    runs: Positional[Annotated[list[Path], "[NAME=]RUN|FILE"]]
    """Runs, files of score rows, lm-eval outputs, or CSVs of means; NAME is printed for one."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the tables. Default: RUN/analysis for one run, ./tables for several."""
    format: Literal["text", "md", "latex", "csv"] = "text"
    """Form of what is printed; all but text are the tables alone, as a paper needs them."""

    def check(self) -> None:
        """Check the runs, and the categories where they are recorded."""
        check_runs(self.runs, self.categories)

    def execute(self) -> None:
        """Print the verdict and write the tables."""
        from sft_probe.analysis.stats.analyze import (
            analyze,
            default_folder,
            verdict_tables,
            verdict_text,
            write_analysis,
        )

        analysis = analyze(
            self.runs,
            include_eos=self.include_eos,
            categories=self.categories,
            chain=self.chain,
        )
        shown = verdict_text(analysis)
        if self.format != "text":
            shown = verdict_tables(analysis, self.format)
        print(shown)  # noqa: T201
        if folder := self.out or default_folder(self.runs):
            runs = " ".join(map(str, self.runs))
            log_written(write_analysis(analysis, folder), f"report {runs}")


@dataclass(frozen=True, kw_only=True)
class Plot(Selection):
    """Draw the figures of runs, and write the numbers behind them.

    Several runs are drawn side by side; --color says what tells the curves apart.

    Examples:
        sft-probe plot runs/mine
        sft-probe plot runs/mine --figures changes,parts --width 3.25in --font-size 8 --no-title
    """

    runs: Positional[Annotated[list[Path], "[NAME=]RUN"]]
    """Runs that are swept, or that scored themselves in training; NAME is printed for one."""
    figures: Names | None = None
    """Figures to draw, such as changes,parts. Default: all that the runs allow."""
    color: Literal["category", "run", "order_seed", "train_category", "model"] = "category"
    """What has a colour of its own."""
    labels: Annotated[Path | None, "FILE"] = None
    """YAML file that maps a category to the label printed for it, such as `chosen: y^+`."""
    width: Annotated[float | None, Reader(_points, "LENGTH")] = None
    """Width of the page of a figure, such as 3.25in, 8cm or 234pt."""
    font: Annotated[str | None, "NAME"] = None
    """Font of the text, which must be on this machine. Default: DejaVu Sans."""
    font_size: float = 10
    """Size of the text in points."""
    no_title: bool = False
    """Leave the title out; it stands in NAME.txt, the caption beside the figure, in any case."""
    format: Names = ("png", "pdf")
    """Formats of the files: png, svg, pdf, html."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the figures. Default: RUN/figures, or ./figures for several runs."""

    def check(self) -> None:
        """Check the runs, and the names of figures, formats and categories."""
        check_names("--format", "format", self.format, FORMATS)
        check_names("--figures", "figure", self.figures or (), FIGURES)
        check_runs(self.runs, self.categories)
        if self.labels:
            check_exists(self.labels)

    def execute(self) -> None:
        """Draw the figures."""
        try:
            from sft_probe.analysis.figures.figure import (
                DEFAULT_WIDTH,
                FONTS,
                Style,
                font_families,
                read_labels,
            )
            from sft_probe.analysis.figures.plot import plot
        except ImportError as error:
            raise _needs_report(error) from error
        style = Style(
            color=self.color,
            width=self.width or DEFAULT_WIDTH,
            font_size=self.font_size,
            font=font_families(self.font) if self.font else FONTS,
            titled=not self.no_title,
            labels=read_labels(self.labels) if self.labels else {},
        )
        log_written(
            plot(
                self.runs,
                style=style,
                figures=self.figures,
                categories=self.categories,
                formats=self.format,
                include_eos=self.include_eos,
                chain=self.chain,
                out=self.out,
            )
        )


def _needs_report(error: ImportError) -> UserError:
    return UserError(f"figures need more packages ({error}). Run:  pip install 'sft-probe[report]'")


@dataclass(frozen=True, kw_only=True)
class Report(Selection):
    """Write one HTML file with tables, figures and a browser of single docs.

    The file needs no network and no server: send it, or open it in a browser.

    Examples:
        sft-probe report runs/mine
        sft-probe report runs/a runs/b --out both.html
    """

    runs: Positional[Annotated[list[Path], "[NAME=]RUN"]]
    """Runs that are swept, or that scored themselves in training; NAME is printed for one."""
    format: Literal["html", "md"] = "html"
    """One HTML file, or Markdown with figures beside it."""
    out: Annotated[Path | None, "FILE"] = None
    """Where the report goes. Default: RUN/report.html, or ./report.html for several runs."""

    def check(self) -> None:
        """Check the runs, and the categories where they are recorded."""
        check_runs(self.runs, self.categories)

    def execute(self) -> None:
        """Write the report."""
        try:
            from sft_probe.analysis.report.html import report
        except ImportError as error:
            raise _needs_report(error) from error
        log_written(
            report(
                self.runs,
                format_name=self.format,
                include_eos=self.include_eos,
                chain=self.chain,
                categories=self.categories,
                out=self.out,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Simplicity(Command):
    """Compare code lengths: how many bits a run needs for its training set, pass after pass.

    Examples:
        sft-probe simplicity runs/mine
        sft-probe simplicity runs/chosen runs/random --out simplicity
    """

    runs: Positional[Annotated[list[Path], "RUN"]]
    """Finished training runs."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the tables and a figure. Default: nothing is written."""

    def check(self) -> None:
        """Check that the runs are there."""
        for path in self.runs:
            check_exists(path)

    def execute(self) -> None:
        """Print the comparison, and write it where --out is given."""
        from sft_probe.analysis.report.simplicity_text import simplicity_text
        from sft_probe.analysis.studies.simplicity import simplicity, write_simplicity

        found = simplicity(self.runs)
        print(simplicity_text(found))  # noqa: T201
        if self.out:
            written = write_simplicity(found, self.out)
            try:
                from sft_probe.analysis.figures.runs import plot_simplicity
            except ImportError as error:
                raise _needs_report(error) from error
            log_written([*written, *plot_simplicity(found, self.out)])


@dataclass(frozen=True, kw_only=True)
class Training(Replayable):
    """Training of the runs"""

    train_on: Annotated[Names | None, OldName("rows")] = None
    """What the runs are trained on: categories, data files, `tagged` (a contrast set), or `half_1`
    and `half_2` (halves of chosen)."""
    recipe: str | None = None
    """Recipe of `sft-probe train` for --train-on: a file, or the name of one that is included."""
    order_seeds: Positive = 3
    """Data orders in which each is trained."""
    shard: Shard = (1, 1)
    """Train every N-th run, starting with the i-th, and write no tables."""
    train_flags: str = ""
    """More options of `sft-probe train`, in one string."""


@dataclass(frozen=True, kw_only=True)
class Transfer(Training):
    """Measure what training on one category moves in the others.

    Name finished runs with --runs, or have them trained with --train-on.

    Examples:
        sft-probe transfer --train-on chosen,random,rejected --recipe quickstart
        sft-probe transfer --runs chosen=runs/a chosen=runs/b random=runs/c --out transfer
    """

    runs: Annotated[list[str], "[NAME=]RUN"] = field(default_factory=list)
    """Finished runs; those of one name are its seeds."""
    out: Annotated[Path, "DIR"] = Path("transfer")
    """Directory of the runs, tables and figures."""

    def check(self) -> None:
        """Check the runs, or the recipe that they are trained by."""
        if bool(self.runs) == bool(self.train_on):
            raise UserError("transfer needs either --runs or --train-on.")
        check_runs([Path(run) for run in self.runs])
        if self.train_on and self.recipe is None:
            raise UserError("--train-on needs --recipe, that of `sft-probe train`.")
        if self.recipe is not None:
            find_recipe(self.recipe)

    def execute(self) -> None:
        """Train what is missing, print the matrix, and write tables and figures."""
        from sft_probe.analysis.report.transfer_text import transfer_text
        from sft_probe.analysis.studies.transfer import transfer, write_transfer

        runs = self.runs or self._train()
        if self.shard[1] > 1:
            return
        with doing("comparing the runs"):
            found = transfer(runs)
        print(transfer_text(found))  # noqa: T201
        written = write_transfer(found, self.out)
        try:
            from sft_probe.analysis.figures.runs import plot_transfer
        except ImportError as error:
            raise _needs_report(error) from error
        log_written([*written, *plot_transfer(found, self.out)])
        write_config(self.out / "config.yaml", "sft-probe transfer", config_of(self))

    def _train(self) -> list[str]:
        from sft_probe.analysis.studies.training_runs import train_rows

        return train_rows(
            self.train_on or (),
            self.out,
            recipe=str(self.recipe),
            num_orders=self.order_seeds,
            shard=self.shard,
            extra=shlex.split(self.train_flags),
        )


@dataclass(frozen=True, kw_only=True)
class Ledger(Command):
    """Split each category's gain by the prompt that it shows under, by layer, or by example.

    By prompt, the parts (text, register, topic, prompt) add up to the gain; this needs `sft-probe
    sweep RUN --contexts own,near,far,none`. With --path, the gradient is integrated along the
    weights between snapshots, and divided by layer and kind of weight; with --examples, by the
    training examples that moved the weights, for which the run is repeated twice in memory.

    Examples:
        sft-probe ledger runs/mine
        sft-probe ledger runs/mine --path --categories chosen,random --docs 16
        sft-probe ledger runs/mine --examples --categories chosen
    """

    run: Positional[Annotated[Path, "RUN"]]
    """A run that was swept with --contexts; for --path and --examples, a finished one."""
    categories: Names | None = None
    """Categories to split. Default: all; with --path or --examples, what was trained on and
    random."""
    path: bool = False
    """Split by layer and kind of weight."""
    examples: bool = False
    """Split by training example."""
    docs: Positive = 16
    """Held-out docs whose gradients --path and --examples take."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of table and figure. Default: RUN/analysis."""

    def check(self) -> None:
        """Check the run, and the categories where they are recorded; snapshots need no scores."""
        if self.path and self.examples:
            raise UserError("--path and --examples are two ledgers: give one of them at a time.")
        if not self.path and not self.examples:
            check_runs([self.run], self.categories)

    def execute(self) -> None:
        """Print the parts, and write table and figure."""
        folder = self.out or self.run / "analysis"
        if self.examples:
            text, written = self._by_example(folder)
        elif self.path:
            text, written = self._by_layer(folder)
        else:
            text, written = self._by_prompt(folder)
        print(text)  # noqa: T201
        log_written([*written, *self._draw(folder)])

    def _by_prompt(self, folder: Path) -> tuple[str, list[Path]]:
        from sft_probe.analysis.report.ledger_text import ledger_text
        from sft_probe.analysis.studies.ledger import ledger, write_ledger

        found = ledger(self.run, self.categories)
        return ledger_text(found), write_ledger(found, folder)

    def _by_layer(self, folder: Path) -> tuple[str, list[Path]]:
        from sft_probe.analysis.report.ledger_text import path_text
        from sft_probe.analysis.studies.ledger_path import path_ledger, write_path

        found = path_ledger(self.run, self.categories, self.docs)
        return path_text(found), write_path(found, folder)

    def _by_example(self, folder: Path) -> tuple[str, list[Path]]:
        from sft_probe.analysis.report.ledger_text import examples_text
        from sft_probe.analysis.studies.ledger_examples import example_ledger, write_examples

        found = example_ledger(self.run, self.categories, self.docs)
        return examples_text(found), write_examples(found, folder)

    def _draw(self, folder: Path) -> list[Path]:
        """Draw the tables that were written just now."""
        if self.examples:
            return []
        try:
            from sft_probe.analysis.figures.figure import Style
            from sft_probe.analysis.figures.ledger import written_figures
        except ImportError as error:
            raise _needs_report(error) from error
        name = "ledger_path" if self.path else "ledger_parts"
        figures = [figure for figure in written_figures(folder) if figure.name == name]
        return [path for figure in figures for path in figure.save(folder, ["png", "pdf"], Style())]


@dataclass(frozen=True, kw_only=True)
class Words(Command):
    """Say in which words the change of a run lies: by class, by literal, by sequence of words.

    The change of every response between two steps is divided among its words, numbers, marks and
    blanks; the classes add up to the whole. Intervals are over docs, in clusters.

    Examples:
        sft-probe words runs/mine
        sft-probe words runs/mine --categories chosen --step 16 --top 30
    """

    run: Positional[Annotated[Path, "RUN"]]
    """A run that is swept, or that scored itself in training."""
    categories: Names | None = None
    """Categories to read. Default: all."""
    split: Literal["heldout", "train"] = "heldout"
    """Which prompts."""
    step: int | None = None
    """Last step of the change, which counts from the first. Default: the last one scored."""
    top: Positive = 10
    """Words and sequences to print per category; the tables hold all."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the tables. Default: RUN/analysis."""

    def check(self) -> None:
        """Check the run, and the categories where they are recorded."""
        check_runs([self.run], self.categories)

    def execute(self) -> None:
        """Print the classes and the words that gained most, and write the tables."""
        from sft_probe.analysis.report.studies_text import words_text
        from sft_probe.analysis.stats.runs import load_recording
        from sft_probe.analysis.studies.words import words, write_words

        found = words(load_recording(self.run), self.split, self.step, self.categories)
        print(words_text(found, self.top))  # noqa: T201
        log_written(write_words(found, self.out or self.run / "analysis"))


@dataclass(frozen=True, kw_only=True)
class Weights(Command):
    """Say where the weights of a run moved: how far, in how many directions, by layer and kind.

    Reads the snapshots alone, full or LoRA.

    Examples:
        sft-probe weights runs/mine
        sft-probe weights runs/mine --out tables
    """

    run: Positional[Annotated[Path, "RUN"]]
    """A run with snapshots of two steps or more."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of tables and figure. Default: RUN/analysis."""

    def check(self) -> None:
        """Check that the run has snapshots."""
        snapshots_of_run(self.run)

    def execute(self) -> None:
        """Print the last step by layer and kind, and write tables and a figure."""
        from sft_probe.analysis.report.studies_text import weights_text
        from sft_probe.analysis.studies.weight_changes import weight_changes, write_weight_changes

        changes = weight_changes(self.run)
        print(weights_text(changes))  # noqa: T201
        folder = self.out or self.run / "analysis"
        written = write_weight_changes(changes, folder)
        try:
            from sft_probe.analysis.figures.weight_maps import plot_weights
        except ImportError as error:
            raise _needs_report(error) from error
        log_written([*written, *plot_weights(changes, folder)])
