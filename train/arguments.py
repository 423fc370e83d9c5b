"""The flags of `sft-probe train`: every flag of `transformers.TrainingArguments`, and ours."""

import inspect
import json
import logging
import math
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, TrainingArguments

from sft_probe.errors import UserError
from sft_probe.models import DTYPES, load_tokenizer
from sft_probe.train import launch
from sft_probe.train.options import OBJECTIVES, ObjectiveOptions, TrainOptions, expand
from sft_probe.train.snapshots import SNAPSHOT_DTYPES

log = logging.getLogger(__name__)

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": DTYPES,
    "snapshot_dtype": (None, *SNAPSHOT_DTYPES),
    "objective": OBJECTIVES,
    "loss_type": ("sigmoid", "ipo"),
    "train_sampling_strategy": (
        "random",
        "sequential",
    ),  # any other order follows from the lengths of the texts
}
_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "probe_train": 0,
    "lora_r": 1,
    "dataloader_num_workers": 0,
}
"""The smallest value of flags that nothing else checks in time."""
_REQUIRED = {
    "save_only_model": False,  # these three: a resume would not be exact
    "ignore_data_skip": False,
    "auto_find_batch_size": False,
    "average_tokens_across_devices": True,  # these two: the loss would be another than documented
    "label_smoothing_factor": 0.0,
    # these three need a data set for evaluation; the probe is the evaluation here
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,  # the same command resumes by itself
    "save_on_each_node": False,  # all nodes see one run directory
    "logging_nan_inf_filter": False,  # the console would show another loss than the files
    "dataloader_in_order": True,
    "enable_jit_checkpoint": False,  # it would answer SIGTERM in its own way
    "push_to_hub": False,
    "parallelism_config": None,
    "fsdp_config": None,
    "fsdp": None,  # snapshots are gathered from DeepSpeed's ZeRO
}
"""Flags of `TrainingArguments` that would break a promise of this program, and the value that they
must keep."""


