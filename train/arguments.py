"""The flags of `sft-probe train`: every flag of `transformers.TrainingArguments`, and ours."""

import inspect
import json
import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, TrainingArguments

from sft_probe.errors import UserError, doing
from sft_probe.models import load_tokenizer
from sft_probe.train import launch
from sft_probe.train.checks import check_flags
from sft_probe.train.options import TrainOptions, expand

log = logging.getLogger(__name__)


@dataclass
class SftArguments(TrainOptions, TrainingArguments):
    """`TrainingArguments` with defaults for dense, comparable snapshots, and our options."""

    def __post_init__(self) -> None:
        self._check_checkpointing()
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

    @property
    def data_name(self) -> str:
        """What a run trains on, for messages."""
        if self.objective == "dpo":
            return "pairs of chosen and rejected"
        return f"examples of {self.train_category}"

    def _check_checkpointing(self) -> None:
        """Raise `UserError` for settings of gradient checkpointing that torch does not know."""
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
    check_flags(flags)
    parser = HfArgumentParser(
        SftArguments, prog="sft-probe train", conflict_handler="resolve", allow_abbrev=False
    )
    parser.error = _refuse
    with as_user_error(), doing("setting up the trainer"):
        (arguments,) = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
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
