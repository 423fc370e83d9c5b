"""The text of each token of a response, for where the run's tokenizer is at hand."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from sft_probe.analysis.stats.runs import Recording
from sft_probe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft_probe.prompts import PromptFormat


def token_texts(recording: Recording, doc_id: str, category: str) -> list[str]:
    """Texts of the tokens that were scored; empty where the tokenizer, the doc or its format is not
    here."""
    if recording.probe_set is None or not recording.manifest:
        return []
    doc = next((doc for doc in recording.probe_set.docs if doc.doc_id == doc_id), None)
    if doc is None or category not in doc.responses:
        return []
    try:
        prompt_format, tokenizer = _format_of(
            recording.path,
            str(recording.manifest.get("prompt_format_source", recording.probe_set.prompt_format)),
            str(recording.manifest.get("model")),
        )
    except UserError:
        return []
    from sft_probe.prompts import encode_pair

    prompt = prompt_format.render(doc.messages)
    pair = encode_pair(tokenizer, prompt, doc.responses[category], in_use=prompt_format.in_use)
    return [str(tokenizer.decode([token_id])) for token_id in pair[1]] if pair else []


@functools.lru_cache(maxsize=8)
def _format_of(
    directory: Path, format_name: str, model: str
) -> "tuple[PromptFormat, PreTrainedTokenizerBase]":
    """Raises `UserError` where no tokenizer lies in the run; nothing is fetched."""
    from sft_probe.models import EMBEDDED_MODEL, load_tokenizer
    from sft_probe.prompts import PromptFormat

    folders = [
        path.parent for path in sorted(directory.glob("weights/step_*/tokenizer_config.json"))
    ]
    if not folders and model != EMBEDDED_MODEL and not Path(model).is_dir():
        raise UserError(f"{directory} holds no tokenizer.")
    tokenizer = load_tokenizer(str(folders[0]) if folders else model)
    return PromptFormat(format_name, tokenizer), tokenizer
