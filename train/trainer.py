"""A `transformers.Trainer` that knows the loss of each example, and computes logits only where
there is a label."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from sft_probe.errors import UserError
from sft_probe.scoring.head import HeadRows
from sft_probe.scoring.packing import Item
from sft_probe.scoring.trials import (
    check_language_model,
    is_close,
    is_coarse,
    made_up_items,
    plain_logprobs,
)
from sft_probe.train.data import IGNORED_LABEL, Example, PadRight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_TRIED_TOKENS = 48
_NOISE_PASSES = 4
"""A layer that is dropped now and then is kept in two passes by chance."""


def causal_lm(model: Any) -> "PreTrainedModel":
    """The model itself, with a LoRA's layers in it where there is one."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


class SftTrainer(Trainer):
    """Trains on the mean loss over labelled tokens, of all micro-batches and ranks of a step
    together.

    The head of the model runs on the positions that predict a label, not on those of prompts and
    padding, which are most of them (`scoring.head`); soft-capping and scaling are the model's. That
    the losses are right is tried when training begins. Takes `sft_probe.train.data.PadRight` as
    collator.

    Raises:
        UserError: when training begins: the model is no causal LM, or its losses are not those of
        its plain forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._mean_loss, **kwargs)
        self._head_rows = HeadRows(causal_lm(self.model))
        self._example_index: list[int] = []
        self._shown: list[tuple[list[int], torch.Tensor]] = []
        self.noise_nats: float | None = None
        """How far training passes over the same tokens are apart; 0.0 or rounding, unless some
        dropout stayed on."""
        self.add_callback(_TryFirst(self))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-batch; what it held is kept for `take_shown`."""
        self._example_index = inputs.pop("example_index")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; while the model runs, only labelled positions reach its head."""
        with self._head_rows.select(_predicting_rows(inputs["labels"]), inputs["labels"].shape):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _token_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Losses [R], in nats, of the labelled tokens of `labels` [B, L], row by row."""
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
        model = causal_lm(self.model)
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

    def _noise(self, items: list[Item]) -> float:
        """The largest difference, in nats, among a few training passes; the random state stays as
        it was."""
        model = causal_lm(self.model)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _mode(model, training=True):
            passes = np.stack([self._losses_of(items) for _ in range(_NOISE_PASSES)])
        return float(np.nan_to_num(np.ptp(passes, axis=0).max()))

    def _losses_of(self, items: list[Item]) -> npt.NDArray[np.float32]:
        """Losses of the continuations, as in training: one padded batch."""
        model = causal_lm(self.model)
        batch = PadRight(0)([(0, _example(item)) for item in items])
        labels = batch["labels"].to(model.device)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self._head_rows.select(_predicting_rows(labels), labels.shape):
            losses: npt.NDArray[np.float32] = (
                self._token_losses(model(**inputs), labels).cpu().numpy()
            )
        return losses

    def take_shown(self) -> list[tuple[int, float]]:
        """Index and summed loss (nats, before the update) of each example shown to this rank since
        the last call."""
        if not self._shown:
            return []
        indices = [index for part, _ in self._shown for index in part]
        sums = torch.cat([part for _, part in self._shown]).tolist()
        self._shown = []
        return list(zip(indices, sums, strict=True))


class _TryFirst(TrainerCallback):
    """Tries the model before any other callback acts; under ZeRO-3 it cannot run earlier."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise `UserError` where the model cannot be trained."""
        self.trainer.try_model()


def _predicting_rows(labels: torch.Tensor) -> torch.Tensor:
    """Where, in the flattened batch, the next token has a label: int64 [R]."""
    targets = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    return torch.nonzero(targets.flatten() != IGNORED_LABEL)[:, 0]


def _example(item: Item) -> Example:
    ids = [*item.prefix_ids, *item.continuation_ids]
    labels = [*[IGNORED_LABEL] * len(item.prefix_ids), *item.continuation_ids]
    return Example(input_ids=ids, labels=labels, doc_id="", category="", num_bytes=0)


@contextmanager
def _mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in training or evaluation mode for the length of a block, and each as it was
    afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
