"""The sweep on a local Ray cluster."""

import contextlib
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from helpers import Run, user_error
from processes import Forked


@pytest.fixture
def checkpoints(tiny_run: Path, tmp_path: Path) -> Path:
    for step in range(1, 5):
        shutil.copytree(
            tiny_run / f"weights/step_{(0, 1, 4)[step % 3]:06d}", tmp_path / f"checkpoint-{step}"
        )
    return tmp_path


def kill_a_worker_in_mid_step(process: Forked) -> None:
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may have ended since
                if child.cmdline()[:1] == ["ray::StepWorker.score"]:
                    child.send_signal(signal.SIGKILL)
                    return
        time.sleep(0.03)
    pytest.fail("the sweep has ended before a worker was seen to score")


@pytest.mark.slow
def test_the_step_of_a_killed_ray_worker_is_scored_by_another(
    checkpoints: Path, sft_probe: Run
) -> None:
    flags = [
        "--checkpoints",
        str(checkpoints / "checkpoint-*"),
        "--splits",
        "heldout,train",
        "--device",
        "cpu",
    ]
    log = checkpoints / "a.log"
    process = Forked(["sweep", checkpoints / "a/run", *flags, "--engine", "ray"], log=log)
    kill_a_worker_in_mid_step(process)
    code, output = process.wait(), log.read_text()
    assert code == 0, output
    assert "its worker died; another one takes it" in output
    assert sft_probe("sweep", checkpoints / "b/run", *flags).returncode == 0
    mine, theirs = (
        pd.read_csv(checkpoints / folder / "run/trajectory.csv") for folder in ("a", "b")
    )
    pd.testing.assert_frame_equal(mine, theirs, atol=1e-4, rtol=0)
    assert sorted(mine["step"].unique()) == [1, 2, 3, 4]


@pytest.mark.slow
def test_bad_checkpoints_on_a_ray_cluster_are_reported_and_the_others_scored(
    checkpoints: Path, sft_probe: Run
) -> None:
    (checkpoints / "checkpoint-3/model.safetensors").write_bytes(b"no tensors")
    (checkpoints / "checkpoint-4/tokenizer.json").write_text(
        '{"version": "1.0"}'
    )  # a KeyError of transformers
    flags = (
        "--checkpoints",
        checkpoints / "checkpoint-[1234]",
        "--engine",
        "ray",
        "--device",
        "cpu",
    )
    message = user_error(sft_probe("sweep", checkpoints / "run", *flags, process=True))
    assert "step 3: cannot " in message
    assert "step 4: " in message
    assert "KeyError('added_tokens')" in message
    assert sorted(pd.read_csv(checkpoints / "run/trajectory.csv")["step"].unique()) == [1, 2]


@pytest.mark.slow
def test_an_address_without_a_ray_cluster_is_reported(checkpoints: Path, sft_probe: Run) -> None:
    flags = (
        "--checkpoints",
        checkpoints / "checkpoint-*",
        "--engine",
        "ray",
        "--ray-address",
        "127.0.0.1:1",
    )
    message = user_error(sft_probe("sweep", checkpoints / "run", *flags, process=True))
    assert "cannot reach a Ray cluster at 127.0.0.1:1" in message
