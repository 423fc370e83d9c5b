"""The run directory: one run, one process at a time, and states to resume from.

A state is `checkpoint-N/` as the Trainer and DeepSpeed write it. `sft_probe_state.json` is written
into it last, once everything else is on disk, and holds our own counts: a directory without it is
half-written.
"""

import hashlib
import importlib.metadata
import logging
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

_MAY_DIFFER = ("max_wall_time_s", "dry_run", "local_rank")
"""Flags that another attempt at the same run may give differently; the last is what `deepspeed`
tells each rank."""


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a run directory; the system lets go of it also after `kill -9`.

    Raises:
        UserError: another process has it.
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
    """What makes two attempts the same run: flags as asked, number of processes, content of what
    they name."""
    return {
        "flags": {name: value for name, value in flags.items() if name not in _MAY_DIFFER},
        "world_size": world_size,
        **contents,
    }


def sha256_text(path: str | None) -> str | None:
    """Of a small file; `None` for none."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_complete(run_dir: Path, request: dict[str, Any]) -> bool:
    """True for a finished run of the same request.

    Raises:
        UserError: the directory holds a run of another request (the difference is named), or
        weights of nobody's.
    """
    for name in ("manifest.json", "started.json"):
        if not (run_dir / name).exists():
            continue
        is_manifest = name == "manifest.json"
        earlier = read_object(run_dir / name, {"request": dict} if is_manifest else {})
        earlier = earlier["request"] if is_manifest else earlier
        if earlier != request:
            raise UserError(
                f"{run_dir} holds another run ({_difference(earlier, request)}). Choose another "
                "--output_dir."
            )
        if name == "manifest.json":
            return True
    if (run_dir / "started.json").exists():
        return False
    if (run_dir / "weights").exists() or list(run_dir.glob("checkpoint-*")):
        raise UserError(f"{run_dir} holds weights of another origin. Choose another --output_dir.")
    return False


def recorded_format(run_dir: Path) -> str | None:
    """The prompt format of an earlier attempt in this directory, finished or not; `None` where
    there was none."""
    for name in ("manifest.json", "started.json"):
        if (run_dir / name).exists():
            earlier = read_object(run_dir / name)
            found: str | None = (
                earlier.get("request", {}) if name == "manifest.json" else earlier
            ).get("prompt_format")
            return found
    return None


def begin_run(run_dir: Path, request: dict[str, Any]) -> str | None:
    """Notes the request once all of it is known to be sound, and clears what a cut-off attempt will
    write again.

    Returns how an earlier attempt is taken up, `None` where there was none.
    """
    if not (run_dir / "started.json").exists():
        write_json(run_dir / "started.json", request)
        return None
    state = latest_state(run_dir)
    remove_after(run_dir, state)
    return f"an earlier attempt in {run_dir} was cut off; training " + (
        "starts again" if state is None else f"goes on from {state.name}"
    )


def abandon_run(run_dir: Path) -> None:
    """Forget a request for which nothing was made, so that the directory is free for other
    flags."""
    if latest_state(run_dir) is None and not (run_dir / "weights").exists():
        (run_dir / "started.json").unlink(missing_ok=True)


def finish_run(run_dir: Path) -> None:
    """Takes out of a complete run what only an attempt that goes on would need."""
    (run_dir / "started.json").unlink(missing_ok=True)
    remove_states(run_dir)


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
    """Of the packages that decide what a run computes; `None` for what is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("sft-probe", "torch", "transformers", "accelerate", "deepspeed", "peft", "lm_eval")
    return {name: version(name) for name in names}


def git_revision() -> str | None:
    """Of the directory that the command was given in."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again. Of a run that stopped early with a state."""
_MARKER = "sft_probe_state.json"
_COUNTS = {"times_shown": dict, "tokens_seen": int, "lr_since_snapshot": float}


def latest_state(run_dir: Path) -> Path | None:
    """The whole state with the highest step."""
    states = [path.parent for path in run_dir.glob(f"checkpoint-*/{_MARKER}")]
    return max(states, key=_step_of, default=None)


def remove_after(run_dir: Path, state: Path | None) -> None:
    """Removes all other states, of which some may be half-written or half-removed, and what will be
    written again."""
    for path in run_dir.glob("checkpoint-*"):
        if path != state:
            shutil.rmtree(path)
    if state is None:
        shutil.rmtree(run_dir / "weights", ignore_errors=True)
        for name in LOG_NAMES:
            (run_dir / name).unlink(missing_ok=True)
        return
    for path in (run_dir / "weights").glob("*step_*"):
        if path.name.startswith(".") or _step_of(path) > _step_of(state):
            shutil.rmtree(path)


def remove_states(run_dir: Path) -> None:
    """Of a complete run."""
    for path in run_dir.glob("checkpoint-*"):
        shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.replace("_", "-").rpartition("-")[2])


class ResumeCallback(TrainerCallback):
    """Saves states at the given steps, takes one up, and stops early where asked to.

    SIGTERM to any rank, or `max_wall_time_s` since this object was made (by the clock of the first
    rank), stops all ranks after the same step, with a state. Must stand after the callbacks that
    write at the end of a step.
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
        self.was_told = False
        self.stopped: str | None = None
        """Why the run stopped before its last step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Takes the counts of the state up."""
        self.steps: list[int] = []
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
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.was_told = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Asks for a state at its steps and before an early stop; the last step needs none."""
        if state.global_step >= state.max_steps:
            return control
        if state.global_step in self.steps:
            control.should_save = True
        self.stopped = self._reason(args)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def _reason(self, args: TrainingArguments) -> str | None:
        """The same on every rank: each one's view is added up."""
        is_late = (
            self.deadline is not None
            and args.process_index == 0
            and time.monotonic() > self.deadline
        )
        flags = torch.tensor([self.was_told, is_late], dtype=torch.int32, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(flags)
        told, late = flags.tolist()
        return "SIGTERM" if told else "--max_wall_time_s" if late else None

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Marks the state as whole, once all ranks have written their parts and all of it is on
        disk."""
        _wait_for_all(args)
        if state.is_world_process_zero:
            folder = self.run_dir / f"checkpoint-{state.global_step}"
            for path in [*folder.rglob("*"), folder, *(self.run_dir / name for name in LOG_NAMES)]:
                fsync_path(path)
            write_json(folder / _MARKER, {"step": state.global_step, **self.losses.state()})
            log.info("state of step %d saved", state.global_step)
        _wait_for_all(
            args
        )  # a launcher ends all ranks soon after the first one that ends, of an early stop with 75

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """SIGTERM is what it was."""
        signal.signal(signal.SIGTERM, self._before)


def _wait_for_all(args: TrainingArguments) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()
