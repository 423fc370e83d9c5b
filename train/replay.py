"""A finished run once more, in memory: the same data order and the same updates, seen from inside.

Nothing is written. Only what can be repeated exactly is: one process, float32, AdamW or SGD.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from sft_probe.errors import UserError
from sft_probe.files import read_json, read_object
from sft_probe.malloc import keep_freed_memory
from sft_probe.prompts import terminator_id
from sft_probe.train.arguments import SftArguments, as_user_error, parse_arguments
from sft_probe.train.checks import check_inputs
from sft_probe.train.examples import TrainingExamples
from sft_probe.train.options import expand
from sft_probe.train.sft import Inputs, contents_of, load_inputs, make_trainer
from sft_probe.train.trainer import FiniteTrainer

ADAM = ("adamw_torch", "adamw_torch_fused")
_NOT_EXACT = {
    "bf16": "it computes in bfloat16",
    "fp16": "it computes in float16",
    "neftune_noise_alpha": "it adds noise to the embeddings",
    "optim_args": "its optimizer has options of its own",
    "optim_target_modules": "its optimizer has options of its own",
    "torch_compile": "it is compiled",
    "use_liger_kernel": "it computes the loss in another kernel",
}
"""Options under which the gradient of an example is not that of the step, and why."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer step that was just made: weights moved by `rate * momentum / denominator`."""

    step: int
    lr: float
    rate: float
    """Learning rate, with the gradient's factor in the momentum and its bias correction."""
    clip: float
    """What clipping multiplied the gradient with."""
    denominator: Callable[[str], torch.Tensor | float]
    """Returns what divides the momentum of a parameter, by its name."""
    decay: Mapping[str, float]
    """Weight decay by parameter, which multiplies with `lr`."""


