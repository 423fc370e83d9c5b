"""A loss that is NaN or infinite ends the run before the update that it would spoil, on all ranks
together."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from sft_probe.errors import UserError
from sft_probe.train.losses import LossLog
from sft_probe.train.trainer import SftTrainer

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
    """Save a state of the step before a loss that is not finite, and return what the user is to be
    told.

    A collective: every rank calls it. The state is that of a run which stopped after that step,
    since nothing of the spoiled step has reached weights, optimizer or counts.
    """
    step = trainer.state.global_step
    shown = trainer.take_shown()
    if trainer.args.world_size > 1:
        shown = gather_object(shown)
    spoiled = [losses.examples[index] for index, loss in shown if not math.isfinite(loss)]
    names = [f"{example.doc_id} ({example.category})" for example in spoiled[:_MAX_NAMED]]
    if len(spoiled) > _MAX_NAMED:
        names.append(f"and {len(spoiled) - _MAX_NAMED} more")
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
        f"of {len(shown)} examples of the step have such a loss: {', '.join(names)}. {cause} "
        + (f"The state of step {step} is in checkpoint-{step}." if step else "No step was made.")
    )
