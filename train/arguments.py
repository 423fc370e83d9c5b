"""The flags of `sft-probe train`: every flag of `transformers.TrainingArguments`, and ours."""

import inspect
import json
import logging
import math
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, TrainingArguments

from sft_probe import ds_configs
from sft_probe.errors import UserError
from sft_probe.models import DTYPES, EMBEDDED_MODEL
from sft_probe.probe_set import DEFAULT_PROBE_SET
from sft_probe.train import launch
from sft_probe.train.snapshots import SNAPSHOT_DTYPES

log = logging.getLogger(__name__)

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": DTYPES,
    "snapshot_dtype": (None, *SNAPSHOT_DTYPES),
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
    "resume_from_checkpoint": None,  # the same command goes on by itself
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


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SftArguments(TrainingArguments):
    """`TrainingArguments` with defaults for dense, comparable snapshots, and the flags of this
    program."""

    model_name_or_path: str = _flag(EMBEDDED_MODEL, "Hub id, path, or the embedded model.")
    dtype: str = _flag("float32", "Dtype of the weights in training: float32, bfloat16 or float16.")
    probe_set: str = _flag(
        DEFAULT_PROBE_SET,
        "Probe set whose train split is trained on: path, hub id or embedded name.",
    )
    train_data: str | None = _flag(
        None,
        "Train on this instead: .jsonl[.gz] or .parquet, a directory of them, or a hub id "
        "(docs/training.md).",
    )
    prompt_column: str = _flag("prompt", "Of --train_data with prompts and responses.")
    response_column: str = _flag("response", "Of --train_data with prompts and responses.")
    train_category: str = _flag(
        "chosen",
        "What to train on: chosen, chosen_no_prompt, chosen:0.5,rejected:0.5 (docs/training.md).",
    )
    prompt_format: str | None = _flag(
        None, "hh, chat, plain or a Jinja file. Default: the probe set's own."
    )
    max_length: int = _flag(
        1024, "Tokens of prompt, response and terminator; longer docs are dropped and named."
    )
    max_prompt_tokens: int | None = _flag(None, "Longer prompts lose whole turns on the left.")
    snapshot_steps: str = _flag(
        "log2",
        "Steps whose weights are kept, such as 0,1,2,4,...,512,+100,epoch,last "
        "(docs/training.md); 0 and last always are.",
    )
    snapshot_dtype: str | None = _flag(
        None,
        "training, or float32 for the masters of 16-bit training. Default: the masters where there "
        "are any.",
    )
    resume_steps: str | None = _flag(
        "+500", "Steps whose full state is kept to resume from, in the same grammar."
    )
    max_wall_time_s: float | None = _flag(
        None, "After so many seconds: stop with a state and exit code 75."
    )
    dry_run: bool = _flag(False, "Print schedule, tokens, padding and disk, and train nothing.")

    attn_implementation: str | None = _flag(None, "sdpa, eager, flash_attention_2, ...")
    lora_r: int | None = _flag(None, "Rank of a LoRA; default: all weights are trained.")
    lora_alpha: int = _flag(16, "Scale of the LoRA.")
    lora_target_modules: str = _flag(
        "all-linear", "Modules that get a LoRA: names with commas between them."
    )

    probe_steps: str | None = _flag(
        None,
        "Steps at which held-out docs are scored in training, in the same grammar; default: never.",
    )
    probe_train: int = _flag(
        0, "How many docs of the train split are scored with them, always the same."
    )

    probe_max_tokens: int | None = _flag(
        None, "Token budget of one forward pass of the probe; default: by device."
    )

    deepspeed: str | None = _flag(
        None,
        f"One of {', '.join(ds_configs.available())}, a JSON file, or none. Default: zero2 with a "
        "GPU, else cpu.",
    )
    output_dir: str | None = _flag(None, "The run directory.")
    lr_scheduler_type: str = _flag(
        "constant_with_warmup", "Constant, so that step s of a long run ends a short one."
    )
    save_strategy: str = _flag("no", "Leave it: --resume_steps says when a resume state is saved.")
    save_total_limit: int = _flag(
        2, "Resume states kept, at least 2: the last one may be half-written."
    )
    report_to: str = _flag("none", "none, wandb, tensorboard, trackio.")
    logging_steps: float = _flag(1, "Steps between two log lines.")
    logging_nan_inf_filter: bool = _flag(False, "Leave it: what is logged is what the files say.")
    remove_unused_columns: bool = _flag(False, "The examples hold exactly what the model takes.")

    def __post_init__(self) -> None:
        self._check_values()
        self._settle_cpu()
        self.deepspeed = config = launch.deepspeed_config(self.deepspeed)
        self._settle_precision()
        self.accelerator_config: Any = launch.accelerator_config(self.accelerator_config)
        if self.dry_run:  # neither needs what the training needs
            self.deepspeed, self.use_cpu = None, not torch.cuda.is_available()
        elif self.deepspeed is not None:
            launch.set_single_process_environment()
            launch.build_extension()
            if launch.join_ranks_on_cpu(timeout_s=self.ddp_timeout):
                self.accelerator_config["use_configured_state"] = True
        elif not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.use_cpu = True  # else accelerate takes each rank for a run of its own
        super().__post_init__()
        self.deepspeed = config
        self._check_single_gpu()

    def _check_values(self) -> None:
        """Raise `UserError` for values that no training here can have."""
        if self.output_dir is None:
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
        """`--use_cpu` would switch DeepSpeed off without a word; without a GPU it is what happens
        anyway."""
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
        """Under DeepSpeed 16-bit weights get float32 masters, as with `--bf16` and `--fp16`; else
        they get none."""
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
        """One process on several GPUs would be `torch.nn.DataParallel`, which gathers no loss of
        each example."""
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
    """Parses flags, with `--config recipe.yaml` read as flags that come before all others.

    Returns the arguments, and the flags as asked (name to text), the later ones winning.

    Raises:
        UserError: the recipe cannot be read, or a value does not fit.
        SystemExit: an unknown flag (argparse's own message, exit code 2).
    """
    flags = [part for argument in argv for part in _split(argument)]
    if "--config" in flags:
        index = flags.index("--config")
        if index + 1 == len(flags):
            raise UserError("--config needs the path of a recipe.")
        recipe = recipe_flags(Path(flags[index + 1]))
        flags = recipe + flags[:index] + flags[index + 2 :]
    parser = HfArgumentParser(
        SftArguments, prog="sft-probe train", conflict_handler="resolve", allow_abbrev=False
    )
    with as_user_error():
        (arguments,) = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    if arguments.hub_token is not None:
        raise UserError(
            "--hub_token would end up in the manifest; set HF_TOKEN in the environment instead."
        )
    return arguments, _asked(flags)


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


def _split(argument: str) -> list[str]:
    """`--max-steps=4` as `--max_steps`, `4`: a flag has one spelling, by which it is known in a
    later attempt."""
    if argument[:2] != "--":
        return [argument]
    name, *value = argument.split("=", 1)
    return ["--" + name[2:].replace("-", "_"), *value]


def recipe_flags(path: Path) -> list[str]:
    """A recipe as flags. Raises `UserError` where it cannot be read."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} must map flags to values.")
    return [part for name, value in recipe.items() for part in (*_split(f"--{name}"), str(value))]


def _asked(flags: list[str]) -> dict[str, str]:
    asked: dict[str, str] = {}
    for position, flag in enumerate(flags):
        if flag.startswith("--"):
            following = flags[position + 1] if position + 1 < len(flags) else ""
            asked[flag[2:]] = "true" if following.startswith("--") or not following else following
    asked.pop("output_dir", None)
    return asked
