"""The trainer: the loss of each example, the logs of it, and a stop where it is not finite."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import gather_object
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from sft_probe.errors import UserError, first_few
from sft_probe.files import to_json, write_jsonl
from sft_probe.scoring.head import HeadRows
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.trials import (
    check_language_model,
    is_close,
    is_coarse,
    made_up_items,
    plain_logprobs,
)
from sft_probe.train.examples import IGNORED_LABEL, Example, PadRight, TrainingExamples
from sft_probe.train.model import inner_model

log = logging.getLogger(__name__)

_TRIED_TOKENS = 48
_NOISE_PASSES = 4
"""A layer that is dropped now and then is kept in two passes by chance."""


class SftTrainer(Trainer):
    """Trains on the mean loss over labelled tokens, of all micro-batches and ranks of a step
    together.

    The head of the model runs on the positions that predict a label, not on those of prompts and
    padding, which are most of them (`scoring.head`); soft-capping and scaling are the model's. That
    the losses are right is tried when training begins. Takes `sft_probe.train.examples.PadRight` as
    collator.

    Raises:
        UserError: when training begins: the model is no causal LM, or its losses are not those of
            its plain forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._mean_loss, **kwargs)
        self._head_rows = HeadRows(inner_model(self.model))
        self._example_index: list[int] = []
        self._shown: list[tuple[list[int], torch.Tensor]] = []
        self.noise_nats: float | None = None
        """How far training passes over the same tokens are apart; 0.0 or rounding, unless some
        dropout stayed on."""
        self.add_callback(_TryFirst(self))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Train on one micro-batch; what it held is kept for `take_shown`."""
        self._example_index = inputs.pop("example_index")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the Trainer's loss; while the model runs, only labelled positions reach its
        head."""
        with self.select_head(inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def select_head(self, labels: torch.Tensor) -> AbstractContextManager[None]:
        """Let the head of the model run on the positions that predict a label, within a block."""
        return self._head_rows.select(_predicting_rows(labels), labels.shape)

    def _token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the losses [R], in nats, of the labelled tokens of `labels` [B, L], row by row."""
        logits = self._head_rows.of(outputs.logits, _predicting_rows(labels))
        targets = labels[:, 1:]
        return functional.cross_entropy(
            logits.float(), targets[targets != IGNORED_LABEL], reduction="none"
        )

    def _mean_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any
    ) -> torch.Tensor:
        rows, _ = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
        losses = self._token_losses(outputs, labels)
        sums = torch.zeros(len(labels), device=losses.device).index_add_(0, rows, losses.detach())
        self._shown.append((self._example_index, sums))
        loss: torch.Tensor = losses.sum() / num_items_in_batch
        return loss

    def try_model(self) -> None:
        """Compare the losses of a made-up batch with the model's plain forward, and two training
        passes over it.

        Raises:
            UserError: as the class says.
        """
        model = inner_model(self.model)
        dtype = torch.bfloat16 if self.args.bf16 or self.args.fp16 else model.dtype
        with _mode(model, training=False):
            check_language_model(model, dtype)
            items = made_up_items(model, _TRIED_TOKENS)
            expected = -np.concatenate([plain_logprobs(model, item) for item in items])
            found = self._losses_of(items)
        is_right, difference = is_close(found, expected, dtype)
        if not is_right and np.isfinite(expected).all():  # NaN is for the first step to find
            raise UserError(
                f"{type(model).__name__} cannot be trained here: the losses of labelled tokens are "
                f"off by {difference:.2g} nats from those of the model's own plain forward pass."
            )
        self.noise_nats = self._noise(items)
        if self.noise_nats > (0.05 if is_coarse(dtype) else 1e-4):
            log.warning(
                "%s: two training passes over the same tokens differ by up to %.2g nats, although "
                "every dropout that "
                "is known was set to 0; runs that differ in their data alone will differ by this "
                "noise too",
                type(model).__name__,
                self.noise_nats,
            )

    def _noise(self, items: list[Continuation]) -> float:
        """Return the largest difference, in nats, among a few training passes; the random state
        stays as it was."""
        model = inner_model(self.model)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _mode(model, training=True):
            passes = np.stack([self._losses_of(items) for _ in range(_NOISE_PASSES)])
        return float(np.nan_to_num(np.ptp(passes, axis=0).max()))

    def _losses_of(self, items: list[Continuation]) -> npt.NDArray[np.float32]:
        """Return the losses of the continuations, as in training: one padded batch."""
        model = inner_model(self.model)
        batch = PadRight(0)([[(0, _example(item))] for item in items])
        labels = batch["labels"].to(model.device)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.select_head(labels):
            losses: npt.NDArray[np.float32] = (
                self._token_losses(model(**inputs), labels).cpu().numpy()
            )
        return losses

    def take_shown(self) -> list[tuple[int, float]]:
        """Return index and summed loss (nats, before the update) of each example shown to this rank
        since the last call."""
        if not self._shown:
            return []
        indices = [index for part, _ in self._shown for index in part]
        sums = torch.cat([part for _, part in self._shown]).tolist()
        self._shown = []
        return list(zip(indices, sums, strict=True))

    def step_columns(
        self, shown: Sequence[tuple[int, float]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Return what `losses.jsonl` says of a step that showed these examples (index, summed
        loss): the mean loss over labelled tokens, in nats."""
        num_tokens = sum(examples[index].num_tokens for index, _ in shown)
        return {"loss": sum(loss for _, loss in shown) / num_tokens}

    def example_columns(self, _index: int, _loss: float) -> dict[str, float]:
        """Return what `first_epoch.jsonl` says of an example beside its loss."""
        return {}


class _TryFirst(TrainerCallback):
    """Tries the model before any other callback acts; under ZeRO-3 it cannot run earlier."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise `UserError` where the model cannot be trained."""
        self.trainer.try_model()


def _predicting_rows(labels: torch.Tensor) -> torch.Tensor:
    """Return where, in the flattened batch, the next token has a label: int64 [R]."""
    targets = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    return torch.nonzero(targets.flatten() != IGNORED_LABEL)[:, 0]


def _example(item: Continuation) -> Example:
    ids = [*item.prefix_ids, *item.continuation_ids]
    labels = [*[IGNORED_LABEL] * len(item.prefix_ids), *item.continuation_ids]
    return Example(input_ids=ids, labels=labels, doc_id="", category="", num_bytes=0)


@contextmanager
def _mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module into training or evaluation mode for the length of a block, and restore each
    afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        self.per_item = examples.per_item
        self.columns = columns
        self.times_shown: Counter[int] = Counter()
        self.tokens_seen = 0
        self.loss: float | None = None
        self.lr: float | None = None
        self.lr_since_snapshot = 0.0

    @property
    def examples_seen(self) -> int:
        """Over all ranks and epochs; a pair is one."""
        return self.times_shown.total() // self.per_item

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Note the learning rate that is about to be used."""
        self.lr = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Add up the step."""
        if (
            self.lr is not None and not self.trainer.accelerator.optimizer_step_was_skipped
        ):  # as fp16 does on overflow
            self.lr_since_snapshot += self.lr
        shown = self.trainer.take_shown()
        if args.world_size > 1:
            shown = gather_object(shown)
        num_tokens = sum(self.examples[index].num_tokens for index, _ in shown)
        order = self.times_shown.total()
        self.times_shown.update(index for index, _ in shown)
        self.tokens_seen += num_tokens
        found = self.trainer.step_columns(shown, self.examples)
        self.loss = found["loss"]
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "epoch": state.epoch, **found, "lr": self.lr}
        _append(self.run_dir / LOG_NAMES[0], [{**self.columns, **row, **self.totals()}])
        if state.epoch <= 1:
            rows = [self._row(state.global_step, order + i, *item) for i, item in enumerate(shown)]
            _append(self.run_dir / LOG_NAMES[1], rows)

    def totals(self) -> dict[str, int]:
        """Return examples and labelled tokens since the start of the run."""
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
            **self.trainer.example_columns(index, loss),
        }

    def state(self) -> dict[str, Any]:
        """Return what a resume state keeps."""
        return {
            "times_shown": dict(self.times_shown),
            "tokens_seen": self.tokens_seen,
            "loss": self.loss,
            "lr": self.lr,
            "lr_since_snapshot": self.lr_since_snapshot,
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Take up a resume state; later lines of the files are taken out."""
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
        """Write how often each example was shown, in file order."""
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
    """Append lines for whoever watches; they are durable once a resume state is (`run_dir.py` syncs
    them)."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(to_json(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to `step`; the last line of a killed run may be a part of one."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    write_jsonl(path, [row for row in rows if row["step"] <= step])


_MAX_NAMED = 10


class NonFiniteLossError(Exception):
    """The loss of the step that was about to be made is not finite; every rank raises this at the
    same place."""


class FiniteTrainer(SftTrainer):
    """Trains as `SftTrainer` does, and raises `NonFiniteLossError` instead of an update from a loss
    that is not finite.

    DeepSpeed makes the update inside the backward pass, so the losses of a step are looked at
    before the last one.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a micro-batch; at the last one of a step, check those of all of
        them."""
        loss = super().compute_loss(*args, **kwargs)
        if self.accelerator.sync_gradients:
            sums = torch.cat([sums for _, sums in self._shown])
            if on_any_rank(not bool(sums.isfinite().all()), self.args.device):
                raise NonFiniteLossError
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; what is not finite (the norm of fp16 gradients) becomes null in
        its file."""
        super().log(logs, start_time)
        entry = self.state.log_history[-1]
        self.state.log_history[-1] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true on some rank: the same answer on all of them."""
    flags = torch.tensor([flag], dtype=torch.int32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flags)
    return bool(flags.item())


def weights_are_finite(model: Any, device: torch.device) -> bool:
    """Return whether no weight is NaN or infinite, the same on every rank."""
    # under ZeRO-3 a rank's share of a parameter is in its `ds_tensor`, and the parameter itself is
    # empty
    shares = (
        getattr(parameter, "ds_tensor", parameter).detach() for parameter in model.parameters()
    )
    return not on_any_rank(not all(bool(share.isfinite().all()) for share in shares), device)


def save_last_good_step(trainer: SftTrainer, losses: LossLog, latest: Path | None) -> UserError:
    """Save a state of the step before a loss that is not finite; return the message about it.

    A collective: every rank calls it. The state is that of a run which stopped after that step,
    since nothing of the spoiled step has reached weights, optimizer or counts.
    """
    step = trainer.state.global_step
    shown = trainer.take_shown()
    if trainer.args.world_size > 1:
        shown = gather_object(shown)
    spoiled = [losses.examples[index] for index, loss in shown if not math.isfinite(loss)]
    names = first_few((f"{item.doc_id} ({item.category})" for item in spoiled), _MAX_NAMED)
    if step and (latest is None or latest.name != f"checkpoint-{step}"):
        trainer._save_checkpoint(
            trainer.model, trial=None
        )  # private, but the one way to a state in mid-step
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    cause = (
        "All weights are finite: look at these examples, or lower --learning_rate."
        if weights_are_finite(trainer.model, trainer.args.device)
        else "Some weights are not finite either: the model came with them, or an earlier update "
        "diverged; lower "
        "--learning_rate."
    )
    return UserError(
        f"step {step + 1}: the loss is NaN or infinite, so the update was not made. {len(spoiled)} "
        f"of {len(shown)} examples of the step have such a loss: {names}. {cause} "
        + (f"The state of step {step} is in checkpoint-{step}." if step else "No step was made.")
    )
