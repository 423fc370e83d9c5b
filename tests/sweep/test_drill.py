"""Several sweeps and shards on one directory, killed at random: the table is that of one
undisturbed sweep."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from helpers import Run, make_checkpoint, make_docs
from processes import TIMEOUT_S, Forked


class Drill:
    """Processes that sweep into one directory; each command is started again after a kill, as a
    user would."""

    def __init__(self, out: Path, commands: list[list[str]], seed: int) -> None:
        self.out = out
        self.commands = commands
        self.random = random.Random(seed)
        self.running: dict[int, Forked] = {}
        self.kills = 0

    def start(self, number: int) -> None:
        log = self.out.parent / f"{number}.log"
        self.running[number] = Forked(self.commands[number], log=log)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, "nothing happens"
            time.sleep(0.005)

    def num_parts(self) -> int:
        return len(list(self.out.glob("sweep/step_*/*/rows.jsonl")))  # half-written ones too

    def kill_one(self) -> None:
        """Waits for something to be written, and a little, then kills whichever process."""
        before = self.num_parts()
        self.wait_for(lambda: self.num_parts() > before or not self.alive())
        time.sleep(self.random.uniform(0, 0.1))
        if alive := self.alive():
            self.kill(self.random.choice(alive))

    def kill(self, number: int) -> None:
        """Kill a process, if it has not ended by itself, and start it again."""
        self.running[number].kill()
        self.kills += self.running[number].wait() == -signal.SIGKILL
        self.start(number)

    def alive(self) -> list[int]:
        return [number for number, process in self.running.items() if process.poll() is None]

    def run(self, num_kills: int) -> None:
        for number in range(len(self.commands)):
            self.start(number)
            if number == 0:  # it has only just begun, however fast the machine is
                self.kill(number)
            time.sleep(self.random.uniform(0, 0.3))
        for _ in range(num_kills):
            self.kill_one()
        self.wait_for(lambda: not self.alive())
        for number, process in self.running.items():
            assert process.returncode == 0, (self.out.parent / f"{number}.log").read_text()


@pytest.mark.parametrize(
    "size",
    [(6, 2, 0), *(pytest.param((24, 12, seed), marks=pytest.mark.full) for seed in range(4))],
)
def test_four_sweeps_at_once_with_kills_make_the_table_of_one_sweep(
    tiny_model: Path, tmp_path: Path, sft_probe: Run, size: tuple[int, int, int]
) -> None:
    last, num_kills, seed = size
    names = [
        make_checkpoint(tmp_path / f"checkpoint-{step}", tiny_model, step)
        for step in range(1, last + 1)
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(12)))
    flags = [
        "--checkpoints",
        *map(str, names),
        "--probe_set",
        str(tmp_path / "set.jsonl"),
        "--splits",
        "heldout,train",
    ]
    assert sft_probe("sweep", tmp_path / "one/run", *flags).returncode == 0
    out = tmp_path / "many/run"
    out.mkdir(parents=True)
    command = ["sweep", str(out), *flags]
    drill = Drill(
        out, [command, command, [*command, "--shard", "1/2"], [*command, "--shard", "2/2"]], seed
    )
    drill.run(num_kills)
    assert drill.kills, "nothing was killed"
    one, many = (pd.read_parquet(path / "scores.parquet") for path in (tmp_path / "one/run", out))
    assert len(many) == last * 12 * 2
    pd.testing.assert_frame_equal(many, one, atol=1e-4, rtol=0)
    one, many = (pd.read_csv(path / "trajectory.csv") for path in (tmp_path / "one/run", out))
    pd.testing.assert_frame_equal(many, one, atol=1e-4, rtol=0)
    assert not list(out.glob("sweep/step_*/.*.tmp")), "half-written parts are cleaned"
