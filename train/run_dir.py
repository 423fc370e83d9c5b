"""The run directory: one run, one process at a time, and states to resume from.

A state is `checkpoint-N/` as the Trainer and DeepSpeed write it. `sft_probe_state.json` is written
into it last, once everything else is on disk, and holds our own counts: a directory without it is
half-written.
"""

import hashlib
import importlib.metadata
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_probe.errors import UserError
from sft_probe.files import fsync_path, read_object, write_json
from sft_probe.train.schedule import resolve_steps
from sft_probe.train.trainer import LOG_NAMES, LossLog

log = logging.getLogger(__name__)

STOPPED_EXIT_CODE = 75
"""Exit code of a run that stopped early and can be resumed: EX_TEMPFAIL of sysexits.h."""
_MAY_DIFFER = ("max_wall_time_s", "dry_run", "local_rank")
"""Flags that may change from one attempt at a run to the next; `deepspeed` sets the last one."""
_MARKER = "sft_probe_state.json"
BEGUN = "begun.json"
"""What `manifest.json` will say of a run and is known from its start, for those that follow it."""
_COUNTS = {"times_shown": dict, "tokens_seen": int, "lr_since_snapshot": float}
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run directory; the lock ends with the process, however it ends.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        lock = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(
            f"another process is training in {run_dir}. Wait for it, or choose another "
            "--output_dir."
        ) from error
    with lock:
        yield


def request_of(flags: dict[str, str], world_size: int, **contents: str | None) -> dict[str, Any]:
    """Return what makes two attempts the same run: flags, number of processes, and contents.

    Args:
        flags: as given, names to texts.
        world_size: the number of processes.
        contents: hashes of the files that the flags name.
    """
    return {
        "flags": {name: value for name, value in flags.items() if name not in _MAY_DIFFER},
        "world_size": world_size,
        **contents,
    }


def sha256_text(path: str | None) -> str | None:
    """Return the SHA-256 of a small file; `None` for no path."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _recorded_request(run_dir: Path) -> dict[str, Any] | None:
    """Return the request of an earlier attempt in this directory, finished or not."""
    if (run_dir / "manifest.json").exists():
        request: dict[str, Any] = read_object(run_dir / "manifest.json", {"request": dict})
        return dict(request["request"])
    started = run_dir / "started.json"
    return read_object(started) if started.exists() else None


def is_complete(run_dir: Path, request: dict[str, Any]) -> bool:
    """Return whether the directory holds a finished run of this request.

    Raises:
        UserError: it holds a run of another request (the difference is named), or weights that no
            request is recorded for.
    """
    earlier = _recorded_request(run_dir)
    if earlier is None:
        if (run_dir / "weights").exists() or list(run_dir.glob("checkpoint-*")):
            raise UserError(
                f"{run_dir} holds weights of another origin. Choose another --output_dir."
            )
        return False
    if earlier != request:
        raise UserError(
            f"{run_dir} holds another run ({_difference(earlier, request)}). Choose another "
            "--output_dir."
        )
    return (run_dir / "manifest.json").exists()


def recorded_format(run_dir: Path) -> str | None:
    """Return the prompt format of an earlier attempt in this directory, if there was one."""
    found: str | None = (_recorded_request(run_dir) or {}).get("prompt_format")
    return found


def begin_run(run_dir: Path, request: dict[str, Any]) -> str | None:
    """Record the request, and remove what an interrupted attempt will write again.

    Returns:
        How an earlier attempt is resumed; `None` if there was none.
    """
    if not (run_dir / "started.json").exists():
        write_json(run_dir / "started.json", request)
        return None
    state = latest_state(run_dir)
    remove_after(run_dir, state)
    return f"an earlier attempt in {run_dir} was interrupted; training " + (
        "starts again" if state is None else f"resumes from {state.name}"
    )


def abandon_run(run_dir: Path) -> None:
    """Remove the request if nothing was made for it, so that other flags can use the directory."""
    if latest_state(run_dir) is None and not (run_dir / "weights").exists():
        for name in ("started.json", BEGUN):
            (run_dir / name).unlink(missing_ok=True)


def finish_run(run_dir: Path) -> None:
    """Remove what only a resumed attempt would need from a complete run."""
    for name in ("started.json", BEGUN):
        (run_dir / name).unlink(missing_ok=True)
    for path in run_dir.glob("checkpoint-*"):
        shutil.rmtree(path)


def _difference(earlier: dict[str, Any], request: dict[str, Any]) -> str:
    old, new = earlier.get("flags", {}), request["flags"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    differences = [
        f"--{name}: {old.get(name, 'unset')} there, {new.get(name, 'unset')} now" for name in names
    ]
    if earlier.get("world_size") != request["world_size"]:
        differences.append(
            f"{earlier.get('world_size', '?')} processes there, {request['world_size']} now"
        )
    for name in request.keys() - {"flags", "world_size"}:
        if earlier.get(name) != request[name]:
            differences.append(f"the {name.removesuffix('_sha256').replace('_', ' ')} has changed")
    return ", ".join(differences)


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide what a run computes; `None` if absent."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("sft-probe", "torch", "transformers", "accelerate", "deepspeed", "peft", "lm_eval")
    return {name: version(name) for name in names}


def git_revision() -> str | None:
    """Return the commit of the working directory; `None` outside a repository."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def latest_state(run_dir: Path) -> Path | None:
    """Return the complete state with the highest step."""
    states = [path.parent for path in run_dir.glob(f"checkpoint-*/{_MARKER}")]
    return max(states, key=_step_of, default=None)


