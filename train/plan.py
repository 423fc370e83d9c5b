"""What a run will do and need, said before a weight is loaded (`--dry-run`), and checked against
the disk."""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from sft_probe.errors import UserError
from sft_probe.models import check_window, model_without_weights
from sft_probe.probe_set import ProbeSet
from sft_probe.prompts import DroppedDoc, PromptFormat, encode_doc, terminator_id
from sft_probe.train.arguments import SftArguments, as_user_error
from sft_probe.train.examples import IGNORED_LABEL, PadRight, TrainingExamples
from sft_probe.train.model import add_lora
from sft_probe.train.schedule import parse_steps

_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "lion": 4}
"""Per trained parameter, by the beginning of the optimizer's name; Adam and others keep two float32
numbers."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Resolved steps, and the bytes that the run directory will come to at most."""

    max_steps: int
    steps_per_epoch: int
    snapshot_steps: list[int]
    probe_steps: list[int]
    resume_steps: list[int]
    snapshot_bytes: int
    """Of one snapshot."""
    state_bytes: int
    """Of one resume state."""
    num_states: int
    """At once: one is written before the oldest goes."""

    @property
    def total_bytes(self) -> int:
        """Weights and resume states."""
        return len(self.snapshot_steps) * self.snapshot_bytes + self.num_states * self.state_bytes


def plan_run(arguments: SftArguments, trainer: Trainer, model: Any) -> RunPlan:
    """Resolve the schedules for this data and number of processes, and size what is saved of
    `model`."""
    _, steps_per_epoch, *_, max_steps = trainer.set_initial_training_values(
        arguments, trainer.get_train_dataloader()
    )

    def steps(name: str) -> list[int]:
        text = getattr(arguments, name)
        if text is None:
            return []
        return parse_steps(
            text, flag=f"--{name}", max_steps=max_steps, steps_per_epoch=steps_per_epoch
        )

    resume_steps = [step for step in steps("resume_steps") if 0 < step < max_steps]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    width = 4 if arguments.dtype == "float32" else 2
    has_masters = arguments.deepspeed is not None and (
        arguments.bf16 or arguments.fp16 or width == 2
    )
    optimizer = next(
        (size for name, size in _OPTIMIZER_BYTES.items() if str(arguments.optim).startswith(name)),
        8,
    )
    per_parameter = width + optimizer if arguments.deepspeed is None else 2 * width + 4 + optimizer
    return RunPlan(
        max_steps=max_steps,
        steps_per_epoch=steps_per_epoch,
        snapshot_steps=sorted({0, *steps("snapshot_steps"), max_steps}),
        probe_steps=steps("probe_steps"),
        resume_steps=resume_steps,
        snapshot_bytes=trained
        * (4 if has_masters and arguments.snapshot_dtype != "training" else width),
        state_bytes=trained * per_parameter,
        num_states=max(1, min(len(resume_steps), arguments.save_total_limit + 1)),
    )


