"""kill -9 at any moment and the same command again: the same losses, order, weights and rows; and
clean stops."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers import Run, user_error
from processes import Forked, run_command, train_on_two_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from sft_probe.train.run_dir import ResumeCallback

STEPS = 12
NAMES = ("none", "zero3-2", "zero1-2", "zero2-2", "none-2")  # a number: that many ranks
# One process of pytest-xdist for each launch, so that its undisturbed run is made once.
LAUNCHES = {
    name: pytest.param(
        name,
        marks=[pytest.mark.xdist_group(name), *([] if position < 2 else [pytest.mark.full])],
    )
    for position, name in enumerate(NAMES)
}
KILLED = [LAUNCHES[name] for name in NAMES[:4]]


@pytest.fixture(scope="module")
def flags(tiny_model: Path) -> list[str]:
    return (
        f"--model_name_or_path {tiny_model} --probe_set helpful-mini --max_steps {STEPS} --seed 3 "
        "--learning_rate 1e-3 "
        "--gradient_accumulation_steps 3 --snapshot_steps 0,1,+4 --resume_steps +2 --probe_steps "
        "0,+5 --probe_train 5 "
        "--warmup_steps 5 --lr_scheduler_type cosine"
    ).split()


def command(launch: str, flags: list[str], run: Path) -> list[str]:
    name, _, ranks = launch.partition("-")
    rows = ["--per_device_train_batch_size", "2" if ranks else "4"]
    rest = [*flags, *rows, "--deepspeed", name, "--output_dir", str(run)]
    return rest if ranks else ["train", *rest]


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def start(launch: str, flags: list[str], run: Path) -> Forked:
    log_of(run).unlink(missing_ok=True)
    return Forked(
        command(launch, flags, run),
        log=log_of(run),
        target=train_on_two_ranks if "-" in launch else run_command,
    )


def finish(launch: str, flags: list[str], run: Path) -> str:
    code = start(launch, flags, run).wait()
    log = log_of(run).read_text()
    assert code == 0, log
    return log


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(run: Path, step: int, process: Forked) -> None:
    while len(lines(run / "losses.jsonl")) < step or not (run / "started.json").exists():
        assert process.poll() is None, log_of(run).read_text()
        time.sleep(0.005)


def kill_all(process: Forked) -> None:
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    process.wait()


def results(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for times and names."""
    files = {}
    for path in sorted(run.rglob("*.json*")):
        if path.parent.name == "probe" or path.parent == run or path.name == "meta.json":
            files[str(path.relative_to(run))] = path.read_text()
    manifest, times = json.loads(files.pop("manifest.json")), ("save_s",)
    metas = {name: json.loads(text) for name, text in files.items() if name.endswith("meta.json")}
    return {
        **files,
        **{
            name: {key: value for key, value in meta.items() if key not in times}
            for name, meta in metas.items()
        },
        "doc_ids": manifest["doc_ids"],
        "states": list(run.glob("checkpoint-*")),
    }


_whole_runs: dict[str, Path] = {}


