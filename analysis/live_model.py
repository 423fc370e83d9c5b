"""One model in memory; the weights of each checkpoint take the place of the last ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_probe.analysis.checkpoints import Checkpoint
from sft_probe.errors import UserError
from sft_probe.files import read_json, sha256_file
from sft_probe.models import load_model, load_tokenizer, resolve_model
from sft_probe.weights import ADAPTER_CONFIG, copy_adapter, copy_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# what a config says that changes no log-prob
_IDLE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip


def local_folder(name: str, revision: str) -> Path:
    """The directory of a model: as it is, of the embedded one, or of a hub revision, downloaded at need.

    Raises:
        UserError: there is no such model or revision.
    """
    path = Path(resolve_model(name))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"no directory and no model on the hub: {name!r} (revision {revision}).") from error


def base_of(folder: Path, revision: str) -> tuple[str, str]:
    """Name and revision of the whole model: the folder itself, or the base of the adapter that it holds."""
    if not (folder / ADAPTER_CONFIG).exists():
        return str(folder), revision
    adapter = read_json(folder / ADAPTER_CONFIG)
    return adapter["base_model_name_or_path"], adapter.get("revision") or "main"


def model_config(name: str, revision: str) -> dict[str, Any]:
    """Everything in a model's config that may change a log-prob, as plain JSON values.

    Raises:
        UserError: there is no config, or it is none.
    """
    from transformers import AutoConfig

    folder = local_folder(*base_of(local_folder(name, revision), revision))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no usable config.json: {str(error)[:200]}") from error
    active: dict[str, Any] = _without_idle(json.loads(config.to_json_string(use_diff=False)))
    return active


def _without_idle(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key for key in value if key not in _IDLE and "drop" not in key}  # training sets every dropout to 0
    return {key: _without_idle(value[key]) for key in value if key in kept}


class LiveModel:
    """Loads the first checkpoint in full and copies the others over it.

    Args:
        dtype: of the weights in memory.
        device: where they are.
        config: what `model_config` gives for every checkpoint that may be loaded.
        tokenizer: the one for all of them.
    """

    def __init__(self, dtype: str, device: str, config: dict[str, Any], tokenizer: Any) -> None:
        self.dtype = dtype
        self.device = device
        self.config = config
        self.vocabulary = tokenizer.get_vocab()
        self.tokenizer_sha256: str | None = None
        self.model: PreTrainedModel | PeftModel | None = None
        self.adapter: dict[str, Any] | None = None

    def load(self, checkpoint: Checkpoint) -> Any:
        """The model with the weights of a checkpoint.

        Raises:
            UserError: it is of another architecture or vocabulary than the others, or its weights do not fit.
        """
        folder = local_folder(checkpoint.model, checkpoint.revision)
        self._check(checkpoint, folder)
        if (folder / ADAPTER_CONFIG).exists():
            self._load_adapter(folder)
        elif self.model is None or self.adapter is not None or not copy_weights(self.model, folder):
            self.model, self.adapter = None, None  # frees the memory before the next weights come
            self.model = load_model(str(folder), self.dtype).to(self.device)
        return self.model

    def _check(self, checkpoint: Checkpoint, folder: Path) -> None:
        config = model_config(checkpoint.model, checkpoint.revision)
        differing = [
            f"{key} ({config.get(key)} here, {self.config.get(key)} there)"
            for key in sorted(config.keys() | self.config.keys())
            if config.get(key) != self.config.get(key)
        ]
        if differing:
            raise UserError(f"{folder} is another model than the sweep's first: {'; '.join(differing[:5])}")
        path = folder / "tokenizer.json"
        if not path.exists() or (sha256 := sha256_file(path)) == self.tokenizer_sha256:
            return
        if load_tokenizer(str(folder)).get_vocab() != self.vocabulary:
            raise UserError(f"{folder} has another vocabulary than the sweep's first checkpoint.")
        self.tokenizer_sha256 = sha256

    def _load_adapter(self, folder: Path) -> None:
        from peft import PeftConfig, get_peft_model

        adapter = read_json(folder / ADAPTER_CONFIG)
        if self.model is None or self.adapter != adapter:
            self.model, self.adapter = None, None
            config = PeftConfig.from_pretrained(str(folder))
            if config.is_prompt_learning:
                raise UserError(f"{folder}: adapters that learn a prompt cannot be scored.")
            config.inference_mode = True
            name, revision = base_of(folder, "main")
            base = load_model(str(local_folder(name, revision)), self.dtype)
            self.model = get_peft_model(base, config, autocast_adapter_dtype=False).to(self.device).eval()
            self.adapter = adapter
        copy_adapter(self.model, folder)
