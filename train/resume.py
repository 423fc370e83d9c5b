"""Resume states: few, whole, and enough to go on as if nothing had happened; and a clean stop that
leaves one.

A state is `checkpoint-N/` as the Trainer and DeepSpeed write it. `sft_probe_state.json` is written
into it last, once everything else is on disk, and holds our own counts; a directory without it is a
half-written one.
"""

import logging
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_probe.files import fsync_path, read_object, write_json
from sft_probe.train.losses import LOG_NAMES, LossLog
from sft_probe.train.schedule import resolve_steps

log = logging.getLogger(__name__)

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
