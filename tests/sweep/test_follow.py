"""`sweep --follow`: checkpoints scored as they appear, nothing lost, nothing read half-written."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from helpers import Run, make_checkpoint, user_error
from processes import TIMEOUT_S, Forked


def _wait(process: Forked, log: Path, is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    log.touch()
    while not is_there():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def _begun(finished: Path, run: Path, steps: int) -> None:
    """A run as it is while it trains: some snapshots, and what is known from its start."""
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("weights", "manifest.json"))
    shutil.copy(finished / "manifest.json", run / "begun.json")
    for snapshot in sorted((finished / "weights").iterdir())[:steps]:
        shutil.copytree(snapshot, run / "weights" / snapshot.name)


def _finish(finished: Path, run: Path) -> None:
    shutil.copytree(finished / "weights", run / "weights", dirs_exist_ok=True)
    shutil.copy(finished / "manifest.json", run)


def _times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.glob("sweep/step_*/heldout/rows.jsonl")}


def test_a_run_is_followed_from_before_its_start_to_its_end(
    sft_probe: Run, tiny_flags: list[str], swept_run: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "tiny", tmp_path / "log"
    process = Forked(["sweep", run, "--follow"], log=log)
    result = sft_probe("train", *tiny_flags, "--output_dir", run)
    assert result.returncode == 0, result.stderr
    assert process.wait() == 0, log.read_text()
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()
    assert not (run / "begun.json").exists()


def test_a_follower_that_is_killed_loses_nothing(
    sft_probe: Run, tiny_run: Path, swept_run: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "tiny", tmp_path / "log"
    _begun(tiny_run, run, steps=2)
    process = Forked(["sweep", run, "--follow"], log=log)
    _wait(process, log, lambda: "2 checkpoints scored; waiting" in log.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _times(run)
    assert len(before) == 2
    assert set(pd.read_csv(run / "trajectory.csv")["step"]) == {0, 1}, "tables are there meanwhile"
    _finish(tiny_run, run)
    result = sft_probe("sweep", run, "--follow")
    assert result.returncode == 0, result.stderr
    assert before.items() <= _times(run).items(), "nothing is scored twice"
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()


def test_a_checkpoint_that_is_still_being_written_is_waited_for(
    sft_probe: Run, tiny_model: Path, tmp_path: Path
) -> None:
    whole, theirs = tmp_path / "whole", tmp_path / "theirs"
    make_checkpoint(whole, tiny_model, 2)
    make_checkpoint(theirs / "checkpoint-10", tiny_model, 1)
    half = theirs / "checkpoint-20"
    half.mkdir()
    weights = (whole / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    log, out = tmp_path / "log", tmp_path / "out"
    flags = ["--checkpoints", theirs / "checkpoint-*", "--prompt-format", "hh"]
    process = Forked(["sweep", out, *flags, "--follow", "--until", 20], log=log)
    _wait(process, log, lambda: "1 checkpoints scored; waiting" in log.read_text())
    shutil.copytree(whole, half, dirs_exist_ok=True)
    assert process.wait() == 0, log.read_text()
    plain = tmp_path / "plain"
    assert sft_probe("sweep", plain, *flags).returncode == 0
    found, expected = (pd.read_csv(run / "trajectory.csv") for run in (out, plain))
    assert set(found["step"]) == {10, 20}
    pd.testing.assert_frame_equal(found.drop(columns="run"), expected.drop(columns="run"))


def test_what_cannot_be_followed_is_refused(sft_probe: Run, tmp_path: Path) -> None:
    flags = ["sweep", tmp_path / "out", "--follow"]
    message = user_error(sft_probe(*flags, "--checkpoints", tmp_path / "*"))
    assert "--follow needs --until STEP here" in message
    message = user_error(sft_probe(*flags, "--model", "x", "--revisions", "step0"))
    assert "not --model" in message
    assert "add --follow" in user_error(sft_probe("sweep", tmp_path / "out", "--until", 4))


@pytest.mark.full
def test_a_step_that_never_comes_is_not_waited_for(
    sft_probe: Run, tiny_model: Path, tmp_path: Path
) -> None:
    for seed, step in ((1, 10), (2, 30)):
        make_checkpoint(tmp_path / f"theirs/checkpoint-{step}", tiny_model, seed)
    flags = ["--checkpoints", tmp_path / "theirs/checkpoint-*", "--prompt-format", "hh"]
    result = sft_probe("sweep", tmp_path / "out", *flags, "--follow", "--until", 20)
    assert result.returncode == 0, result.stderr
    assert set(pd.read_csv(tmp_path / "out/trajectory.csv")["step"]) == {10}
