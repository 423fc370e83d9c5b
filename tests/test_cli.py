"""The command line: help, spellings, recipes, replay, typos, Ctrl-C, completion."""

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Run, make_docs, user_error
from transformers import TrainingArguments

from sft_probe import errors, recipes
from sft_probe.analysis.commands import Plot, Transfer
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.cli import COMMANDS, ProbeSet, main, overview
from sft_probe.command_line import config_of, read_command, write_config
from sft_probe.errors import UserError, first_few
from sft_probe.options import Command, about, options_of
from sft_probe.synth.options import SynthRun
from sft_probe.train import launch
from sft_probe.train.options import Train, expand, given_options, train_options

ROOT = Path(__file__).resolve().parents[1]
WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_described_with_examples_and_every_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    summary, _, examples = about(command)
    assert summary.endswith((".", ".`"))
    assert examples.count("sft-probe") >= 2
    fields = {field.name for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    assert {option.name for option in options_of(command)} == fields, "an option without help"
    assert all(option.help.endswith(".") for option in options_of(command))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])
def test_help_shows_every_option_once(name: str, sft_probe: Run) -> None:
    result = sft_probe(*name.split(), "--help")
    assert result.returncode == 0
    shown = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  -")]
    options = train_options() if name == "train" else options_of(COMMANDS[name])
    expected = ["-h,", *(option.flag for option in options if not option.is_positional)]
    assert sorted(shown) == sorted(expected)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, sft_probe.cli as cli\n"
        "for words in (['--help'], ['sweep', '-h'], ['train', '-h'], ['synth', 'run', '-h']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'lm_eval'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_options_of_the_trainer_are_read_from_its_source() -> None:
    named = {option.name for option in train_options()}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= named
    (rate,) = [option for option in train_options() if option.name == "learning_rate"]
    assert (rate.default, rate.metavar) == (5e-5, "X")
    assert "learning rate" in rate.help


def test_the_page_of_the_command_line_is_current() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks/cli_page.py"))["page"]
    assert (ROOT / "docs/cli.md").read_text("utf-8") == page(), (
        "run: python benchmarks/cli_page.py --write"
    )


@pytest.mark.parametrize(
    "flag", ["--max-length", "--max_length", "--max-length=7", "--max_length=7"]
)
def test_dashes_and_underscores_are_the_same(flag: str) -> None:
    argv = ["runs/a", flag, *([] if "=" in flag else ["7"])]
    assert read_command("sft-probe sweep", SweepRequest, argv).max_length == 7


def test_values_of_options_may_begin_with_dashes() -> None:
    argv = ["--train-on", "chosen", "--train-flags", "--max_steps 5 --dry_run"]
    assert read_command("", Transfer, argv).train_flags == "--max_steps 5 --dry_run"
    argv = ["--train-on", "chosen", "--train_flags=--max_steps=5"]
    assert read_command("", Transfer, argv).train_flags == "--max_steps=5"


def test_old_names_work_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert read_command("", Transfer, ["--rows", "a,b"]).train_on == ("a", "b")
    assert read_command("", ProbeSet, ["--from_csv", "t.csv"]).from_table == Path("t.csv")
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "--rows is now --train-on",
        "--from_csv is now --from-table",
    ]