@dataclass
class SftArguments(TrainOptions, TrainingArguments):
    """`TrainingArguments` with defaults for dense, comparable snapshots, and our options."""

    def __post_init__(self) -> None:
        self._check_values()
        self._settle_cpu()
        self.deepspeed = config = launch.deepspeed_config(self.deepspeed)
        self._settle_precision()
        self.accelerator_config: Any = launch.accelerator_config(self.accelerator_config)
        if self.dry_run:  # neither needs what the training needs
            self.deepspeed, self.use_cpu = None, not torch.cuda.is_available()
        elif self.deepspeed is not None:
            load_tokenizer(self.model_name_or_path)  # a typo is found before DeepSpeed compiles
            launch.set_single_process_environment()
            launch.provide_extension()
            if launch.join_ranks_on_cpu(timeout_s=self.ddp_timeout):
                self.accelerator_config["use_configured_state"] = True
        elif not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.use_cpu = True  # else accelerate takes each rank for a run of its own
        super().__post_init__()
        self.deepspeed = config
        self._check_single_gpu()

    def _check_values(self) -> None:
        """Raise `UserError` for values that no training here can have."""
        if self.output_dir is None and not self.dry_run:
            raise UserError("--output_dir is missing: where shall the run go?")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"--{name} {value}: use one of {', '.join(filter(None, known))}.")
        if self.save_strategy != "no" or self.save_total_limit < 2:
            raise UserError(
                "resume states are saved at --resume_steps, with --save_total_limit 2 or more."
            )
        if self.max_steps == 0 or self.num_train_epochs <= 0:
            raise UserError("a run has one step at least: raise --max_steps or --num_train_epochs.")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--{name} {value}: it must be {least} or more.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} {value}: a finite number is needed.")
        for name, required in _REQUIRED.items():
            if (value := getattr(self, name)) != required:
                raise UserError(
                    f"--{name} {value} does not work here. Leave it out: it must be {required}."
                )
        self._check_texts()
        self._check_preference()

    def _check_preference(self) -> None:
        """Raise `UserError` for values that no preference stage can have, and for its options
        without it."""
        if self.objective == "sft":
            for option in fields(ObjectiveOptions):
                if getattr(self, option.name) != option.default:
                    raise UserError(f"--{option.name} is for --objective dpo.")
            return
        if self.beta <= 0:
            raise UserError(f"--beta {self.beta}: it must be above 0; at 0 a pair teaches nothing.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing}: from 0 to below 0.5.")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError("--label_smoothing is for --loss_type sigmoid.")
        if self.sft_weight < 0:
            raise UserError(f"--sft_weight {self.sft_weight}: it must be 0 or more.")
        if self.train_category != "chosen":
            raise UserError(
                f"--train_category {self.train_category}: --objective dpo trains on chosen over "
                "rejected. Leave it out."
            )

    @property
    def data_name(self) -> str:
        """What a run trains on, for messages."""
        if self.objective == "dpo":
            return "pairs of chosen and rejected"
        return f"examples of {self.train_category}"

    def _check_texts(self) -> None:
        """Raise `UserError` for flags with a syntax of their own, which the Trainer reads late or
        not at all."""
        for name, value in vars(self).items():
            if name.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
                raise UserError(f"--{name} {value}: a JSON object is needed.")
        if any("=" not in part for part in (self.optim_args or "=").split(",")):
            raise UserError(
                f"--optim_args {self.optim_args}: write name=value, with commas between them."
            )
        known = (*inspect.signature(checkpoint).parameters, "preserve_rng_state")
        for flag in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            value = getattr(self, flag) or {}
            for name in json.loads(value) if isinstance(value, str) else value:
                if name not in known:
                    raise UserError(
                        f"--{flag}: there is no {name!r} in torch.utils.checkpoint.checkpoint."
                    )

    def _settle_cpu(self) -> None:
        """Set up training on the CPU: `--use_cpu` would switch DeepSpeed off without a word."""
        if not self.use_cpu or self.deepspeed == "none":
            return
        if not torch.cuda.is_available():
            self.use_cpu = False
        elif self.deepspeed is None:
            self.deepspeed = "none"
        else:
            raise UserError(
                f"--use_cpu switches --deepspeed {self.deepspeed} off. Leave one of them out."
            )

    def _settle_precision(self) -> None:
        """Settle the precision: under DeepSpeed 16-bit weights get float32 masters, as with
        `--bf16` and `--fp16`; else they get none."""
        flags = {"bfloat16": "bf16", "float16": "fp16"}
        for dtype, flag in flags.items():
            if getattr(self, flag) and self.dtype not in ("float32", dtype):
                raise UserError(
                    f"--dtype {self.dtype} and --{flag} contradict each other. Leave one of them "
                    "out."
                )
        if self.deepspeed is None and self.dtype == "float16" and self.fp16:
            raise UserError(
                "--fp16 without DeepSpeed scales the gradients of float32 weights: use --dtype "
                "float32."
            )
        if self.deepspeed is not None and self.dtype in flags:
            setattr(self, flags[self.dtype], True)
        if self.fp16 and not self.dry_run and not torch.accelerator.is_available():
            raise UserError("fp16 needs a GPU. Use --bf16 true, or --dtype bfloat16.")
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        if (launcher := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", asked):
            raise UserError(
                f"the launcher asks for mixed precision {launcher}, the flags do not: add "
                f"--{launcher} true."
            )
        if self.snapshot_dtype == "float32" and self.dtype != "float32" and self.deepspeed is None:
            raise UserError(
                f"--snapshot_dtype float32: training in {self.dtype} keeps no float32 weights. "
                "Train with --dtype "
                "float32 (with --bf16 true for speed), or with DeepSpeed and --bf16 true."
            )

    def _validate_args(self) -> None:
        """Check as `TrainingArguments` does (private there), which takes bf16 without a GPU only
        beside `--use_cpu`."""
        asked = self.use_cpu
        self.use_cpu = asked or not torch.cuda.is_available()
        super()._validate_args()
        self.use_cpu = asked

    def _check_single_gpu(self) -> None:
        """Raise `UserError` for one process on several GPUs: `torch.nn.DataParallel` gathers no
        loss of each example."""
        if self.n_gpu <= 1:
            return
        if self.deepspeed is None:
            raise UserError(
                f"one process sees {self.n_gpu} GPUs. Start one for each (torchrun "
                f"--nproc_per_node {self.n_gpu} -m "
                "sft_probe.train.sft ...), or show it a single one (CUDA_VISIBLE_DEVICES=0)."
            )
        self._n_gpu = 1  # a dry run, which has left DeepSpeed out


def parse_arguments(argv: list[str]) -> tuple[SftArguments, dict[str, str]]:
    """Parse flags, with `--config recipe.yaml` read as flags that come before all others.

    Returns the arguments, and the flags as asked (name to text), the later ones winning.

    Raises:
        UserError: an unknown flag, a recipe that cannot be read, or a value that does not fit.
    """
    flags = expand(argv)
    parser = HfArgumentParser(
        SftArguments, prog="sft-probe train", conflict_handler="resolve", allow_abbrev=False
    )
    parser.error = _refuse
    with as_user_error():
        (arguments,) = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    if arguments.hub_token is not None:
        raise UserError(
            "--hub_token would end up in the manifest; set HF_TOKEN in the environment instead."
        )
    return arguments, _asked(flags)


def _refuse(message: str) -> None:
    raise UserError(f"{message.removeprefix('argument ')} (see sft-probe train --help)")


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn what the Trainer and its libraries raise about flags into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # of any kind: a missing package, a setting that does not fit another one
        log.debug("the trainer refuses the flags", exc_info=True)
        raise UserError(
            f"train: {textwrap.shorten(str(error), 400) or type(error).__name__}"
        ) from error


def _asked(flags: list[str]) -> dict[str, str]:
    asked: dict[str, str] = {}
    for position, flag in enumerate(flags):
        if flag.startswith("--"):
            following = flags[position + 1] if position + 1 < len(flags) else ""
            asked[flag[2:]] = "true" if following.startswith("--") or not following else following
    asked.pop("output_dir", None)
    return asked
