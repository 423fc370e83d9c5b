"""What can be known of the flags of a training before torch is imported."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sft_probe import ds_configs
from sft_probe.errors import UserError, unknown
from sft_probe.files import read_object
from sft_probe.models import DTYPES, EMBEDDED_MODEL
from sft_probe.options import Option
from sft_probe.probe_set import ProbeSet, load_probe_set
from sft_probe.prompts import check_format
from sft_probe.train.options import (
    SNAPSHOT_DTYPES,
    ObjectiveOptions,
    TrainOptions,
    mixture_of,
    read_switch,
    train_options,
    values_of,
)
from sft_probe.train.schedule import parse_steps

_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "snapshot_dtype": SNAPSHOT_DTYPES,
    "objective": ("sft", "dpo"),
    "loss_type": ("sigmoid", "ipo"),
    # any other order follows from the lengths of the texts
    "train_sampling_strategy": ("random", "sequential"),
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


def check_inputs(flags: Sequence[str]) -> ProbeSet:
    """Check everything that the flags say and name, and return the probe set.

    Raises:
        UserError: a value does not fit, or there is no such model directory, file, probe set or
            category.
    """
    values = check_flags(flags)
    given = {field.name: field.default for field in fields(TrainOptions)} | values
    probe_set = load_probe_set(str(given["probe_set"]))
    if given["train_data"] is None:
        asked = str(given["objective"]), str(given["train_category"])
        mixture_of(*asked, probe_set.categories, probe_set.source)
    if given["prompt_format"] is None:
        check_format(probe_set.prompt_format, probe_set.source)
    if values.get("output_dir") is None and not values.get("dry_run"):
        raise UserError("--output_dir is missing: where shall the run go?")
    return probe_set


def check_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Check the value of each flag, alone and by the files that it names; return the values.

    Raises:
        UserError: one does not fit.
    """
    options = {option.name: option for option in train_options()}
    if flags and flags[0][:2] != "--":
        raise UserError(f"{flags[0]!r} is one argument too many: every option has a name.")
    values = {
        name: _read(options[name], texts)
        for name, texts in values_of(flags).items()
        if name in options
    }
    if "hub_token" in values:
        raise UserError(
            "--hub_token would end up in the manifest; set HF_TOKEN in the environment instead."
        )
    _check_alone(values)
    _check_preference(values)
    _check_texts(values)
    _check_files(values)
    return values


def _read(option: Option, texts: Sequence[str]) -> Any:
    """Return the value of a flag; the text, or several, where it is a text."""
    flag = f"--{option.name}"
    is_switch = option.is_switch or option.read is read_switch
    if not texts and not is_switch:
        raise UserError(f"{flag} needs a value.")
    if option.read is str and not option.choices and not option.is_switch:
        return texts[0] if len(texts) == 1 else list(texts)
    if len(texts) > 1:
        raise UserError(f"{flag} takes one value, not {' '.join(texts)}.")
    try:
        return read_switch(texts[0] if texts else "") if is_switch else option.value_of(texts[0])
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{flag}: {error}.") from error


def _check_alone(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value that no training here can have."""
    for name, known in _CHOICES.items():
        if (value := values.get(name)) is not None and value not in known:
            raise unknown("choice", str(value), known, where=f"--{name}")
    if values.get("save_strategy", "no") != "no" or values.get("save_total_limit", 2) < 2:
        raise UserError(
            "resume states are saved at --resume_steps, with --save_total_limit 2 or more."
        )
    if values.get("max_steps") == 0 or values.get("num_train_epochs", 1) <= 0:
        raise UserError("a run has one step at least: raise --max_steps or --num_train_epochs.")
    for name, least in _LEAST.items():
        if (value := values.get(name)) is not None and value < least:
            raise UserError(f"--{name} {value}: it must be {least} or more.")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: a finite number is needed.")
    for name, required in _REQUIRED.items():
        if name in values and values[name] != required:
            raise UserError(
                f"--{name} {values[name]} does not work here. Leave it out: it must be {required}."
            )


def _check_preference(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for values that no preference stage can have, and for its options without
    it."""
    if values.get("objective", "sft") == "sft":
        for field in fields(ObjectiveOptions):
            if values.get(field.name, field.default) != field.default:
                raise UserError(f"--{field.name} is for --objective dpo.")
        return
    beta, smoothing = values.get("beta", 0.1), values.get("label_smoothing", 0.0)
    if beta <= 0:
        raise UserError(f"--beta {beta}: it must be above 0; at 0 a pair teaches nothing.")
    if not 0 <= smoothing < 0.5:
        raise UserError(f"--label_smoothing {smoothing}: from 0 to below 0.5.")
    if smoothing and values.get("loss_type") == "ipo":
        raise UserError("--label_smoothing is for --loss_type sigmoid.")
    if values.get("sft_weight", 0.0) < 0:
        raise UserError(f"--sft_weight {values['sft_weight']}: it must be 0 or more.")
    if (category := values.get("train_category", "chosen")) != "chosen":
        raise UserError(
            f"--train_category {category}: --objective dpo trains on chosen over rejected. Leave "
            "it out."
        )


def _check_texts(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for flags with a syntax of their own, which the Trainer reads late or not
    at all."""
    for name, value in values.items():
        if name.endswith("_kwargs") and not _is_object(value):
            raise UserError(f"--{name} {value}: a JSON object is needed.")
    arguments = str(values.get("optim_args", "="))
    if any("=" not in part for part in arguments.split(",")):
        raise UserError(f"--optim_args {arguments}: write name=value, with commas between them.")
    for name in ("snapshot_steps", "probe_steps", "resume_steps"):
        text = str(values.get(name) or "last")
        parse_steps(text, flag=f"--{name}", max_steps=0, steps_per_epoch=1)


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, TypeError):
        return False


def _check_files(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where there is no such model, setting, data or format on this disk."""
    model = str(values.get("model_name_or_path", EMBEDDED_MODEL))
    is_path = model.startswith(("/", ".", "~")) or Path(model).exists()
    if is_path and not Path(model, "config.json").is_file():
        raise UserError(f"--model_name_or_path {model}: there is no config.json in it.")
    if is_path:
        _check_window(Path(model, "config.json"), values.get("max_length", TrainOptions.max_length))
    stage = str(values.get("deepspeed", "none"))
    if stage not in (*ds_configs.available(), "none") and not Path(stage).is_file():
        known = [*ds_configs.available(), "none"]
        use = f"Use one of {', '.join(known)}, or a JSON file."
        raise unknown("setting", stage, known, where="--deepspeed", use=use)
    data = values.get("train_data")
    if data and data.endswith((".jsonl", ".jsonl.gz", ".parquet")) and not Path(data).is_file():
        raise UserError(f"--train_data {data}: there is no such file.")
    if (prompt_format := values.get("prompt_format")) is not None:
        check_format(str(prompt_format), "--prompt_format")
    if (folder := values.get("output_dir")) and Path(folder).is_file():
        raise UserError(f"--output_dir {folder} is a file. Choose a directory.")


def _check_window(path: Path, max_length: int) -> None:
    """Raise `UserError` where every window that a model's config names is under `max_length`."""
    config = read_object(path)
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    sizes = [config[name] for name in names if isinstance(config.get(name), int)]
    if sizes and max(sizes) < max_length:
        raise UserError(
            f"max_length {max_length} is over the model's window of {max(sizes)} tokens; set "
            "--max_length."
        )
