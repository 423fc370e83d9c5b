"""The command line: every command by its name. Nothing heavy is imported before one runs, so that
help comes at once."""

import argparse
import contextlib
import importlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from sft_probe import __version__
from sft_probe.analysis.commands import (
    Analyze,
    Ledger,
    Plot,
    Report,
    Simplicity,
    Transfer,
    Weights,
    Words,
)
from sft_probe.analysis.import_commands import Import, PublishedGet, PublishedList
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.command_line import Parser, log_written, read_command
from sft_probe.errors import UserError, doing, exit_on_user_error, quiet, unknown
from sft_probe.files import check_exists
from sft_probe.options import Command, Heldout, OldName, Positional, Positive, about, options_of
from sft_probe.probe_set import check_source, train_command
from sft_probe.prompts import check_format
from sft_probe.synth.options import SynthRun, SynthStatus
from sft_probe.train.checks import check_inputs
from sft_probe.train.options import Train, expand, print_help, train_options

log = logging.getLogger(__name__)
_DESCRIPTION = "See what a language model really learns during supervised fine-tuning."


@dataclass(frozen=True, kw_only=True)
class Quickstart(Command):
    """Train, sweep and plot the embedded demo: minutes on two CPU cores, no download.

    Examples:
        sft-probe quickstart
        sft-probe quickstart --output-dir runs/demo
    """

    output_dir: Annotated[Path, "DIR"] = Path("runs/quickstart")
    """Directory of the run; what is complete in it is reused."""

    def execute(self) -> None:
        """Run the three commands of the demo."""
        from sft_probe.quickstart import quickstart

        quickstart(self.output_dir)


@dataclass(frozen=True, kw_only=True)
class Table(Command):
    """Make a set from a table"""

    from_table: Annotated[Path | None, "FILE", OldName("from-csv")] = None
    """A .csv, .jsonl or .parquet file with a column for each category."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the new set."""
    prompt: Annotated[str | None, "COLUMN"] = None
    """Column of the prompts."""
    category: Annotated[list[str], "NAME=COLUMN"] = field(default_factory=list)
    """Categories of responses, each with its column."""
    prompt_format: str = "hh"
    """hh, chat, plain or a Jinja file."""
    heldout: Heldout | None = None
    """Docs held out; or a share below 1: then no doc changes its split when rows are added.
    Default: 100, of under 500 rows a fifth."""
    limit: Positive | None = None
    """Largest number of docs; they are drawn at random. Default: all."""
    seed: int = 0
    """Seed of the draw, the splits and the category `random`."""


@dataclass(frozen=True, kw_only=True)
class ProbeSet(Table):
    """Check a probe set and show what it holds, or make one from a table.

    Examples:
        sft-probe probe-set sets/mine
        sft-probe probe-set --from-table pairs.csv --prompt question --category chosen=good
            rejected=bad --out sets/mine
    """

    source: Positional[Annotated[str | None, "SET"]] = None
    """A directory, a .jsonl file, a hub id or an embedded set."""

    def check(self) -> None:
        """Check the path of the set; or of the table, and that all is said that it needs."""
        if self.from_table is None:
            if self.source is None:
                raise UserError("name a probe set, or a table with --from-table.")
            check_source(self.source)
            return
        check_exists(self.from_table)
        check_format(self.prompt_format, "--prompt-format")
        if not self.prompt or not self.out or not self.category:
            raise UserError(
                "--from-table needs --prompt COLUMN, --out DIR and --category NAME=COLUMN, once "
                "for each."
            )
        if len(self._categories()) < len(self.category):
            raise UserError("--category names a category twice. Give each one column.")

    def execute(self) -> None:
        """Print what the set holds; a set with faults ends with a `UserError`."""
        from sft_probe.probe_set import read_probe_set
        from sft_probe.synth.output import describe_probe_set

        if self.from_table is not None:
            self._make(self.from_table)
        source = str(self.out if self.from_table is not None else self.source)
        probe_set = read_probe_set(source)
        print(describe_probe_set(probe_set))  # noqa: T201
        if self.out is not None:
            log_written([self.out], train_command(source, probe_set.categories))
        if probe_set.faults:
            number = len(probe_set.faults)
            faults = "1 fault" if number == 1 else f"{number} faults"
            raise UserError(
                f"{probe_set.name} has {faults} (listed above). Fix these lines, or remove them."
            )

    def _categories(self) -> dict[str, str]:
        """Return the columns of the categories. Raises `UserError` where one is not NAME=COLUMN."""
        pairs = [item.partition("=") for item in self.category]
        for item, (name, _, column) in zip(self.category, pairs, strict=True):
            if not name or not column:
                raise UserError(
                    f"--category {item}: write NAME=COLUMN, as in --category chosen=answer."
                )
        return {name: column for name, _, column in pairs}

    def _make(self, table: Path) -> None:
        from sft_probe.synth.table import write_probe_set

        left_out = write_probe_set(
            table,
            Path(str(self.out)),
            prompt_column=str(self.prompt),
            categories=self._categories(),
            prompt_format=self.prompt_format,
            heldout=self.heldout,
            limit=self.limit,
            seed=self.seed,
        )
        for item in left_out:
            log.warning("left out: %s", item)
        log.info("%d rows left out", len(left_out))


