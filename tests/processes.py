"""The program in processes of their own, forked from one that has imported everything already.

Each is a real process: it has its own environment, can be killed, and ends with an exit code. What
it saves is ten seconds of imports. Settings that a library reads while it is imported (`HF_*`) do
not reach it.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sft_probe.cli import main

TIMEOUT_S = 900
"""For what takes seconds on an idle machine."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "sft_probe.train.sft",
        "sft_probe.analysis.sweep.sweep",
        "lm_eval.evaluator",
        "deepspeed",
        "processes",
    ]
)


def run_command(arguments: list[str]) -> None:
    """Run `sft-probe ARGUMENTS`."""
    sys.argv = ["sft-probe", *arguments]
    main(arguments)


def run_lm_eval(arguments: list[str]) -> None:
    """Run lm-eval's own program: `lm_eval ARGUMENTS`."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def run_script(arguments: list[str]) -> None:
    """Run `python ARGUMENTS`, the first of which is a file."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def train_on_two_ranks(arguments: list[str]) -> None:
    """Run `torchrun --nproc_per_node 2 --standalone -m sft_probe.train.sft ARGUMENTS`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(uuid.uuid4()),
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, run_command)(["train", *arguments])
    except ChildFailedError as error:
        raise SystemExit(1) from error


def _run(
    target: Callable[[list[str]], None],
    arguments: list[str],
    environment: dict[str, str],
    output: dict[int, str],
    answers: str | None,
) -> None:
    for descriptor, path in output.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if answers is not None:  # else stdin is empty
        sys.stdin = Path(answers).open(encoding="utf-8")  # noqa: SIM115
        os.dup2(sys.stdin.fileno(), 0)
    os.environ.update(environment)
    target(arguments)


class Forked:
    """A running command. It is used as a `subprocess.Popen` is."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        log: Path,
        out: Path | None = None,
        environment: Mapping[str, str] | None = None,
        answers: Path | None = None,
        target: Callable[[list[str]], None] = run_command,
    ) -> None:
        """Start the command; `log` takes its stderr, and its stdout unless `out` is given.

        `answers` is a file that it reads as its stdin.
        """
        output = {1: str(out or log), 2: str(log)}
        command = [str(argument) for argument in arguments]
        self._process = SERVER.Process(
            target=_run,
            args=(target, command, dict(environment or {}), output, answers and str(answers)),
        )
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; `None` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same as `returncode`."""
        return self._process.exitcode

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Return the exit code once the command has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"the command has not ended within {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the command at once."""
        self.send_signal(signal.SIGKILL)


def run_forked(
    *arguments: object,
    target: Callable[[list[str]], None] = run_command,
    environment: Mapping[str, str] | None = None,
    answers: str = "",
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, and return its exit code and what it has printed."""
    with tempfile.TemporaryDirectory() as folder:
        out, log, stdin = Path(folder, "out"), Path(folder, "err"), Path(folder, "in")
        stdin.write_text(answers)
        process = Forked(
            arguments, log=log, out=out, environment=environment, answers=stdin, target=target
        )
        code = process.wait()
        command = [str(argument) for argument in arguments]
        return subprocess.CompletedProcess(command, code, out.read_text(), log.read_text())
