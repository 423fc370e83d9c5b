"""The model in training: how it is loaded, in which dtype it trains, and how it is scored."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch.nn.modules.dropout import _DropoutNd  # the base of all dropout modules
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from sft_probe.errors import UserError
from sft_probe.files import sha256_file
from sft_probe.models import (
    check_window,
    load_model,
    model_without_weights,
    resolve_model,
)
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import FittingScorer, Score
from sft_probe.scoring.targets import read_targets

if TYPE_CHECKING:
    from sft_probe.train.arguments import SftArguments


def add_lora(model: Any, arguments: "SftArguments") -> Any:
    """Return the model with trainable LoRA layers, the rest frozen; without dropout.

    Raises:
        UserError: the target modules are not in the model.
    """
    names = arguments.lora_target_modules.split(",")
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    try:
        with_lora: Any = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {error}") from error
    if arguments.activation_checkpointing:
        with_lora.enable_input_require_grads()  # else no gradient passes the frozen embeddings
    return with_lora


def name_of(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")


def most_common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype that most numbers have: some models keep a few weights in float32."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += getattr(
            tensor, "ds_numel", tensor.numel()
        )  # ZeRO-3 leaves an empty tensor in its place
    return sizes.most_common(1)[0][0]


def has_masters(model: Any) -> bool:
    """Return whether a 16-bit model trains on float32 masters (DeepSpeed's); on any rank, no
    collective."""
    return bool(model.dtype != torch.float32) and any(
        hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
        for parameter in model.parameters()
    )


def weights_dtype(model: torch.nn.Module) -> str:
    """Return the dtype of the weights that a forward pass reads and training changes, or of all if
    none is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return name_of(most_common_dtype(trained or model.parameters()))


class PrecisionCallback(TrainerCallback):
    """Compares the dtype that training really uses with `--dtype`, before the first step.

    Raises:
        UserError: weights are trained in another dtype than was asked for.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.columns: dict[str, str] = {}
        """For the manifest: `weights_dtype` of what a forward pass reads, `trained_dtype` of what
        is updated."""

    def on_train_begin(
        self, _args: TrainingArguments, _state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Read the dtypes of the prepared model."""
        model = kwargs["model"]
        in_memory = name_of(most_common_dtype(model.parameters()))
        trained = "float32" if has_masters(model) else weights_dtype(model)
        if self.dtype not in (in_memory, trained):
            raise UserError(
                f"--dtype {self.dtype}: the weights are {in_memory} once they are prepared, and "
                f"trained in {trained}. "
                "Let --dtype, --bf16 and --fp16 agree with the DeepSpeed file and the launcher."
            )
        self.columns = {"weights_dtype": weights_dtype(model), "trained_dtype": trained}


_IN_LAYERS = (
    "LORA",
    "ADALORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "VERA",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
)
"""Types whose layers compute each token by itself, in the base model's own forward, so that
prefixes can be shared."""


def inner_model(model: Any) -> PreTrainedModel:
    """Return the causal LM inside an adapted model, with the adapter's layers in it; any other
    model as it is."""
    if isinstance(model, PeftMixedModel):
        model = model.base_model.model
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def adapter_type(model: Any) -> str | None:
    """Return the PEFT type of a model, in the letters of PEFT; `None` for a model without an
    adapter."""
    if isinstance(model, PeftMixedModel):
        return "MIXED"
    return str(model.active_peft_config.peft_type.value) if isinstance(model, PeftModel) else None


def num_virtual_tokens(model: Any) -> int:
    """Return the number of learned positions that stand before every prompt."""
    is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return int(model.active_peft_config.num_virtual_tokens) if is_prompt else 0


def score_adapted(
    scorer: FittingScorer, model: Any, items: Sequence[Continuation]
) -> Iterator[tuple[int, Score]]:
    """Score items as `scorer.score` does, through the adapter if the model has one.

    A LoRA and its like replace layers of the base model, whose own `forward` is then the adapted
    one. Other adapters act in `PeftModel.forward` alone: learned prompts and prefixes, activated
    LoRA, routers. They are scored there, one forward pass for each item.

    Raises:
        UserError: the adapter cannot score a text on its own (it needs a task id, for instance);
            its type is named.
    """
    if adapter_type(model) is None or _is_in_layers(model):
        yield from scorer.score(inner_model(model), items)
        return
    try:
        yield from _score_whole(model, items, scorer.with_columns)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError) as error:
        raise UserError(
            f"a model with the adapter {adapter_type(model)} cannot be scored: its forward pass "
            "failed "
            f"({type(error).__name__}: {error}). Train without the probe, or use another adapter."
        ) from error


def _is_in_layers(model: Any) -> bool:
    if isinstance(model, PeftMixedModel) or len(model.active_adapters) != 1:
        return False
    config = model.active_peft_config
    # an activated LoRA acts from its invocation tokens on, and Arrow routes between adapters
    acts_outside = any(
        getattr(config, name, None) is not None
        for name in ("alora_invocation_tokens", "arrow_config")
    )
    return config.peft_type.value in _IN_LAYERS and not acts_outside


def _score_whole(
    model: Any, items: Sequence[Continuation], with_columns: bool
) -> Iterator[tuple[int, Score]]:
    """Yield the score of each item from a forward pass of its own through the whole adapted
    model."""
    with torch.no_grad():
        for index, item in enumerate(items):
            input_ids = torch.tensor([item.input_ids], device=model.device)
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[0]
            targets = np.array(item.target_ids)
            rows = logits[-len(targets) :]  # virtual tokens stand before the prompt
            found = read_targets(
                [rows], np.arange(len(targets)), targets, with_columns=with_columns
            )
            yield index, Score.of(found, 0, item)


_JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Noise in the routers of experts, as modules name it; PhiMoE's `router_jitter_noise` is none, but
a threshold."""


def model_version(name: str) -> str | None:
    """Return a hash of the config and weights of a local model; of a hub model the commit. Raises
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


def load_trained_model(arguments: "SftArguments") -> Any:
    """Return the model to train, in train mode, without dropout, with its LoRA where one is asked
    for."""
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