@dataclass(frozen=True, kw_only=True)
class BenchmarksAdd(Command):
    """Make benchmarks of JSONL files, which `sft-probe sweep --tasks` then finds by name.

    A file has one item per line: query, choices and gold (the number of the right choice, from
    0); context_options, continuation and gold; context and continuation; or context and answer.
    Each becomes a task of lm-eval with the bits per byte of the right answer beside its accuracy.

    Examples:
        sft-probe benchmarks add arc_easy.jsonl copa.jsonl
        sft-probe benchmarks add mine.jsonl --out tasks && lm_eval --include_path tasks --tasks mine
    """

    files: Positional[Annotated[list[Path], "FILE"]]
    """JSONL files; each gives the task its name."""
    out: Annotated[Path | None, "DIR"] = None
    """Where tasks and copies of the items are written. Default: in the cache, for `sweep`."""

    def check(self) -> None:
        """Check that the files are there."""
        for file in self.files:
            check_exists(file)

    def execute(self) -> None:
        """Write the tasks and say what each file was taken for."""
        from sft_probe.tasks.benchmark_files import add_benchmarks, benchmarks_dir

        added = add_benchmarks(self.files, self.out)
        for name, layout, num_items in added:
            print(f"{name}: {num_items} items, {layout}")  # noqa: T201
        names = ",".join(name for name, _, _ in added)
        files = [(self.out or benchmarks_dir()) / f"{name}.yaml" for name, _, _ in added]
        tasks = names if self.out is None else ",".join(map(str, files))
        log_written(files, f"sweep RUN --tasks {tasks}")


@dataclass(frozen=True, kw_only=True)
class TasksDir(Command):
    """Print the directory of the probe tasks, for `lm_eval --include_path`.

    Examples:
        lm_eval --include_path "$(sft-probe tasks-dir)" --tasks sft_probe_heldout --model hf ...
        sft-probe tasks-dir --probe-set sets/mine --out tasks/mine
    """

    probe_set: str | None = None
    """Write tasks for the categories of this set. Default: those of the embedded set."""
    out: Annotated[Path | None, "DIR"] = None
    """Where they are written. Default: in the cache."""

    def check(self) -> None:
        """Check that the probe set is there."""
        if self.probe_set is not None:
            check_source(self.probe_set)

    def execute(self) -> None:
        """Print the directory, and write it first where a set is named."""
        from sft_probe.models import cache_dir
        from sft_probe.probe_set import load_probe_set
        from sft_probe.tasks.discovery import PACKAGED_TASKS_DIR, write_tasks_dir

        if self.probe_set is None:
            print(PACKAGED_TASKS_DIR)  # noqa: T201
            return
        out = self.out or cache_dir() / "tasks" / load_probe_set(self.probe_set).sha256[:12]
        print(write_tasks_dir(self.probe_set, out))  # noqa: T201