def remove_after(run_dir: Path, state: Path | None) -> None:
    """Remove all states but this one, and every file that a run from there writes again."""
    for path in run_dir.glob("checkpoint-*"):
        if path != state:
            shutil.rmtree(path)
    if state is None:
        for name in ("weights", "probe"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in LOG_NAMES:
            (run_dir / name).unlink(missing_ok=True)
        return
    for path in (run_dir / "weights").glob("*step_*"):
        if path.name.startswith(".") or _step_of(path) > _step_of(state):
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.replace("_", "-").rpartition("-")[2])


class ResumeCallback(TrainerCallback):
    """Saves states at the given steps, resumes from one, and stops early with one.

    SIGTERM or Ctrl-C to any rank, or `max_wall_time_s` since this object was made (by the clock of
    the first rank), stops all ranks after the same step, with a state. A second Ctrl-C ends the
    process at once. Must stand after the callbacks that write at the end of a step.
    """

    def __init__(
        self,
        losses: LossLog,
        resumed: Path | None,
        *,
        resume_steps: str | None,
        max_wall_time_s: float | None,
    ) -> None:
        self.run_dir = losses.run_dir
        self.losses = losses
        self.resumed = resumed
        self.resume_steps = resume_steps
        self.deadline = None if max_wall_time_s is None else time.monotonic() + max_wall_time_s
        self.steps: list[int] = []
        self.is_main = True
        self.signal = 0
        """Number of the signal that this process received; 0 for none."""
        self.stopped: str | None = None
        """Why the run stopped before its last step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Restore the counts of the state, and handle signals from now on."""
        if self.resume_steps is not None:
            self.steps = resolve_steps(
                self.resume_steps,
                flag="--resume_steps",
                args=args,
                state=state,
                dataloader=kwargs["train_dataloader"],
            )
        if self.resumed is not None:
            ours = read_object(self.resumed / _MARKER, _COUNTS)
            self.losses.restore(ours, state.global_step)
        self.is_main = state.is_world_process_zero
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one ends at once
        if self.is_main:
            text = (
                f"\n{_SIGNALS[signal.Signals(number)]}: stopping after this step, with a state to "
                "resume from. Ctrl-C ends at once.\n"
            )
            os.write(2, text.encode())  # a handler may not use the buffers of `print` or `logging`

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Request a state at its steps and before an early stop; the last step needs none."""
        if state.global_step >= state.max_steps:
            return control
        if state.global_step in self.steps:
            control.should_save = True
        self.stopped = self._reason(args)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def _reason(self, args: TrainingArguments) -> str | None:
        """Return why the run has to stop now: the same on every rank."""
        is_late = (
            self.deadline is not None
            and args.process_index == 0
            and time.monotonic() > self.deadline
        )
        found = torch.tensor([self.signal, is_late], dtype=torch.int32, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        number, late = found.tolist()
        if number:
            return _SIGNALS[signal.Signals(number)]
        return "--max_wall_time_s" if late else None

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Mark the state as complete, once all ranks have written and all of it is on disk."""
        _wait_for_all(args)
        if state.is_world_process_zero:
            folder = self.run_dir / f"checkpoint-{state.global_step}"
            for path in [*folder.rglob("*"), folder, *(self.run_dir / name for name in LOG_NAMES)]:
                fsync_path(path)
            write_json(folder / _MARKER, {"step": state.global_step, **self.losses.state()})
            log.info("state of step %d saved", state.global_step)
        _wait_for_all(args)  # a launcher kills all ranks soon after the first one ends with 75

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _wait_for_all(args: TrainingArguments) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()
