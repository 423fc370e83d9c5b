"""The command line. Nothing heavy is imported before a command runs, so that help comes at once."""

import argparse
import logging
import os
import sys
from pathlib import Path

from sft_probe import __version__
from sft_probe.analysis.commands import add_analysis_commands
from sft_probe.errors import UserError, exit_on_user_error
from sft_probe.options import heldout, names, positive, shard
from sft_probe.synth.command import add_synth

_DESCRIPTION = "See what a language model really learns during supervised fine-tuning."


def main(argv: list[str] | None = None) -> None:
    """Entry point of `sft-probe`. Exit code 2 for what the user can mend, with one message and no
    traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in (
        "absl",
        "filelock",
        "httpx",
        "httpx2",
        "google_genai",
        "datasets",
        "fsspec",
        "urllib3",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if argv is None else argv
    with exit_on_user_error():
        # `train` and `lm-eval` have flags of other programs, so argparse must not see them
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
        elif arguments[:1] == ["lm-eval"]:
            _lm_eval(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sft-probe", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("quickstart", help="train, sweep and plot the embedded demo")
    command.add_argument(
        "--output_dir", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart"
    )
    command.set_defaults(command=_quickstart)

    commands.add_parser(
        "train", help="SFT on one category, with snapshots; takes every flag of TrainingArguments"
    )
    _add_sweep(
        commands.add_parser(
            "sweep", help="score every checkpoint with lm-eval; writes the trajectory table"
        )
    )

    add_analysis_commands(commands)

    command = commands.add_parser(
        "tasks-dir", help="print the directory for lm_eval --include_path"
    )
    command.add_argument(
        "--probe-set", "--probe_set", help="write tasks for the categories of this set"
    )
    command.add_argument("--out", type=Path, help="where to write them; default: in the cache")
    command.set_defaults(command=_tasks_dir)

    command = commands.add_parser(
        "link-tasks", help="make the tasks known to plain lm_eval, by stubs in its package"
    )
    command.add_argument("--remove", action="store_true", help="take the stubs out again")
    command.set_defaults(command=_link_tasks)

    commands.add_parser(
        "lm-eval", help="lm-eval's own command line, with the probe tasks on its path"
    )
    add_synth(
        commands.add_parser(
            "synth", help="make a probe set from preference pairs, with Gemini or another writer"
        )
    )
    _add_probe_set(
        commands.add_parser("probe-set", help="check a probe set, or make one from a table")
    )
    return parser


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run", type=Path, help="a run, or where the results of foreign checkpoints go"
    )
    command.add_argument(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="Hugging Face model directories; PATH=STEP where the name tells no step",
    )
    command.add_argument("--model", help="a model on the hub, with --revisions")
    command.add_argument(
        "--revisions", type=names, default=(), metavar="A,B", help="e.g. step0,step1000,main=2000"
    )
    command.add_argument(
        "--splits",
        type=names,
        default=("heldout",),
        help="heldout, train or both; default: heldout",
    )
    command.add_argument("--probe_set", "--probe-set", help="default: the one of the run")
    command.add_argument(
        "--prompt_format", "--prompt-format", help="default: that of the run or probe set"
    )
    command.add_argument(
        "--max_length", type=positive, help="tokens; longer docs are left out; default: the run's"
    )
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    command.add_argument(
        "--max_tokens", type=positive, help="tokens in one forward pass; default: by device"
    )
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="i/N",
        help="score every N-th step, from the i-th",
    )
    command.add_argument(
        "--engine", default="local", choices=("local", "ray"), help="ray: over a cluster's workers"
    )
    command.add_argument(
        "--ray-address", "--ray_address", help="default: RAY_ADDRESS, else Ray is started here"
    )
    command.add_argument(
        "--generate",
        type=positive,
        default=0,
        metavar="N",
        help="also answer the first N held-out prompts, greedily",
    )
    benchmarks = command.add_argument_group("benchmarks beside the probes")
    benchmarks.add_argument(
        "--tasks",
        type=names,
        default=(),
        metavar="A,B",
        help="lm-eval tasks, patterns or YAML files",
    )
    benchmarks.add_argument(
        "--batch_size", type=positive, default=8, help="of what generates; default: 8"
    )
    benchmarks.add_argument("--num_fewshot", type=int)
    benchmarks.add_argument("--limit", type=float)
    benchmarks.add_argument(
        "--apply_chat_template", action="store_true", help="to the prompts of --tasks"
    )
    command.set_defaults(command=_sweep)


def _add_probe_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", nargs="?", help="a directory, a .jsonl file, a hub id or an embedded set"
    )
    table = command.add_argument_group("make one from a table")
    table.add_argument(
        "--from-csv", type=Path, metavar="FILE", help="a .csv, .jsonl or .parquet file"
    )
    table.add_argument("--out", type=Path, help="directory of the new set")
    table.add_argument("--prompt", metavar="COLUMN", help="column of the prompts")
    table.add_argument(
        "--category",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="a category of responses and its column; once for each",
    )
    table.add_argument(
        "--prompt-format", default="hh", help="hh, chat, plain or a Jinja file; default: hh"
    )
    table.add_argument(
        "--heldout",
        type=heldout,
        default=100,
        metavar="N",
        help="docs held out, or a share "
        "below 1, with which no doc changes its split when rows are added; default: 100",
    )
    table.add_argument("--limit", type=positive, help="docs at most, drawn at random")
    table.add_argument(
        "--seed", type=int, default=0, help="of the draw, the splits and `random`; default: 0"
    )
    command.set_defaults(command=_probe_set)


def _quickstart(options: argparse.Namespace) -> None:
    from sft_probe.quickstart import quickstart

    quickstart(options.output_dir)


def _train(arguments: list[str]) -> None:
    try:
        from sft_probe.train.sft import main as train
    except ImportError as error:
        raise UserError(
            f"training needs more packages ({error}). Run:  pip install 'sft-probe[train]'"
        ) from error
    train(arguments)


def _lm_eval(arguments: list[str]) -> None:
    from sft_probe.tasks.discovery import run_lm_eval

    run_lm_eval(arguments)


def _sweep(options: argparse.Namespace) -> None:
    from sft_probe.analysis.sweep.settings import SweepRequest
    from sft_probe.analysis.sweep.sweep import sweep

    if bool(options.model) != bool(options.revisions):
        raise UserError("--model and --revisions go together.")
    if unknown := set(options.splits) - {"heldout", "train"}:
        raise UserError(
            f"--splits: {', '.join(sorted(unknown))} is no split; use heldout, train or "
            "heldout,train."
        )
    idle = [
        name for name in ("num_fewshot", "limit", "apply_chat_template") if getattr(options, name)
    ]
    if idle and not options.tasks:
        raise UserError(
            f"--{idle[0]} is for benchmarks (--tasks): probe texts are rendered by the prompt "
            "format alone."
        )
    fields = {
        name: value for name, value in vars(options).items() if name not in ("command", "run")
    }
    for path in sweep(SweepRequest(directory=options.run, **fields)):
        logging.getLogger(__name__).info("wrote %s", path)


def _tasks_dir(options: argparse.Namespace) -> None:
    from sft_probe.models import cache_dir
    from sft_probe.probe_set import load_probe_set
    from sft_probe.tasks.discovery import PACKAGED_TASKS_DIR, write_tasks_dir

    if options.probe_set is None:
        print(PACKAGED_TASKS_DIR)  # noqa: T201
        return
    out = options.out or cache_dir() / "tasks" / load_probe_set(options.probe_set).sha256[:12]
    print(write_tasks_dir(options.probe_set, out))  # noqa: T201


def _link_tasks(options: argparse.Namespace) -> None:
    from sft_probe.tasks.discovery import link_tasks, unlink_tasks

    if options.remove:
        logging.getLogger(__name__).info("removed %s", unlink_tasks())
    else:
        logging.getLogger(__name__).info(
            "wrote stubs to %s; now: lm_eval --tasks 'sft_probe_*' ...", link_tasks()
        )


def _probe_set(options: argparse.Namespace) -> None:
    from sft_probe.probe_set import read_probe_set
    from sft_probe.synth.output import describe_probe_set

    if options.from_csv is not None:
        _probe_set_from_table(options)
    elif options.source is None:
        raise UserError("name a probe set, or a table with --from-csv.")
    probe_set = read_probe_set(str(options.out) if options.from_csv is not None else options.source)
    print(describe_probe_set(probe_set))  # noqa: T201
    if probe_set.faults:
        faults = "1 fault" if len(probe_set.faults) == 1 else f"{len(probe_set.faults)} faults"
        raise UserError(
            f"{probe_set.name} has {faults} (listed above). Fix these lines, or remove them."
        )


def _probe_set_from_table(options: argparse.Namespace) -> None:
    from sft_probe.synth.table import write_probe_set

    pairs = [item.partition("=") for item in options.category]
    if (
        not options.prompt
        or not options.out
        or not pairs
        or not all(name and column for name, _, column in pairs)
    ):
        raise UserError(
            "--from-csv needs --prompt COLUMN, --out DIRECTORY and --category NAME=COLUMN, once "
            "for each."
        )
    categories = {name: column for name, _, column in pairs}
    if len(categories) < len(pairs):
        raise UserError("--category names a category twice. Give each one column.")
    left_out = write_probe_set(
        options.from_csv,
        options.out,
        prompt_column=options.prompt,
        categories=categories,
        prompt_format=options.prompt_format,
        heldout=options.heldout,
        limit=options.limit,
        seed=options.seed,
    )
    for item in left_out:
        logging.getLogger(__name__).warning("left out: %s", item)
    logging.getLogger(__name__).info("wrote %s; %d rows left out", options.out, len(left_out))