@dataclass(frozen=True, kw_only=True)
class LinkTasks(Command):
    """Make the probe tasks known to plain `lm_eval`, by stubs in its package.

    Examples:
        sft-probe link-tasks
        sft-probe link-tasks --remove
    """

    remove: bool = False
    """Remove the stubs."""

    def execute(self) -> None:
        """Write the stubs, or remove them."""
        from sft_probe.tasks.discovery import link_tasks, unlink_tasks

        if self.remove:
            log.info("removed %s", unlink_tasks())
        else:
            log.info("wrote stubs to %s; next: lm_eval --tasks 'sft_probe_*' ...", link_tasks())


@dataclass(frozen=True, kw_only=True)
class LmEval(Command):
    """Run lm-eval's own command line with the probe tasks on its path.

    All options are those of lm-eval.

    Examples:
        sft-probe lm-eval --model hf --model_args pretrained=gpt2 --tasks sft_probe_heldout
        sft-probe lm-eval --help
    """


@dataclass(frozen=True, kw_only=True)
class Track(Command):
    """Send the scores of a run to Weights & Biases or Trackio, as a run of its own.

    Swept scores, else those of the live probe: a curve for each category, on the axis `probe/step`,
    and a table of the docs of each step.

    Examples:
        sft-probe track runs/mine --to wandb --project my-project
        sft-probe track runs/mine --to trackio
    """

    run: Positional[Annotated[Path, "RUN"]]
    """The run directory."""
    to: Literal["wandb", "trackio"] = "wandb"
    """Where to send them."""
    project: str = "sft-probe"
    """Name of the project there."""

    def check(self) -> None:
        """Check that the run is there."""
        check_exists(self.run)

    def execute(self) -> None:
        """Send them."""
        from sft_probe.train.trackers import send_run

        send_run(self.run, self.to, self.project)


@dataclass(frozen=True, kw_only=True)
class Completion(Command):
    """Print a script that completes commands and options in a shell.

    Examples:
        sft-probe completion bash > ~/.local/share/bash-completion/completions/sft-probe
        sft-probe completion zsh > ~/.zfunc/_sft-probe
        sft-probe completion fish > ~/.config/fish/completions/sft-probe.fish
    """

    shell: Positional[Annotated[Literal["bash", "zsh", "fish"], "SHELL"]]
    """bash, zsh or fish."""

    def execute(self) -> None:
        """Print the script."""
        import shtab

        print(shtab.complete(whole_parser(shtab.FILE), shell=self.shell))  # noqa: T201


COMMANDS: dict[str, type[Command]] = {
    "quickstart": Quickstart,
    "train": Train,
    "sweep": SweepRequest,
    "analyze": Analyze,
    "plot": Plot,
    "report": Report,
    "transfer": Transfer,
    "simplicity": Simplicity,
    "ledger": Ledger,
    "words": Words,
    "weights": Weights,
    "import": Import,
    "published list": PublishedList,
    "published get": PublishedGet,
    "synth run": SynthRun,
    "synth status": SynthStatus,
    "probe-set": ProbeSet,
    "benchmarks add": BenchmarksAdd,
    "tasks-dir": TasksDir,
    "link-tasks": LinkTasks,
    "lm-eval": LmEval,
    "track": Track,
    "completion": Completion,
}
"""Every command by the words that call it, in the order of the help."""
_TITLES = {
    "quickstart": "from training to a report",
    "transfer": "studies of runs",
    "import": "runs of others",
    "synth run": "probe sets and benchmarks",
    "tasks-dir": "lm-eval, trackers, shells",
}
"""The titles of groups of commands, each by the first one of its group."""
_WITHOUT_WORD = {"synth": "synth run", "published": "published list"}
"""What the first word of a group alone calls."""


