"""What a training starts from: examples and model, as the flags say."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.nn.modules.dropout import _DropoutNd  # the base of all dropout modules
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft_probe.errors import UserError
from sft_probe.files import sha256_file
from sft_probe.models import (
    check_window,
    load_model,
    load_tokenizer,
    model_without_weights,
    resolve_model,
)
from sft_probe.probe_set import Doc, ProbeSet
from sft_probe.prompts import DroppedDoc, PromptFormat, dropped_by_faults, resolve_format
from sft_probe.train.arguments import SftArguments
from sft_probe.train.data import TrainingExamples, build_examples, describe_first
from sft_probe.train.lora import add_lora
from sft_probe.train.mixture import assign, parse_mixture
from sft_probe.train.run_dir import recorded_format
from sft_probe.train.schedule import parse_steps
from sft_probe.train.source import read_docs, with_random, without_heldout

_JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Noise in the routers of experts, as modules name it; PhiMoE's `router_jitter_noise` is none, but
a threshold."""
Inputs = tuple[PreTrainedTokenizerBase, PromptFormat, TrainingExamples]


def load_inputs(arguments: SftArguments, probe_set: ProbeSet) -> Inputs:
    """Everything that needs no weights, so that a fault is told before they are loaded."""
    for flag in ("snapshot_steps", "probe_steps", "resume_steps"):
        parse_steps(
            getattr(arguments, flag) or "last", flag=f"--{flag}", max_steps=0, steps_per_epoch=1
        )
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    docs, categories, dropped = _train_docs(arguments, probe_set)
    prompt_format = _resolve_format(arguments, tokenizer, probe_set, docs)
    parts = parse_mixture(
        arguments.train_category, categories, arguments.train_data or arguments.probe_set
    )
    examples = build_examples(
        assign(docs, parts, arguments.seed),
        prompt_format,
        tokenizer,
        max_length=arguments.max_length,
        max_prompt_tokens=arguments.max_prompt_tokens,
        dropped=dropped,
    )
    return tokenizer, prompt_format, examples


def _resolve_format(
    arguments: SftArguments,
    tokenizer: PreTrainedTokenizerBase,
    probe_set: ProbeSet,
    docs: Sequence[Doc],
) -> PromptFormat:
    """The format that all ranks, and every further attempt at this run, share."""
    given = arguments.prompt_format or probe_set.prompt_format
    recorded = recorded_format(Path(str(arguments.output_dir)))
    found = resolve_format(given, tokenizer, [*probe_set.docs, *docs], recorded)
    (source,) = broadcast_object_list([found.source])  # each rank may have read another time
    return PromptFormat(source, tokenizer)


def _train_docs(
    arguments: SftArguments, probe_set: ProbeSet
) -> tuple[list[Doc], Sequence[str], list[DroppedDoc]]:
    """The docs to train on, their categories, and what was left out."""
    if arguments.train_data is None:
        return probe_set.of_split("train"), probe_set.categories, dropped_by_faults(probe_set)
    docs, faulty = read_docs(
        arguments.train_data,
        prompt_column=arguments.prompt_column,
        response_column=arguments.response_column,
    )
    docs, twins = without_heldout(docs, probe_set.of_split("heldout"))
    if not docs:
        raise UserError(
            f"{arguments.train_data}: no row can be trained on. {describe_first([*faulty, *twins])}"
        )
    if "random" in arguments.train_category:
        docs = with_random(docs, arguments.seed)
    return docs, tuple(docs[0].responses), [*faulty, *twins]


def model_version(name: str) -> str | None:
    """A hash of the config and weights of a local model; of a hub model the commit. Raises
    `UserError` for no model."""
    folder = Path(resolve_model(name))
    if not folder.is_dir():
        commit: str | None = model_without_weights(name).config._commit_hash
        return commit
    files = {
        path.name: sha256_file(path)
        for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    }
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def load_trained_model(arguments: SftArguments) -> Any:
    """The model to train, in train mode, without dropout, with its LoRA where one is asked for."""
    model = load_model(
        arguments.model_name_or_path,
        arguments.dtype,
        attn_implementation=arguments.attn_implementation,
    ).train()
    check_window(arguments.max_length, model)
    disable_dropout(model)
    return add_lora(model, arguments) if arguments.lora_r else model


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every dropout probability to zero, so that a run depends on its data order alone.

    Dropout modules are not all: models keep probabilities as numbers of their own, under names with
    "drop" in them (`attention_dropout`, `layerdrop`, `resid_pdrop`), and some read the config in
    each pass, so that the config of a snapshot says zero too. What this leaves noisy is found when
    training begins (`SftTrainer.try_model`).
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PretrainedConfig) else (module,):
            for name, value in vars(owner).items():
                is_noise = (
                    "drop" in name
                    or name in _JITTER
                    or (name == "p" and isinstance(module, _DropoutNd))
                )
                if is_noise and isinstance(value, int | float) and not isinstance(value, bool):
                    vars(owner)[name] = 0.0