def check_disk(plan: RunPlan, folder: Path) -> None:
    """Raise `UserError` where the run does not fit the disk of `folder`, which need not exist
    yet."""
    own = sum(
        path.stat().st_size for path in folder.rglob("*.*") if path.is_file()
    )  # of an earlier attempt
    free = _free_bytes(folder) + own
    if plan.total_bytes > free:
        raise UserError(
            f"{folder}: {len(plan.snapshot_steps)} snapshots and {plan.num_states} resume states "
            "come to "
            f"{plan.total_bytes / _GIB:.1f} GiB, but {free / _GIB:.1f} GiB are free. Ask for fewer "
            "--snapshot_steps, "
            "or --snapshot_dtype training."
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(
        next(path for path in [folder, *folder.resolve().parents] if path.exists())
    ).free


def find_unscorable(
    probe_set: ProbeSet, prompt_format: PromptFormat, tokenizer: Any, max_length: int
) -> list[DroppedDoc]:
    """Return the held-out docs that no probe and no sweep of this run will score, with the
    reason."""
    encoded = (
        encode_doc(doc, prompt_format, tokenizer, max_length)
        for doc in probe_set.of_split("heldout")
    )
    return [doc for doc in encoded if isinstance(doc, DroppedDoc)]


def describe(
    arguments: SftArguments,
    probe_set: ProbeSet,
    tokenizer: Any,
    prompt_format: PromptFormat,
    examples: TrainingExamples,
) -> str:
    """Return the plan as text, the same on every rank; a collective where there are several.

    Raises:
        UserError: the model does not exist, or the run does not fit the disk.
    """
    model = model_without_weights(arguments.model_name_or_path)
    check_window(arguments.max_length, model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if arguments.lora_r:
        model = add_lora(model, arguments)
    scratch = copy.copy(arguments)
    scratch.output_dir = tempfile.gettempdir()  # a Trainer makes this directory
    with as_user_error():
        trainer = Trainer(
            model=torch.nn.Linear(1, 1),  # the batches do not depend on the model
            args=scratch,
            train_dataset=examples,
            data_collator=PadRight(terminator_id(prompt_format.name, tokenizer)),
        )
        plan = plan_run(arguments, trainer, model)
    counts = _counts(arguments, trainer, examples, plan)
    folder = Path(str(arguments.output_dir))
    check_disk(plan, folder)
    positions, padding = int(counts[:, 2].sum()), int(counts[:, 3].sum())
    return "\n".join(
        [
            f"model    {arguments.model_name_or_path}: {num_parameters:,} parameters, "
            f"{arguments.dtype}",
            f"data     {len(examples)} {arguments.data_name} "
            f"({len(examples.dropped)} dropped, "
            f"{examples.num_cut_prompts} prompts cut)",
            *(f"         dropped: {drop.doc_id}: {drop.reason}" for drop in examples.dropped),
            *(
                f"         held out, but cannot be scored: {drop.doc_id}: {drop.reason}"
                for drop in find_unscorable(
                    probe_set, prompt_format, tokenizer, arguments.max_length
                )
            ),
            f"batches  {arguments.world_size} processes x {arguments.per_device_train_batch_size} "
            "examples x "
            f"{arguments.gradient_accumulation_steps} accumulated; {padding / positions:.0%} of "
            f"{positions:,} positions are padding",
            f"length   {plan.max_steps} steps, {plan.steps_per_epoch} an epoch",
            f"disk     {len(plan.snapshot_steps)} snapshots x {plan.snapshot_bytes / _GIB:.2f} GiB "
            f"+ {plan.num_states} "
            f"resume states x {plan.state_bytes / _GIB:.2f} GiB = {plan.total_bytes / _GIB:.2f} "
            f"GiB of {_free_bytes(folder) / _GIB:.1f} free",
            "",
            f"{'step':>8}{'epoch':>9}{'examples':>11}{'labelled tokens':>17}  saved or scored",
            *_lines(plan, counts),
        ]
    )


def _counts(
    arguments: SftArguments, trainer: Trainer, examples: TrainingExamples, plan: RunPlan
) -> torch.Tensor:
    """Return [max_steps, 4] int64 over all ranks: examples, labelled tokens, positions and padding
    of each step."""
    counts = torch.zeros((plan.max_steps, 4), dtype=torch.int64)
    step = 0
    for micro_step, is_last, batch in _batches(trainer.get_train_dataloader()):
        mask, labels = batch["attention_mask"], batch["labels"]
        counts[step] += torch.tensor(
            [
                len(mask) // examples.per_item,
                int((labels != IGNORED_LABEL).sum()),
                mask.numel(),
                int((mask == 0).sum()),
            ]
        )
        step += is_last or (micro_step + 1) % arguments.gradient_accumulation_steps == 0
        if step == plan.max_steps:
            break
    reduced: torch.Tensor = trainer.accelerator.reduce(counts.to(arguments.device), reduction="sum")
    return reduced.cpu()


def _batches(dataloader: Any) -> Iterator[tuple[int, bool, dict[str, torch.Tensor]]]:
    """Yield batches of endless epochs in the order of training: number within the epoch, whether it
    is its last one, and the batch."""
    epoch = 0
    while True:
        dataloader.set_epoch(epoch)
        for number, batch in enumerate(dataloader):
            yield number, number == len(dataloader) - 1, batch
        epoch += 1


def _lines(plan: RunPlan, counts: torch.Tensor) -> Iterator[str]:
    kinds = {
        "snapshot": plan.snapshot_steps,
        "probe": plan.probe_steps,
        "resume state": plan.resume_steps,
    }
    for step in sorted({step for steps in kinds.values() for step in steps}):
        examples, tokens = counts[:step, :2].sum(0).tolist()
        names = ", ".join(name for name, steps in kinds.items() if step in steps)
        yield f"{step:>8}{step / plan.steps_per_epoch:>9.2f}{examples:>11,}{tokens:>17,}  {names}"