def test_synth_without_run_is_still_run(sft_probe: Run, tmp_path: Path) -> None:
    assert "no-such.jsonl" in user_error(
        sft_probe(
            "synth", "--source", "no-such.jsonl", "--writer", "offline", "--out", tmp_path / "set"
        )
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep", "runs/a"], "there is no command 'swep'. Did you mean sweep?"),
        (["sweep", "runs/a", "--max_lenght", "5"], "Did you mean --max-length?"),
        (["sweep", "runs/a", "--max", "5"], "there is no option '--max'. See sft-probe sweep"),
        (["sweep", "runs/a", "--max-length", "0"], "--max-length: 0 is not positive"),
        (["sweep", "runs/a", "--dtype", "int8"], "--dtype: there is no choice 'int8'."),
        (["sweep", "runs/a", "--max-length"], "--max-length: expected one argument"),
        (["sweep", "runs/a", "runs/b"], "'runs/b' is one argument too many"),
        (["sweep"], "RUN is missing. Usage: sft-probe sweep RUN [options]"),
        (["synth"], "--source, --out are missing"),
        (["completion", "tcsh"], "SHELL: there is no choice 'tcsh'. Use one of bash"),
        (["transfer"], "transfer needs either --runs or --train-on"),
        (["train", "--learning_rat", "1"], "Did you mean --learning_rate?"),
        (["train", "--snapshot-step", "1"], "Did you mean --snapshot_steps?"),
        (["train", "--config", "quikstart"], "Did you mean quickstart?"),
        (["train", "--train_category", "chosn"], "Did you mean chosen?"),
        (["train", "--probe_set", "no-such-set"], "no probe set"),
        (["train", "--model_name_or_path", "./no-model"], "there is no config.json in it"),
        (["train", "--train_data", "no.jsonl"], "--train_data no.jsonl: there is no such file"),
        (["train", "--deepspeed", "zero22"], "Did you mean zero2?"),
        (["train", "--config", "quickstart"], "--output_dir is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typo_is_one_line(words: list[str], message: str, sft_probe: Run) -> None:
    said = user_error(sft_probe(*words))
    assert message in said
    assert len(said.splitlines()) == 1


KNOWN_AT_ONCE = [
    ("analyze no", "no does not exist"),
    ("plot no", "no does not exist"),
    ("report no", "no does not exist"),
    ("words no", "no does not exist"),
    ("weights no", "no does not exist"),
    ("ledger no", "no does not exist"),
    ("simplicity no", "no does not exist"),
    ("track no", "no does not exist"),
    ("sweep no", "no does not exist"),
    ("transfer --runs a=no", "no does not exist"),
    ("transfer --train-on chosen --recipe no", "there is no recipe 'no'"),
    ("analyze rnu", "rnu does not exist. Did you mean run?"),
    ("analyze run --categories chosn", "there is no category 'chosn'. Did you mean chosen?"),
    ("report run --categories chosn", "there is no category 'chosn'. Did you mean chosen?"),
    ("plot run --figures chnges", "there is no figure 'chnges'. Did you mean changes?"),
    ("plot run --format pgn", "there is no format 'pgn'. Did you mean png?"),
    ("sweep run --tasks ,", "--tasks: it names nothing"),
    ("import no --out d", "no does not exist"),
    ("sweep run", "holds no finished run"),
    ("sweep run --contexts wide,own", "there is no context 'wide'. Use one of own, near, far"),
    ("sweep run --splits test", "there is no split 'test'. Use one of heldout, train."),
    ("sweep run --tasks no.yaml", "--tasks: no.yaml is missing"),
    ("sweep out --checkpoints run/weights/* --probe-set no", "there is no probe set 'no'"),
    ("sweep out --checkpoints run/weights/* --prompt-format no", "no prompt format 'no'. Use hh"),
    ("probe-set no", "there is no probe set 'no'"),
    ("probe-set --from-table no.csv --prompt a --category b=c --out d", "no.csv does not exist"),
    ("probe-set --from-table run --prompt a --category b:c --out d", "--category b:c: write NAME="),
    ("benchmarks add no.jsonl", "no.jsonl does not exist"),
    ("tasks-dir --probe-set no", "there is no probe set 'no'"),
    ("synth run --source no.jsonl --categories random --out x", "no.jsonl"),
    ("train --no_flag", "there is no option '--no_flag'"),
    ("train --config no", "there is no recipe 'no'"),
    ("train --output_dir x --max_steps four", "--max_steps: 'four' is not a whole number"),
    ("train --output_dir x --learning_rate fast", "--learning_rate: 'fast' is not a number"),
    ("train --output_dir x --bf16 maybe", "--bf16: 'maybe' is neither true nor false"),
    ("train --output_dir x --learning_rate", "--learning_rate needs a value"),
    ("train --output_dir x --seed 1 2", "--seed takes one value"),
    ("train --output_dir x --lr_scheduler_type cosin", "'cosin'. Did you mean cosine?"),
    ("train --output_dir x --optim adamw", "there is no choice 'adamw'"),
    ("train --output_dir x --snapshot_steps often", "'often' is neither a step"),
    ("train --output_dir x --prompt_format no", "there is no prompt format 'no'"),
    ("train --output_dir x --train_category no", "there is no category 'no'"),
    ("train --output_dir x --deepspeed zero22", "Did you mean zero2?"),
    ("train --output_dir run/manifest", "is a file"),
    ("train --output_dir x --model_name_or_path ./run", "over the model's window of 64 tokens"),
    ("train", "--output_dir is missing"),
]


def test_what_files_and_flags_tell_is_said_before_anything_heavy_is_imported(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for folder in ("sweep/step_000000/heldout", "weights/step_0"):
        (run / folder).mkdir(parents=True)
    meta = {"step": 0, "examples_seen": 0, "tokens_seen": 0, "epoch": 0.0, "dtype": "float32"}
    (run / "weights/step_0/meta.json").write_text(json.dumps({**meta, "sha256": {}}))
    (run / "sweep/manifest.json").write_text('{"categories": ["chosen", "rejected"]}')
    (run / "sweep/step_000000/heldout/rows.jsonl").write_text("")
    (run / "manifest").write_text("")
    (run / "config.json").write_text('{"max_position_embeddings": 64}')
    code = (
        "import contextlib, io, json, sys, sft_probe.cli as cli\n"
        "for words, message in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(said): cli.main(words.split())\n"
        "    except SystemExit as end: assert end.code == 2, words\n"
        "    else: assert False, words\n"
        "    assert message in said.getvalue(), (words, said.getvalue())\n"
        "    assert said.getvalue().count('sft-probe: ') == 1, said.getvalue()\n"
        "    found = {'torch', 'transformers', 'numpy', 'pandas', 'lm_eval'} & {*sys.modules}\n"
        "    assert not found, (words, found)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(KNOWN_AT_ONCE)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_the_name_of_the_model_is_checked_before_anything_is_compiled(
    sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "build_extension", lambda: pytest.fail("compiled too early"))
    flags = ("--model_name_or_path", "no/such-model", "--deepspeed", "cpu")
    said = user_error(sft_probe("train", *flags, "--output_dir", tmp_path / "run"))
    assert "cannot load the tokenizer of 'no/such-model'" in said


@pytest.mark.parametrize("name", recipes.available())
def test_recipes_are_found_by_name_and_hold_known_options(name: str) -> None:
    path = recipes.find_recipe(name)
    assert path == recipes.find_recipe(str(path)) == recipes.find_recipe(f"{name}.yaml")
    values = yaml.safe_load(path.read_text("utf-8"))
    assert given_options(expand(["--config", name])).keys() == values.keys()


def test_a_recipe_with_an_unknown_option_is_refused(tmp_path: Path, sft_probe: Run) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rat: 1e-5\n")
    said = user_error(sft_probe("train", "--config", recipe))
    assert f"{recipe}: there is no option 'learning_rat'." in said
    assert "Did you mean learning_rate?" in said


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (SweepRequest, ["runs/a"]),
        (
            SweepRequest,
            [
                "out",
                "--checkpoints",
                "a",
                "b=3",
                "--splits",
                "train,heldout",
                "--shard",
                "2/3",
                "--limit",
                "0.5",
                "--tasks",
                "x",
                "--apply-chat-template",
                "--dtype",
                "bfloat16",
            ],
        ),
        (Transfer, ["--runs", "a=runs/a", "b=runs/b", "--out", "there"]),
        (Transfer, ["--train-on", "chosen,x.jsonl", "--train-flags=--max_steps 4"]),
        (
            SynthRun,
            ["--source", "a", "--out", "b", "--writer", "hf", "--judge", "--max-cost-usd", "2.50"],
        ),
    ],
)
def test_a_config_replays_a_command(
    command: type[Command], argv: list[str], tmp_path: Path
) -> None:
    given = read_command("", command, argv)
    write_config(tmp_path / "config.yaml", "", config_of(given))
    config = str(tmp_path / "config.yaml")
    replayed = read_command("", command, ["--config", config])
    assert config_of(replayed) == config_of(given)
    assert replayed == dataclasses.replace(given, config=Path(config))  # type: ignore[type-var]


def test_options_on_the_command_line_win_over_the_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("directory: runs/a\nmax-length: 5\ntasks: [a, b]\ndtype: float16\n")
    read = read_command("", SweepRequest, ["--config", str(config), "--max_length", "6", "runs/b"])
    assert (read.directory, read.max_length, read.tasks) == (Path("runs/b"), 6, ("a", "b"))
    config.write_text("max_lenght: 5\n")
    with pytest.raises(UserError, match=r"no option 'max_lenght'\. Did you mean max_length\?"):
        read_command("", SweepRequest, ["--config", str(config)])


def test_a_run_is_replayed_by_its_config(tiny_run: Path, sft_probe: Run, tmp_path: Path) -> None:
    result = sft_probe("train", "--config", tiny_run / "config.yaml")
    assert result.returncode == 0, result.stderr
    assert f"the run in {tiny_run} is complete" in result.stderr
    replayed = ("train", "--config", tiny_run / "config.yaml", "--output_dir", tmp_path / "run")
    result = sft_probe(*replayed, "--dry_run")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("values", [["--bf16", "true"], ["--dry_run"], ["--label_names", "a", "b"]])
def test_replayed_flags_are_the_same_text(values: list[str], tmp_path: Path) -> None:
    flags = [
        *values,
        "--max_steps",
        "4",
        "--learning_rate",
        "1e-3",
        "--seed",
        "007",
        "--lora_r=1.0",
    ]
    given = given_options(expand(flags))
    write_config(tmp_path / "config.yaml", "", given)
    assert given_options(expand(["--config", str(tmp_path / "config.yaml")])) == given


def test_a_dry_run_needs_no_directory(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sft_probe("train", *tiny_flags, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_category_that_no_run_has_is_refused(swept_run: Path, sft_probe: Run) -> None:
    said = user_error(sft_probe("analyze", swept_run, "--categories", "chosen,rejcted"))
    assert "--categories: there is no category 'rejcted'. Did you mean rejected?" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, sft_probe: Run) -> None:
    pytest.importorskip("shtab")
    script = sft_probe("completion", shell).stdout
    for word in ("sweep", "probe-set", "status", "ray-address", "snapshot_steps", "learning_rate"):
        assert word in script


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, sft_probe: Run) -> None:
    def interrupted(_: Plot) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Plot, "check", interrupted)
    result = sft_probe("plot", "runs/a")
    assert result.returncode == 130
    assert result.stderr.splitlines() == ["sft-probe: interrupted; what is complete is kept."]


