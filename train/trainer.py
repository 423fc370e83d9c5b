"""A `transformers.Trainer` that knows the loss of each example, and computes logits only where there is a label."""

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import Trainer

from sft_probe.train.data import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_lm(model: Any) -> "PreTrainedModel":
    """The model itself, with a LoRA's layers in it where there is one."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


class SftTrainer(Trainer):
    """Trains on the mean loss over labelled tokens, of all micro-batches and ranks of a step together.

    The head of the model runs on the positions that predict a label, not on those of prompts and padding, which are
    most of them; the model's own `forward` calls it, so soft-capping and scaling are the model's. Takes
    `sft_probe.train.data.PadRight` as collator.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._mean_loss, **kwargs)
        self._labelled: torch.Tensor | None = None
        self._example_index: list[int] = []
        self._shown: list[tuple[list[int], torch.Tensor]] = []
        causal_lm(self.model).base_model.register_forward_hook(self._keep_labelled)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; what it held is kept for `take_shown`."""
        self._example_index = inputs.pop("example_index")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; while the model runs, only labelled positions reach its head."""
        targets = functional.pad(inputs["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
        self._labelled = targets != IGNORED_LABEL
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._labelled = None

    def _keep_labelled(self, _module: Any, _inputs: Any, output: Any) -> Any:
        if self._labelled is not None:
            output.last_hidden_state = output.last_hidden_state[self._labelled][None]
        return output

    def _mean_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """`outputs.logits` [1, R, V] for the R labelled positions of `labels` [batch, length]."""
        targets = labels[:, 1:]
        rows, _ = torch.nonzero(targets != IGNORED_LABEL, as_tuple=True)
        losses = functional.cross_entropy(
            outputs.logits[0].float(), targets[targets != IGNORED_LABEL], reduction="none"
        )
        sums = torch.zeros(len(labels), device=losses.device).index_add_(0, rows, losses.detach())
        self._shown.append((self._example_index, sums))
        loss: torch.Tensor = losses.sum() / num_items_in_batch
        return loss

    def take_shown(self) -> list[tuple[int, float]]:
        """Index and summed loss (nats, before the update) of each example shown to this rank since the last call."""
        if not self._shown:
            return []
        indices = [index for part, _ in self._shown for index in part]
        sums = torch.cat([part for _, part in self._shown]).tolist()
        self._shown = []
        return list(zip(indices, sums, strict=True))
