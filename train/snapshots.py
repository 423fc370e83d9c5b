"""Weights-only snapshots in Hugging Face layout, each complete or absent, with a `meta.json`."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_probe.errors import UserError
from sft_probe.files import fsync_path, new_dir, read_object, sha256_file, write_json
from sft_probe.train.model import has_masters, most_common_dtype, name_of
from sft_probe.train.schedule import resolve_steps
from sft_probe.train.trainer import LossLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def gather_weights(model: Any, *, masters: bool, keep: bool) -> dict[str, torch.Tensor]:
    """Name to tensor, tied ones once; of a LoRA, what is trained. A collective under DeepSpeed:
    call it on every rank.

    Args:
        model: the unwrapped model.
        masters: the float32 masters instead of the 16-bit weights.
        keep: False on ranks that only take part; they get an empty dict.
    """
    only_trained = isinstance(model, PeftModel)
    weights = {}
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        tensor = _master(parameter) if masters else _whole(parameter)
        if keep:
            weights[name] = tensor.to("cpu")
    if keep:
        names = dict(model.named_buffers()).keys()
        weights |= {
            name: value.to("cpu") for name, value in model.state_dict().items() if name in names
        }
    return weights


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if not is_deepspeed_zero3_enabled():
        return parameter.detach()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    master: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    return _whole(parameter).float() if master is None else master  # a frozen weight has none


def parent_of(model: str) -> dict[str, Any] | None:
    """Return `run_dir`, `step` and `sha256` of the snapshot that a run continues from; `None` where
    the model is none."""
    path = Path(model, "meta.json")
    if path.parent.parent.name != "weights" or not path.is_file():
        return None
    meta = read_object(path, {"step": int, "sha256": dict})
    run_dir = path.resolve().parents[2]
    return {"run_dir": str(run_dir), "step": meta["step"], "sha256": meta["sha256"]}


class SnapshotCallback(TrainerCallback):
    """Saves the weights at the given steps, 0 and the last one among them.

    Args:
        weights_dir: gets a directory per step.
        snapshot_steps: in the grammar of `schedule.py`.
        snapshot_dtype: `training` (as the model computes), `float32` (its masters), or `None`:
            masters where there are.
        tokenizer: saved with the weights.
        losses: whose counts go into `meta.json`.

    Raises:
        UserError: the weights of two steps are equal although there was an update with a learning
            rate above 0.
    """

    def __init__(
        self,
        weights_dir: Path,
        snapshot_steps: str,
        snapshot_dtype: str | None,
        tokenizer: "PreTrainedTokenizerBase",
        losses: LossLog,
    ) -> None:
        self.weights_dir = weights_dir
        self.snapshot_steps = snapshot_steps
        self.snapshot_dtype = snapshot_dtype
        self.tokenizer = tokenizer
        self.losses = losses
        self.steps: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Save step 0: the weights as training got them. Only now are the numbers of steps
        known."""
        asked = resolve_steps(
            self.snapshot_steps,
            flag="--snapshot_steps",
            args=args,
            state=state,
            dataloader=kwargs["train_dataloader"],
        )
        self.steps = sorted({0, *asked, state.max_steps})
        self.masters = self.snapshot_dtype != "training" and has_masters(kwargs["model"])
        if state.global_step == 0:
            self._save(state, kwargs["model"])

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Save if this step is asked for."""
        if state.global_step in self.steps:
            self._save(state, kwargs["model"])

    def _save(self, state: TrainerState, model: Any) -> None:
        start = time.perf_counter()
        weights = gather_weights(
            model, masters=self.masters, keep=state.is_world_process_zero
        )  # on every rank
        if state.is_world_process_zero:
            target = self.weights_dir / f"step_{state.global_step:06d}"
            try:
                with new_dir(target) as folder:
                    self._write(folder, state, model, weights, start)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cannot write {target}: {error}. Fix that; the same command resumes."
                ) from error
        self.losses.lr_since_snapshot = 0.0

    def save_s(self) -> float:
        """Return the seconds spent on saving, in all attempts at the run."""
        metas = self.weights_dir.glob("step_*/meta.json")
        return float(sum(read_object(path, {"save_s": float})["save_s"] for path in metas))

    def _write(
        self, folder: Path, state: TrainerState, model: Any, weights: dict[str, Any], start: float
    ) -> None:
        dtype = name_of(most_common_dtype(weights.values()))
        model.save_pretrained(folder, state_dict=weights)
        if (
            self.masters and (folder / "config.json").exists()
        ):  # else they would load in the dtype of the model
            config = read_object(folder / "config.json")
            write_json(folder / "config.json", {**config, "dtype": "float32"})
        self.tokenizer.save_pretrained(folder)
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            fsync_path(path)  # here, so that `save_s` holds the time
        sha256 = {path.name: sha256_file(path) for path in files}
        meta = {
            "step": state.global_step,
            **self.losses.totals(),
            "loss": self.losses.loss,
            "epoch": state.epoch or 0.0,
            "lr": self.losses.lr,
            "dtype": dtype,
            "weights": "float32 masters" if self.masters else "as trained",
            "sha256": sha256,
            "duplicate_of": self._duplicate_of(state.global_step, sha256),
            "save_s": round(time.perf_counter() - start, 3),
        }
        write_json(folder / "meta.json", meta)

    def _duplicate_of(self, step: int, sha256: dict[str, str]) -> int | None:
        """Return the snapshot before, where it has the same weights for want of an update (rate 0,
        or fp16 overflow)."""
        earlier = [other for other in self.steps if other < step]
        if not earlier:
            return None
        meta = self.weights_dir / f"step_{earlier[-1]:06d}/meta.json"
        if read_object(meta, {"sha256": dict})["sha256"] != sha256:
            return None
        if self.losses.lr_since_snapshot:
            raise UserError(
                f"the weights of step {step} equal those of step {earlier[-1]} although the "
                "learning rate was not 0: "
                "no gradient arrives, or 16-bit weights lose so small an update (--dtype float32 "
                "keeps it)."
            )
        log.warning(
            "the weights of step %d equal those of step %d: no update at a rate above 0",
            step,
            earlier[-1],
        )
        return earlier[-1]