class Watcher(Protocol):
    """What looks on while a run is repeated."""

    with_examples: bool
    """Whether `example` is called, which takes a pass forward and back of its own each time."""

    def example(self, index: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take the gradient of an example's part of the loss of a step, before the update."""

    def update(self, update: Update, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the weights after an update."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is needed to repeat a run."""

    arguments: SftArguments
    inputs: Inputs
    momentum: float
    """Factor by which the gradients of a step count less at the next one."""

    @property
    def examples(self) -> TrainingExamples:
        """What was trained on."""
        return self.inputs[-1]


def plan_replay(run: Path) -> Plan:
    """Read what a finished run was made from, and check that it is still the same.

    Raises:
        UserError: the run is not finished, was trained in a way that cannot be repeated exactly, or
            model, data or settings have changed.
    """
    manifest = run / "manifest.json"
    if not manifest.exists() or not (run / "config.yaml").exists():
        raise UserError(
            f"{run} cannot be repeated: it needs manifest.json and config.yaml, which "
            "`sft-probe train` writes."
        )
    request = read_object(manifest, {"request": dict})["request"]
    if request.get("world_size") != 1:
        raise UserError(
            f"{run} was trained on {request.get('world_size')} ranks; one is repeated exactly."
        )
    flags = ["--config", str(run / "config.yaml"), "--output_dir", str(run), "--report_to", "none"]
    flags += ["--logging_steps", "1", "--logging_strategy", "steps", "--disable_tqdm", "true"]
    probe_set = check_inputs(expand(flags))
    arguments, _ = parse_arguments(flags)
    _check_exact(run, arguments)
    inputs = load_inputs(arguments, probe_set)
    now = contents_of(arguments, probe_set, inputs)
    if changed := [name for name, value in now.items() if request.get(name) != value]:
        names = ", ".join(name.removesuffix("_sha256").replace("_", " ") for name in changed)
        raise UserError(f"{run} cannot be repeated: {names} changed since it was trained.")
    momentum = arguments.adam_beta1 if arguments.optim in ADAM else 0.0
    return Plan(arguments=arguments, inputs=inputs, momentum=momentum)


def _check_exact(run: Path, arguments: SftArguments) -> None:
    reasons = [reason for name, reason in _NOT_EXACT.items() if getattr(arguments, name)]
    if arguments.objective != "sft":
        reasons.append(f"its objective is {arguments.objective}, not sft")
    if arguments.dtype != "float32":
        reasons.append(f"its weights are {arguments.dtype}")
    if arguments.optim not in (*ADAM, "sgd"):
        reasons.append(
            f"its optimizer is {OptimizerNames(arguments.optim).value}, not AdamW or SGD of torch"
        )
    if arguments.deepspeed is not None:
        config = read_json(Path(str(arguments.deepspeed)))
        if config.get("zero_optimization", {}).get("stage", 0) == 3:
            reasons.append("ZeRO-3 divides each weight")
        if "optimizer" in config:
            reasons.append("its optimizer is DeepSpeed's")
    if reasons:
        raise UserError(f"{run} cannot be repeated exactly: {'; '.join(reasons)}.")


def replay(plan: Plan, watcher: Watcher) -> None:
    """Train as the run did, from its first step to its last.

    Memory: model, gradient and optimizer state; with examples one more gradient.
    """
    with as_user_error():
        set_seed(plan.arguments.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    tokenizer, prompt_format, examples = plan.inputs
    end_id = terminator_id(prompt_format.name, tokenizer)
    # private: accelerate takes a DeepSpeed setting once per process, and two passes are made
    AcceleratorState._reset_state()
    trainer, _ = make_trainer(plan.arguments, examples, end_id, _ReplayTrainer)
    trainer.remove_callback(PrinterCallback)
    trainer.watcher = watcher
    trainer.add_callback(_AfterUpdate(trainer))
    trainer.train()
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()  # its hooks would keep model and optimizer
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()


def trained_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that training changes, tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class _ReplayTrainer(FiniteTrainer):
    """Trains, and shows the gradient of each example of a micro-batch before it is trained on."""

    watcher: Watcher

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of the micro-batch."""
        if self.watcher.with_examples:
            for row, index in enumerate(self._example_index):
                loss = self._loss_of(inputs, row) / kwargs["num_items_in_batch"]
                weights = trained_weights(self.model)
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                pairs = zip(weights, found, strict=True)
                self.watcher.example(
                    index, {name: grad for name, grad in pairs if grad is not None}
                )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss_of(self, inputs: dict[str, Any], row: int) -> torch.Tensor:
        """Return the sum of losses of one example, without the padding of its batch."""
        length = int(inputs["attention_mask"][row].sum())
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (inputs[name][row : row + 1, :length] for name in names)
        with self.select_head(labels):
            outputs = self.model(input_ids=ids, attention_mask=mask)
        loss: torch.Tensor = self._token_losses(outputs, labels).sum()
        return loss


class _AfterUpdate(TrainerCallback):
    """Shows each update: the log of a step is the first place where its norm and rate are."""

    def __init__(self, trainer: _ReplayTrainer) -> None:
        self.trainer = trainer

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Show the update of this step."""
        logs = kwargs["logs"]
        if "grad_norm" not in logs:  # the summary at the end
            return
        self.trainer.take_shown()
        norm, most = logs["grad_norm"], args.max_grad_norm
        # as torch.nn.utils.clip_grad_norm_ and DeepSpeed have it
        clip = min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0
        weights = trained_weights(self.trainer.model)
        decayed = self.trainer.get_decay_parameter_names(self.trainer.model)
        is_adam = args.optim in ADAM
        step, lr = state.global_step, float(logs["learning_rate"])
        rate = lr * (1 - args.adam_beta1) / (1 - args.adam_beta1**step) if is_adam else lr
        self.trainer.watcher.update(
            Update(
                step=step,
                lr=lr,
                rate=rate,
                clip=clip,
                denominator=lambda name: self._denominator(weights[name], step),
                decay={name: args.weight_decay * (name in decayed) for name in weights},
            ),
            {name: weight.detach() for name, weight in weights.items()},
        )

    def _denominator(self, weight: torch.nn.Parameter, step: int) -> torch.Tensor | float:
        moments = self._second_moments(weight)
        if moments is None:  # SGD, or a weight that no example has moved
            return 1.0
        args = self.trainer.args
        found: torch.Tensor = torch.sqrt(moments / (1 - args.adam_beta2**step)) + args.adam_epsilon
        return found

    def _second_moments(self, weight: Any) -> torch.Tensor | None:
        if self.trainer.args.optim not in ADAM:
            return None
        if not self.trainer.is_deepspeed_enabled:
            moments: torch.Tensor | None = self.trainer.optimizer.state[weight].get("exp_avg_sq")
            return moments
        # private: `safe_get_full_optimizer_state` knows the state of the first group of weights
        # alone, as the others have none yet when DeepSpeed links it. One rank holds all of a weight
        zero, link = self.trainer.optimizer.optimizer, weight._hp_mapping
        flat = zero.single_partition_of_fp32_groups[link.param_group_index]
        place = link.get_hp_fragment_address()
        moments = zero.optimizer.state[flat]["exp_avg_sq"]
        return moments.narrow(0, place.start, place.numel).view_as(weight)