_IMPORTS = {
    "train": "sft_probe.train.sft",
    "sweep": "sft_probe.analysis.sweep.sweep",
    "analyze": "sft_probe.analysis.stats.analyze",
    "plot": "sft_probe.analysis.figures.plot",
    "report": "sft_probe.analysis.report.html",
    "transfer": "sft_probe.analysis.figures.runs",
    "simplicity": "sft_probe.analysis.figures.runs",
    "ledger": "sft_probe.analysis.studies.ledger_path",
    "words": "sft_probe.analysis.studies.words",
    "weights": "sft_probe.analysis.studies.weight_changes",
    "synth run": "sft_probe.synth.build",
    "probe-set": "sft_probe.synth.output",
    "benchmarks add": "sft_probe.tasks.benchmark_files",
    "import": "sft_probe.analysis.stats.imports.store",
}
"""The module of a command whose import takes longest."""


def _import_for(name: str) -> None:
    """Import what a command needs, with a line where that takes long."""
    with doing("importing libraries"), contextlib.suppress(ImportError):
        if name in _IMPORTS:
            importlib.import_module(_IMPORTS[name])


def main(argv: list[str] | None = None) -> None:
    """Run `sft-probe`. Exit code 2 for what the user can fix, with one message and no traceback."""
    with exit_on_user_error():
        arguments = sys.argv[1:] if argv is None else argv
        name, rest = _command_of(arguments)
        if name == "lm-eval":
            from sft_probe.tasks.discovery import run_lm_eval

            run_lm_eval(rest)
            return
        quiet()
        if name == "train":
            _train(rest)
        else:
            command = read_command(f"sft-probe {name}", COMMANDS[name], rest)
            command.check()
            if not getattr(command, "dry_run", False):
                _import_for(name)
            command.execute()


def _command_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command, and its own arguments.

    Raises:
        UserError: there is no such command.
        SystemExit: help or the version was asked for, and printed.
    """
    first, second = (*arguments, "", "")[:2]
    is_group = any(name.startswith(f"{first} ") for name in COMMANDS)
    word = second if first and is_group else first
    if word in ("-h", "--help") or (not word and first not in _WITHOUT_WORD):
        print(overview(first if is_group else ""))  # noqa: T201
        raise SystemExit(0 if word else 2)
    if first == "--version":
        print(__version__)  # noqa: T201
        raise SystemExit(0)
    if f"{first} {second}" in COMMANDS:
        return f"{first} {second}", arguments[2:]
    if first in _WITHOUT_WORD:
        return _WITHOUT_WORD[first], arguments[1:]
    if first not in COMMANDS:
        name = f"{first} {second}" if is_group else first
        raise unknown("command", name, COMMANDS, use="`sft-probe --help` lists all.")
    return first, arguments[1:]


def overview(prefix: str = "") -> str:
    """Return the help of the whole program, or of the commands that begin with a word."""
    shown = {
        name: about(command)[0] for name, command in COMMANDS.items() if name.startswith(prefix)
    }
    width = max(map(len, shown)) + 2
    lines = [f"usage: {' '.join(['sft-probe', *prefix.split()])} COMMAND [options]", ""]
    lines += [_DESCRIPTION] if not prefix else ["commands:"]
    for name, summary in shown.items():
        lines += ["", f"{_TITLES[name]}:"] if name in _TITLES and not prefix else []
        lines.append(f"  {name:<{width}}{summary}")
    lines.append("")
    return "\n".join([*lines, "`sft-probe COMMAND --help` explains a command, with examples."])


def _train(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print_help()
        return
    probe_set = check_inputs(expand(arguments))
    _import_for("train")
    try:
        from sft_probe.train.sft import main as train
    except ImportError as error:
        raise UserError(
            f"training needs more packages ({error}). Run:  pip install 'sft-probe[train]'"
        ) from error
    train(arguments, probe_set)


def whole_parser(complete_file: Any) -> argparse.ArgumentParser:
    """Return one parser with all commands, from which completion is generated."""
    parser = Parser(prog="sft-probe", description=_DESCRIPTION)
    found = {"": parser.add_subparsers(metavar="COMMAND")}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in found:
            group_parser = found[""].add_parser(group, help=f"Commands of {group}.")
            found[group] = group_parser.add_subparsers(metavar="COMMAND")
        summary = about(command)[0]
        own = found[group].add_parser(last, help=summary, description=summary)
        for option in train_options() if command is Train else options_of(command):
            action = option.add_to(own)
            if option.read is Path:
                action.complete = complete_file
    return parser