def whole(launch: str, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    if launch not in _whole_runs:
        run = tmp_path_factory.mktemp(launch) / "run"
        finish(launch, flags, run)
        assert len(lines(run / "losses.jsonl")) == STEPS
        _whole_runs[launch] = run
    return _whole_runs[launch]


def rows_of_probe(run: Path) -> dict[tuple[Any, ...], float]:
    texts = [
        json.loads(line) for path in sorted(run.glob("probe/step_*.jsonl")) for line in lines(path)
    ]
    return {
        (row["step"], row["doc_id"], row["category"], row["examples_seen"]): row["logprob"]
        for row in texts
    }


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES.values())
def test_deepspeed_stages_give_the_same_snapshots_and_losses(
    launch: str, flags: list[str], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = whole(launch, flags, tmp_path_factory)
    assert not list(run.glob("checkpoint-*")), "a complete run needs no states"
    before, start = (
        load_file(tiny_model / "model.safetensors"),
        load_file(run / "weights/step_000000/model.safetensors"),
    )
    assert before.keys() == start.keys()
    assert all(torch.equal(before[name], start[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(run / f"weights/step_{STEPS:06d}")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    one = [
        json.loads(line)["loss"]
        for line in lines(whole("none", flags, tmp_path_factory) / "losses.jsonl")
    ]
    mine = [json.loads(line) for line in lines(run / "losses.jsonl")]
    assert [row["loss"] for row in mine] == pytest.approx(one, abs=1e-5)
    alone, shared = (rows_of_probe(path) for path in (whole("none", flags, tmp_path_factory), run))
    assert list(alone) == list(shared)  # 3 steps, 32 + 5 docs, 6 categories
    assert len(shared) == 3 * 37 * 6
    assert list(shared.values()) == pytest.approx(list(alone.values()), abs=2e-3)
    exposure = [json.loads(line)["times_shown"] for line in lines(run / "exposure.jsonl")]
    assert exposure == [2] * 64  # an epoch has 5 steps of 12 examples and one of 4
    assert mine[-1]["examples_seen"] == 128


def kill_and_go_on(launch: str, flags: list[str], run: Path, chance: random.Random) -> str:
    process = start(launch, flags, run)
    wait_for_step(run, chance.randrange(STEPS - 2), process)
    time.sleep(chance.random() * 0.1)
    kill_all(process)
    assert not (run / "manifest.json").exists(), "it was done before it was killed"
    return finish(launch, flags, run)


@pytest.mark.slow
@pytest.mark.parametrize("launch", KILLED)
def test_a_killed_training_resumes_to_the_same_results(
    launch: str, flags: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # to try a failure again
    log = kill_and_go_on(launch, flags, tmp_path / "run", random.Random(seed))
    assert "was interrupted; training" in log
    assert results(tmp_path / "run") == results(whole(launch, flags, tmp_path_factory))


@pytest.mark.full
@pytest.mark.parametrize("launch", KILLED)
@pytest.mark.parametrize("seed", range(10))
def test_a_training_killed_at_any_moment_resumes_to_the_same_results(
    launch: str,
    seed: int,
    flags: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kill_and_go_on(launch, flags, tmp_path / "run", random.Random(seed))
    assert results(tmp_path / "run") == results(whole(launch, flags, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.xdist_group("none")
def test_half_written_states_and_snapshots_are_redone(
    flags: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path / "run"
    process = start("none", flags, run)
    wait_for_step(run, 7, process)
    kill_all(process)
    newest = max((int(path.name[11:]) for path in run.glob("checkpoint-*")), default=0)
    (run / f"checkpoint-{newest}/sft_probe_state.json").unlink(
        missing_ok=True
    )  # as if killed in the middle of it
    (run / "weights/.step_000008.tmp").mkdir(exist_ok=True)
    with (run / "losses.jsonl").open("a") as file:
        file.write('{"run": "ru')
    log = finish("none", flags, run)
    assert f"resumes from checkpoint-{newest - 2}" in log or newest <= 2
    assert results(run) == results(whole("none", flags, tmp_path_factory))
    assert not (run / "weights/.step_000008.tmp").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launch", [LAUNCHES["none"], LAUNCHES["zero3-2"]])
def test_a_signal_stops_all_ranks_with_a_state_to_resume_from(
    launch: str, flags: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    number, name = {
        "none": (signal.SIGINT, "Ctrl-C"),
        "zero3-2": (signal.SIGTERM, "SIGTERM"),
    }[launch]
    run = tmp_path / "run"
    quiet = [*flags, "--resume_steps", "last"]  # no state but that of the stop
    process = start(launch, quiet, run)
    wait_for_step(run, 1, process)
    ranks = psutil.Process(process.pid).children() if "-" in launch else []
    (ranks[-1] if ranks else process).send_signal(number)  # to one rank: all stop
    process.wait()
    err = log_of(run).read_text()
    assert process.returncode == (1 if ranks else 75), err  # torchrun has an exit code of its own
    assert f"stopped by {name} at step" in err
    assert "To resume, run the same command again." in err
    assert ranks or "Traceback" not in err  # torchrun prints one
    assert len(list(run.glob("checkpoint-*/sft_probe_state.json"))) == 1
    assert not (run / "manifest.json").exists()
    assert "resumes from checkpoint-" in finish(launch, quiet, run)
    assert results(run) == results(whole(launch, flags, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.xdist_group("none")
def test_a_training_cut_by_wall_time_resumes_to_the_same_results(
    flags: list[str], sft_probe: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A second of wall time, or a step at least, at a time; the limit may differ from one attempt
    to the next."""
    codes: list[int] = []
    while 0 not in codes:
        arguments = command("none", flags, tmp_path / "run")[1:]
        limit = 0.01 if len(codes) < 2 else 60
        result = sft_probe("train", *arguments, "--max_wall_time_s", limit, process=True)
        codes.append(result.returncode)
    assert codes == [75, 75, 0]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    metas = [
        json.loads(path.read_text()) for path in (tmp_path / "run/weights").glob("*/meta.json")
    ]
    assert manifest["snapshot_save_s"] == pytest.approx(
        sum(meta["save_s"] for meta in metas), abs=2e-3
    )
    assert results(tmp_path / "run") == results(whole("none", flags, tmp_path_factory))


def test_the_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    child = os.fork()  # so that the signals do not reach the tests
    if not child:
        losses: Any = SimpleNamespace(run_dir=tmp_path)
        callback = ResumeCallback(losses, None, resume_steps=None, max_wall_time_s=None)
        callback.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState())
        signal.raise_signal(signal.SIGINT)
        (tmp_path / "first").touch()
        signal.raise_signal(signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert (tmp_path / "first").exists()
    assert os.WTERMSIG(status) == signal.SIGINT


def test_another_launch_of_a_run_that_stopped_is_refused(
    flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    arguments = [*command("none", flags, tmp_path / "run")[1:], "--max_wall_time_s", "0.01"]
    assert sft_probe("train", *arguments).returncode == 75
    assert "--learning_rate: 1e-3 there, 1e-4 now" in user_error(
        sft_probe("train", *arguments, "--learning_rate", "1e-4")
    )
    started = json.loads((tmp_path / "run/started.json").read_text())
    (tmp_path / "run/started.json").write_text(
        json.dumps({**started, "world_size": 8, "probe_set_sha256": "other"})
    )
    message = user_error(sft_probe("train", *arguments))
    assert "8 processes there, 1 now" in message
    assert "the probe set has changed" in message
