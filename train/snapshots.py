"""Weights-only snapshots in Hugging Face layout, complete or absent; `meta.json` says where they come from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from sft_probe.files import new_dir, sha256_file, write_json
from sft_probe.train.schedule import resolve_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SftTrainer(Trainer):
    """A Trainer that counts, on each rank, what it has been shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples_seen = 0
        self.tokens_seen = 0
        self.step_loss = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch: rows and labelled tokens are counted, losses added up until the optimizer step."""
        self.examples_seen += inputs["input_ids"].shape[0]
        self.tokens_seen += int((inputs["labels"] != -100).sum())
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss += float(loss)
        return loss

    def totals(self) -> dict[str, float]:
        """Over all ranks: examples and labelled tokens since the start, loss of the last step (nats per token)."""
        counts = torch.tensor(
            [self.examples_seen, self.tokens_seen, self.step_loss], dtype=torch.float64, device=self.args.device
        )
        counts = self.accelerator.reduce(counts, reduction="sum")
        examples, tokens, loss = counts.tolist()
        return {"examples_seen": int(examples), "tokens_seen": int(tokens), "loss": loss / self.args.world_size}


class SnapshotCallback(TrainerCallback):
    """Saves the weights at the given steps. `trainer` must be set before training starts."""

    trainer: SftTrainer

    def __init__(self, weights_dir: Path, snapshot_steps: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.weights_dir = weights_dir
        self.snapshot_steps = snapshot_steps
        self.tokenizer = tokenizer
        self.steps: list[int] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Step 0: the weights as training got them. Only now are the numbers of steps known."""
        asked = resolve_steps(
            self.snapshot_steps, flag="--snapshot_steps", args=args, state=state, dataloader=kwargs["train_dataloader"]
        )
        self.steps = sorted({0, *asked, state.max_steps})
        self._save(state, kwargs["lr_scheduler"])

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Saves if this step is asked for, and starts the next step's loss."""
        if state.global_step in self.steps:
            self._save(state, kwargs["lr_scheduler"])
        self.trainer.step_loss = 0.0

    def _save(self, state: TrainerState, lr_scheduler: Any) -> None:
        totals: dict[str, float | None] = {**self.trainer.totals()}  # a collective: on every rank
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            totals["loss"] = None
        with new_dir(self.weights_dir / f"step_{state.global_step:06d}") as folder:
            model = self.trainer.model
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            weights = sorted(folder.glob("*.safetensors"))
            meta = {
                "step": state.global_step,
                **totals,
                "epoch": state.epoch or 0.0,
                "lr": lr_scheduler.get_last_lr()[0],
                "dtype": str(model.dtype).removeprefix("torch."),
                "sha256": {path.name: sha256_file(path) for path in weights},
            }
            write_json(folder / "meta.json", meta)
