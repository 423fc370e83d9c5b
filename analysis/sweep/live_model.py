"""One model in memory after another, each of them exactly what its checkpoint holds."""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_probe.adapters import load_adapter
from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.errors import UserError
from sft_probe.files import sha256_file
from sft_probe.models import load_config, load_model, load_tokenizer, local_folder
from sft_probe.prompts import PromptFormat, encode_probe_set, terminator_id
from sft_probe.weights import ADAPTER_CONFIG, base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sft_probe.analysis.sweep.settings import SweepSettings

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.*", "tokenizer_config.json", "vocab.*", "*.model", "tekken.json")
_MORE_TOKENIZER_FILES = (
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)

# what a config says that changes no log-prob
_IDLE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def model_config(name: str, revision: str) -> dict[str, Any]:
    """Return everything in a model's config that may change a log-prob, as plain JSON values.

    Raises:
        UserError: there is no config, or it is none.
    """
    folder = local_folder(*base_of(local_folder(name, revision), revision))
    active: dict[str, Any] = active_part(
        json.loads(load_config(str(folder)).to_json_string(use_diff=False))
    )
    return active


def active_part(config: Any) -> Any:
    """Return what of a config may change a log-prob, at any depth. A value that is no object is
    returned as it is."""
    if not isinstance(config, dict):
        return config
    kept = {
        key for key in config if key not in _IDLE and "drop" not in key
    }  # training sets every dropout to 0
    return {key: active_part(config[key]) for key in config if key in kept}


class LiveModel:
    """Holds one checkpoint at a time, each loaded afresh by the library's own loader: nothing of
    another one stays.

    transformers maps files into memory, so that this takes as long as copying their tensors over
    the last ones would.

    Args:
        dtype: of the weights in memory.
        device: where they are.
        settings: those of the sweep; config and token ids of every checkpoint must be the same.
    """

    def __init__(self, dtype: str, device: str, settings: "SweepSettings") -> None:
        self.dtype = dtype
        self.device = device
        self.settings = settings
        self.model: PreTrainedModel | PeftModel | None = None
        self._same_ids: set[str] = set()

    def load(self, checkpoint: Checkpoint, *, any_config: bool = False) -> Any:
        """Return the model with the weights of a checkpoint.

        Args:
            checkpoint: of the sweep, or one that is compared with those.
            any_config: it may be of another architecture.

        Raises:
            UserError: it is of another architecture than the others, its tokenizer gives other ids,
                or its weights do not fit.
        """
        folder = local_folder(checkpoint.model, checkpoint.revision)
        if not any_config:
            self._check_config(checkpoint, folder)
        self._check_tokenizer(checkpoint)
        self.model = None  # frees the memory before the next weights come
        if (folder / ADAPTER_CONFIG).exists():
            self.model = load_adapter(folder, self.dtype, self.device)
        else:
            self.model = load_model(str(folder), self.dtype).to(self.device)
        if (
            self.model.device.type == "cpu"
        ):  # still mapped: where training overwrites the file, a copy stays as it is
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.data = tensor.data.clone()
        return self.model

    def _check_config(self, checkpoint: Checkpoint, folder: Path) -> None:
        config, expected = (
            model_config(checkpoint.model, checkpoint.revision),
            self.settings.model_config,
        )
        differing = [
            f"{key} ({config.get(key)} here, {expected.get(key)} there)"
            for key in sorted(config.keys() | expected.keys())
            if config.get(key) != expected.get(key)
        ]
        if differing:
            raise UserError(
                f"{folder} is another model than the sweep's first: {'; '.join(differing[:5])}"
            )

    def _check_tokenizer(self, checkpoint: Checkpoint) -> None:
        """Encode the probe set as the checkpoint alone would: its ids must be those that are
        scored.

        A checkpoint without tokenizer files takes the ids as they are.
        """
        name, revision = tokenizer_of(checkpoint)
        folder = local_folder(name, revision)
        sha256 = _files_sha256(folder)
        if not _has_tokenizer(folder) or sha256 in self._same_ids:
            return
        settings = self.settings
        tokenizer = load_tokenizer(name, revision)
        docs, _ = encode_probe_set(
            settings.probe_set,
            PromptFormat(settings.prompt_format, tokenizer),
            tokenizer,
            settings.max_length,
        )
        found, expected = (
            {doc.doc.doc_id: (doc.prompt_ids, doc.continuation_ids) for doc in encoded}
            for encoded in (docs, settings.docs)
        )
        ends = [
            terminator_id(settings.format_name, item) for item in (tokenizer, settings.tokenizer)
        ]
        differing = sorted(
            key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
        )
        if differing or ends[0] != ends[1]:
            what = (
                f"{len(differing)} docs ({', '.join(differing[:3])}, ...)"
                if differing
                else "the terminator"
            )
            raise UserError(
                f"{folder} has another tokenizer than the sweep's first checkpoint: its token ids "
                f"differ for {what}. "
                "Sweep it into another directory."
            )
        if tokenizer.get_vocab() != settings.tokenizer.get_vocab():
            log.warning(
                "%s has another vocabulary than the first checkpoint, but gives the same ids for "
                "the probe set; benchmarks and generated texts use the first one's tokenizer",
                folder,
            )
        self._same_ids.add(sha256)


def tokenizer_of(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return name and revision of a checkpoint's tokenizer; the base's for an adapter that is
    stored without one."""
    folder = local_folder(checkpoint.model, checkpoint.revision)
    return (str(folder), "main") if _has_tokenizer(folder) else base_of(folder, checkpoint.revision)


def _has_tokenizer(folder: Path) -> bool:
    return any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))


def _files_sha256(folder: Path) -> str:
    """Return a hash over what a tokenizer is made from: its files, and the config that says how
    they are read."""
    patterns = (*_TOKENIZER_FILES, *_MORE_TOKENIZER_FILES, "config.json", ADAPTER_CONFIG)
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    hashes = [(path.name, sha256_file(path)) for path in paths]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
