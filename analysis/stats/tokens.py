"""Which text each scored token of a response stands for, where the run's tokenizer is at hand."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from sft_probe.analysis.stats.runs import Recording
from sft_probe.errors import UserError
from sft_probe.models import EMBEDDED_MODEL, load_tokenizer
from sft_probe.prompts import PromptFormat, encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(recording: Recording, doc_id: str, category: str) -> list[str]:
    """Return the texts of the scored tokens; empty where tokenizer, doc or format are not here."""
    try:
        tokenizer, ids = _scored_ids(recording, doc_id, category)
    except UserError:
        return []
    return [str(tokenizer.decode([token_id])) for token_id in ids]


def token_ends(recording: Recording, doc_id: str, category: str) -> list[int]:
    """Return where each scored token ends, in characters of the response.

    What stands before the response, its separator, ends at 0. A token that ends within a
    character ends before it.

    Raises:
        UserError: the tokenizer, the doc or its format are not here.
    """
    tokenizer, ids = _scored_ids(recording, doc_id, category)
    response = recording.texts[doc_id][category]
    whole = str(tokenizer.decode(ids))
    before = len(whole) - len(response) if whole.endswith(response) else 0
    ends: list[int] = []
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count])).rstrip("\ufffd")
        ends.append(min(max(len(text) - before, ends[-1] if ends else 0), len(response)))
    return ends


def _scored_ids(
    recording: Recording, doc_id: str, category: str
) -> "tuple[PreTrainedTokenizerBase, list[int]]":
    if recording.probe_set is None or not recording.manifest:
        raise UserError(f"{recording.name}: its probe set or manifest is not here.")
    doc = next((doc for doc in recording.probe_set.docs if doc.doc_id == doc_id), None)
    if doc is None or category not in doc.responses:
        raise UserError(f"{recording.name}: the probe set has no {category} of {doc_id}.")
    prompt_format, tokenizer = _format_of(
        recording.path,
        str(recording.manifest.get("prompt_format_source", recording.probe_set.prompt_format)),
        str(recording.manifest.get("model")),
    )
    prompt = prompt_format.render(doc.messages)
    pair = encode_pair(tokenizer, prompt, doc.responses[category], in_use=prompt_format.in_use)
    return tokenizer, list(pair[1]) if pair else []


@functools.lru_cache(maxsize=8)
def _format_of(
    directory: Path, format_name: str, model: str
) -> "tuple[PromptFormat, PreTrainedTokenizerBase]":
    """Return the prompt format and tokenizer of a run; nothing is fetched.

    Raises:
        UserError: no tokenizer lies in the run.
    """
    folders = [
        path.parent for path in sorted(directory.glob("weights/step_*/tokenizer_config.json"))
    ]
    if not folders and model != EMBEDDED_MODEL and not Path(model).is_dir():
        raise UserError(f"{directory} holds no tokenizer.")
    tokenizer = load_tokenizer(str(folders[0]) if folders else model)
    return PromptFormat(format_name, tokenizer), tokenizer
