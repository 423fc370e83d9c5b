"""What a sweep costs that has nothing to score grows with the number of steps, no faster. Work is
counted, not time."""

import cProfile
import json
import pstats
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import Run, make_docs

from sft_probe.analysis.stats import analyze, trajectory
from sft_probe.analysis.sweep import sweep
from sft_probe.analysis.sweep.request import SweepRequest


@pytest.fixture
def done(tiny_model: Path, sft_probe: Run, tmp_path: Path) -> Callable[[int], SweepRequest]:
    """Makes a directory with that many scored steps, all copies of one."""
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(8)))
    names = {"checkpoints": [str(tmp_path / "step*")], "probe_set": str(tmp_path / "set.jsonl")}
    flags = ("--checkpoints", tmp_path / "step1", "--probe_set", tmp_path / "set.jsonl")
    shutil.copytree(tiny_model, tmp_path / "step1")
    assert sft_probe("sweep", tmp_path / "out", *flags).returncode == 0
    first = tmp_path / "out/sweep/step_000001/heldout"

    def make(num_steps: int) -> SweepRequest:
        for step in range(2, num_steps + 1):
            part = tmp_path / f"out/sweep/step_{step:06d}/heldout"
            if part.exists():
                continue
            (tmp_path / f"step{step}").symlink_to(tmp_path / "step1")
            part.mkdir(parents=True)
            rows = [
                json.loads(line) | {"step": step}
                for line in (first / "rows.jsonl").read_text().splitlines()
            ]
            (part / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            shutil.copy2(first / "checkpoint.json", part)
        return SweepRequest(directory=tmp_path / "out", **names)  # type: ignore[arg-type]

    return make


def num_calls(work: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_the_work_of_making_tables_grows_linearly_with_the_steps(
    done: Callable[[int], SweepRequest], tmp_path: Path
) -> None:
    works: list[Callable[[], object]] = [
        lambda: sweep.sweep(request),
        lambda: analyze.analyze([tmp_path / "out"]),
    ]
    counts: list[list[int]] = []
    for num_steps in (20, 40, 80):
        request = done(num_steps)
        sweep.sweep(request)  # what is built once
        counts.append([num_calls(work) for work in works])
    for small, middle, large in zip(*counts, strict=True):
        assert large - middle < 2.3 * (middle - small) + 2000
        assert (large - middle) / 40 < 3000, "calls per step"
    assert len(pd.read_csv(tmp_path / "out/trajectory.csv")) == 80 * 2


def test_all_intervals_of_a_split_come_from_one_call(
    done: Callable[[int], SweepRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate: Any = vars(trajectory)["estimate"]
    calls = []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        return estimate(*arguments, **more)

    monkeypatch.setattr(trajectory, "estimate", counted)
    for num_steps in (5, 15):
        calls.clear()
        sweep.sweep(done(num_steps))
        assert len(calls) == 2, "one for the log-probs, one for their changes"