def test_ctrl_c_while_a_file_is_read_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_probe", "sweep", "--config", str(pipe)],
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # until the program has opened it
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (
        130,
        "sft-probe: interrupted; what is complete is kept.\n",
    )
    assert writer is not None
    os.close(writer)


def test_output_that_is_cut_off_is_no_traceback() -> None:
    code = "import sft_probe.cli as cli\ncli.main(['train', '--help'])"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_nothing_of_other_libraries_is_printed(
    tiny_flags: list[str],
    sft_probe: Run,
    tmp_path: Path,
    write_set: WriteSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train and sweep outside of a git repository, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    outside = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    trained = sft_probe("train", *tiny_flags, "--output_dir", "run", **outside)
    swept = sft_probe("sweep", "run", **outside)
    checked = sft_probe("probe-set", write_set(make_docs()), **outside)
    for result in (trained, swept, checked):
        assert result.returncode == 0, result.stderr
        for word in ("pin_memory", "accelerator", "fatal:", "Warning", "warning"):
            assert word not in result.stderr
            assert word not in result.stdout


def test_the_program_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as end:
        main(["synth", "--help"])
    assert end.value.code == 0
    assert "synth status" in capsys.readouterr().out
    assert Train in COMMANDS.values()


def test_a_wait_is_said_when_it_has_lasted_long_and_not_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with errors.doing("being quick"):
        pass
    monkeypatch.setattr(errors, "_QUICK_S", 0.01)
    monkeypatch.setattr(errors, "_AGAIN_S", 0.02)
    with errors.doing("loading the model"):
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    assert caplog.messages[0] == "loading the model ..."
    assert caplog.messages[1].startswith("loading the model (0 s so far")
    assert not [message for message in caplog.messages if "quick" in message]


def test_no_progress_bars_of_other_libraries_are_shown() -> None:
    code = (
        "from sft_probe.errors import quiet; quiet()\n"
        "from transformers.utils import logging\n"
        "assert not logging.is_progress_bar_enabled()"
    )
    environment = {k: v for k, v in os.environ.items() if "PROGRESS_BARS" not in k}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


def test_a_dry_run_of_a_sweep_imports_nothing_heavy(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"out/checkpoint-{step}").mkdir(parents=True)
    code = (
        "import sys, sft_probe.cli as cli\n"
        "cli.main(['sweep', 'x', '--checkpoints', 'out/*', '--dry-run'])\n"
        "found = {'torch', 'transformers', 'numpy', 'pandas', 'lm_eval'} & {*sys.modules}\n"
        "assert not found, found"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "out/checkpoint-2" in result.stdout


def test_the_overview_lists_every_command_once_in_titled_groups() -> None:
    lines = overview().splitlines()
    found = [line for line in lines if line.startswith("  ")]
    assert len(found) == len(COMMANDS)
    assert all(line.startswith(f"  {name}  ") for line, name in zip(found, COMMANDS, strict=True))
    assert lines.count("studies of runs:") == 1


def test_a_message_names_the_first_few_and_says_how_many_more_there_are() -> None:
    assert first_few("abcde", 2) == "a, b and 3 more"
    assert first_few("ab", 2) == "a, b"
    assert first_few((name for name in "abc"), 1, "\n") == "a\nand 2 more"
    assert first_few(["a: x", "b: y", "c: z"], 2, "; ") == "a: x; b: y and 1 more"
