"""The one renderer and the one join rule of training, live probe and sweep.

A prompt is rendered to `(text, separator)`: the text never ends in white space; the separator stands between prompt and
response and is trained on and scored with the response. Token ids are those of lm-eval's `_encode_pair(prompt,
separator + response)`: the joint text is encoded, and what follows the ids of the prompt alone is the continuation.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft_probe.errors import UserError
from sft_probe.records import Doc, ProbeSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HH_ROLES = {"user": "Human", "assistant": "Assistant"}
BUILT_IN_FORMATS = ("hh", "chat", "plain")


class Prompt(NamedTuple):
    """A rendered prompt: `text` ends in no white space, `separator` comes between it and the response."""

    text: str
    separator: str


class PromptFormat:
    """`hh`, `chat` (the tokenizer's own template), `plain`, or the path of a Jinja file that is given `messages`.

    Raises:
        UserError: the name is no format and no file, or `chat` is asked of a tokenizer without a template.
    """

    def __init__(self, name: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        self.name = name
        self.tokenizer: Any = tokenizer
        self._template: Any = None
        if name == "chat":
            if tokenizer is None or not tokenizer.chat_template:
                raise UserError("the prompt format `chat` needs a tokenizer with a chat template; use hh or plain.")
        elif name not in BUILT_IN_FORMATS:
            self._template = _read_template(name)
            self.name = f"jinja:{Path(name).name}@{hashlib.sha256(Path(name).read_bytes()).hexdigest()[:12]}"

    def render(self, messages: Sequence[dict[str, str]]) -> Prompt:
        """Renders chat turns. Raises `UserError` where the format has no place for a turn."""
        if self.name == "hh":
            return Prompt(_render_hh(messages), " ")
        if self.name == "plain":
            return Prompt("\n\n".join(turn["content"].strip() for turn in messages), "\n\n")
        try:
            if self._template is not None:
                text = str(self._template.render(messages=list(messages)))
            else:
                text = str(
                    self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
                )
        except Exception as error:  # templates raise what they like: for a system turn, for turns out of order
            roles = ", ".join(turn["role"] for turn in messages)
            raise UserError(
                f"the prompt format {self.name} refuses the turns {roles} ({error}); use hh, plain or a Jinja file."
            ) from error
        stripped = text.rstrip()
        return Prompt(stripped, text[len(stripped) :])


def terminator_id(format_name: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends a response: the special token that the chat template puts there, else EOS.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no terminator can be trained or scored.")
    if format_name == "chat":
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "RESPONSE"}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        ids = tokenizer.encode(text.rpartition("RESPONSE")[2].strip(), add_special_tokens=False)
        if ids and ids[0] in tokenizer.all_special_ids:
            return int(ids[0])
    return int(tokenizer.eos_token_id)


def _read_template(name: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no prompt format {name!r}: use {', '.join(BUILT_IN_FORMATS)} or the path of a Jinja file.")
    try:
        # S701: prompts are plain text for a model, not HTML
        return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(path.read_text("utf-8"))
    except TemplateError as error:
        raise UserError(f"{path}: not a valid Jinja template ({error}).") from error


def _render_hh(messages: Sequence[dict[str, str]]) -> str:
    parts = []
    for turn in messages:
        if turn["role"] not in _HH_ROLES:
            raise UserError(f"the prompt format hh has no {turn['role']} turn; use chat, plain or a Jinja file.")
        parts.append(f"\n\n{_HH_ROLES[turn['role']]}: {turn['content'].strip()}")
    return "".join(parts) + "\n\nAssistant:"


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids under the BOS rule of lm-eval's `hf`: the tokenizer's own, but never a second BOS."""
    prefix_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    has_bos = prefix_id is not None and text.startswith(str(tokenizer.decode([prefix_id])))
    return list(tokenizer.encode(text, add_special_tokens=False) if has_bos else tokenizer.encode(text))


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, continuation: str
) -> tuple[list[int], list[int]] | None:
    """Ids of a prompt without trailing white space and of what follows it.

    Returns `None` where the prompt's ids are not a prefix of the joint ids, so that no split between them exists, and
    where no id is left for the continuation.
    """
    prompt_ids = encode(tokenizer, prompt)
    joint_ids = encode(tokenizer, prompt + continuation)
    if joint_ids[: len(prompt_ids)] != prompt_ids or len(joint_ids) == len(prompt_ids) or not prompt_ids:
        return None
    return prompt_ids, joint_ids[len(prompt_ids) :]


def first_visible(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> int:
    """Index of the first token that holds a character other than white space."""
    return next(i for i, token_id in enumerate(ids) if str(tokenizer.decode([token_id])).strip())


@dataclass(frozen=True, kw_only=True)
class EncodedDoc:
    """A doc whose responses all fit: the prompt, and the ids of each category's continuation."""

    doc: Doc
    prompt: Prompt
    prompt_ids: list[int]
    continuation_ids: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class DroppedDoc:
    """A doc that is left out of all categories, and why."""

    doc_id: str
    reason: str


def encode_probe_set(
    probe_set: ProbeSet, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[list[EncodedDoc], list[DroppedDoc]]:
    """Encodes every doc; a doc with one response that does not fit is dropped from all categories.

    `max_length` is in tokens and counts prompt, response and terminator.
    """
    encoded = [encode_doc(doc, prompt_format, tokenizer, max_length) for doc in probe_set.docs]
    kept = [item for item in encoded if isinstance(item, EncodedDoc)]
    return kept, dropped_by_faults(probe_set) + [item for item in encoded if isinstance(item, DroppedDoc)]


def dropped_by_faults(probe_set: ProbeSet) -> list[DroppedDoc]:
    """The docs that were left out when the set was read."""
    return [DroppedDoc(doc_id=fault.doc_id or "?", reason=str(fault)) for fault in probe_set.faults]


def encode_doc(
    doc: Doc, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> EncodedDoc | DroppedDoc:
    """Encodes one doc, or says why it cannot be scored. `max_length` as in `encode_probe_set`."""
    prompt = prompt_format.render(doc.messages)
    prompt_ids: list[int] = []
    continuation_ids = {}
    for category, response in doc.responses.items():
        pair = encode_pair(tokenizer, prompt.text, prompt.separator + response)
        if pair is None:
            reason = f"`{category}`: the tokens of the prompt are not a prefix of those of prompt and response"
            return DroppedDoc(doc_id=doc.doc_id, reason=reason)
        prompt_ids, continuation_ids[category] = pair
        num_tokens = len(prompt_ids) + len(continuation_ids[category]) + 1
        if num_tokens > max_length:
            reason = f"`{category}`: {num_tokens} tokens with prompt and terminator, over max_length {max_length}"
            return DroppedDoc(doc_id=doc.doc_id, reason=reason)
    return EncodedDoc(doc=doc, prompt=prompt, prompt_ids=prompt_ids, continuation_ids=continuation_ids)
