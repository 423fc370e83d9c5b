"""What the model was shown and what it lost on it: `losses.jsonl`, `first_epoch.jsonl`,
`exposure.jsonl`."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments

from sft_probe.errors import UserError
from sft_probe.files import to_json, write_jsonl
from sft_probe.train.data import TrainingExamples
from sft_probe.train.trainer import SftTrainer

LOG_NAMES = ("losses.jsonl", "first_epoch.jsonl")


class LossLog(TrainerCallback):
    """Counts, on every rank, what all ranks were shown; the first rank writes the files above.

    `losses.jsonl` has a line per step: loss (nats per labelled token, before the update), learning
    rate, totals. `first_epoch.jsonl` has a line per example of the first epoch: its loss before the
    update of `step`, summed over response and terminator (nats), with its place in the order of
    training from 0. Must stand before the callbacks that read its counts.
    """

    def __init__(
        self,
        run_dir: Path,
        trainer: SftTrainer,
        examples: TrainingExamples,
        columns: dict[str, Any],
    ) -> None:
        self.run_dir = run_dir
        self.trainer = trainer
        self.examples = examples.examples
        self.columns = columns
        self.times_shown: Counter[int] = Counter()
        self.tokens_seen = 0
        self.loss: float | None = None
        self.lr: float | None = None
        self.lr_since_snapshot = 0.0

    @property
    def examples_seen(self) -> int:
        """Over all ranks and epochs."""
        return self.times_shown.total()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Notes the learning rate that is about to be used."""
        self.lr = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Adds up the step."""
        if (
            self.lr is not None and not self.trainer.accelerator.optimizer_step_was_skipped
        ):  # as fp16 does on overflow
            self.lr_since_snapshot += self.lr
        shown = self.trainer.take_shown()
        if args.world_size > 1:
            shown = gather_object(shown)
        num_tokens = sum(self.examples[index].num_tokens for index, _ in shown)
        order = self.examples_seen
        self.times_shown.update(index for index, _ in shown)
        self.tokens_seen += num_tokens
        self.loss = sum(loss for _, loss in shown) / num_tokens
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "epoch": state.epoch, "loss": self.loss, "lr": self.lr}
        _append(self.run_dir / LOG_NAMES[0], [{**self.columns, **row, **self.totals()}])
        if state.epoch <= 1:
            rows = [self._row(state.global_step, order + i, *item) for i, item in enumerate(shown)]
            _append(self.run_dir / LOG_NAMES[1], rows)

    def totals(self) -> dict[str, int]:
        """Examples and labelled tokens since the start of the run."""
        return {"examples_seen": self.examples_seen, "tokens_seen": self.tokens_seen}

    def _row(self, step: int, order: int, index: int, loss: float) -> dict[str, Any]:
        example = self.examples[index]
        return {
            **self.columns,
            "step": step,
            "order": order,
            "split": "train",
            "category": example.category,
            "doc_id": example.doc_id,
            "loss_sum": loss,
            "num_tokens": example.num_tokens,
            "num_bytes": example.num_bytes,
        }

    def state(self) -> dict[str, Any]:
        """For a resume state."""
        return {
            "times_shown": dict(self.times_shown),
            "tokens_seen": self.tokens_seen,
            "loss": self.loss,
            "lr": self.lr,
            "lr_since_snapshot": self.lr_since_snapshot,
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Takes up a resume state; later lines of the files are taken out."""
        self.times_shown = Counter(
            {int(index): times for index, times in state["times_shown"].items()}
        )
        self.tokens_seen = state["tokens_seen"]
        self.loss, self.lr, self.lr_since_snapshot = (
            state[name] for name in ("loss", "lr", "lr_since_snapshot")
        )
        if self.trainer.is_world_process_zero():
            for name in LOG_NAMES:
                _cut(self.run_dir / name, step)

    def write_exposure(self) -> None:
        """How often each example was shown, in file order."""
        rows = [
            {
                **self.columns,
                "doc_id": example.doc_id,
                "category": example.category,
                "times_shown": times,
            }
            for example, times in (
                (example, self.times_shown[index]) for index, example in enumerate(self.examples)
            )
        ]
        write_jsonl(self.run_dir / "exposure.jsonl", rows)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Lines for whoever watches; they are durable once a resume state is (`resume.py` syncs
    them)."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(to_json(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _cut(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; the last line of a killed run may be a part of one."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    write_jsonl(path, [row for row in rows if row["step"] <= step])
