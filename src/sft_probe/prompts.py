"""The one renderer and the one join rule of training, live probe and sweep.

A prompt is rendered to `(text, separator)`: the text never ends in white space; the separator
stands between prompt and response. By the ordinary rule token ids are those of lm-eval's
`_encode_pair(prompt, separator + response)`: the joint text is encoded, and what follows the ids of
the prompt alone is the continuation. Where a token spans that join, in one item or more, the rule
of the whole run is `in_use`: the context is prompt and separator, as a model is given them.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft_probe.errors import UserError, unknown
from sft_probe.probe_set import Doc, ProbeSet
from sft_probe.templates import ChatTemplate, Messages, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HH_ROLES = {"user": "Human", "assistant": "Assistant"}
BUILT_IN_FORMATS = ("hh", "chat", "plain")
_SPEC = re.compile(
    r"(?P<base>.+?)(?:@(?P<time>\d{4}-\d\d-\d\d(?:T\d\d:\d\d:\d\d)?))?(?P<full>\+full_render)?(?P<rule>\+prefix|\+in_use)?"
)


class Prompt(NamedTuple):
    """A rendered prompt: `text` ends in no white space, `separator` comes between it and the
    response."""

    text: str
    separator: str

    def context(self, *, in_use: bool) -> str:
        """Return what the join rule takes as the context: only by the rule `+in_use` does the
        separator belong to it."""
        return self.text + self.separator if in_use else self.text


class PromptFormat:
    """`hh`, `chat` (the tokenizer's own template), `plain`, or the path of a Jinja file that is
    given `messages`.

    What `resolve_format` has chosen follows the name: `@` and the time that a chat template reads,
    `+full_render` where the prompt is what stands before an answer in a full rendering instead of
    the generation prompt, and the join rule, `+prefix` or `+in_use`.

    Raises:
        UserError: the name is no format and no file, or `chat` is asked of a tokenizer without a
            template.
    """

    def __init__(self, spec: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        base, time, full, rule = _parse(spec)
        self._base = base
        self.in_use = rule == "+in_use"
        self.full_render = bool(full)
        self.chat: ChatTemplate | None = None
        self._template: Any = None
        name = base
        if base == "chat":
            if tokenizer is None or not tokenizer.chat_template:
                raise UserError(
                    "the prompt format `chat` needs a tokenizer with a chat template; use hh or "
                    "plain."
                )
            self.chat = ChatTemplate(tokenizer, _time(time))
        elif time or full:
            raise UserError(
                f"{spec!r} is no prompt format: only chat takes a time or +full_render."
            )
        elif base not in BUILT_IN_FORMATS:
            path = Path(base).expanduser()
            self._template = _read_template(path)
            name = f"jinja:{path.name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        chosen = (f"@{time}" if time else "") + full
        self.name = name + chosen + (rule if self.in_use else "")
        """As it stands in rows and manifests; nothing stands there for the ordinary rule."""
        self.source = base + chosen + (rule or "+prefix")
        """What gives this very format again."""

    def render(self, messages: Messages) -> Prompt:
        """Render chat turns. Raises `UserError` where the format has no place for a turn."""
        if self.chat is not None:
            text = (
                self.chat.answer_prompt(messages)
                if self.full_render
                else self.chat.generation_prompt(messages)
            )
        elif self._template is not None:
            try:
                text = str(self._template.render(messages=list(messages)))
            except Exception as error:  # as in a chat template
                raise refusal(self.name, messages, error) from error
        elif self._base == "hh":
            return Prompt(_render_hh(messages), " ")
        else:
            return Prompt("\n\n".join(turn["content"].strip() for turn in messages), "\n\n")
        stripped = text.rstrip()
        return Prompt(stripped, text[len(stripped) :])


def check_format(spec: str, where: str) -> None:
    """Raise `UserError` where a format does not exist; what needs a tokenizer is not looked at.

    Args:
        spec: as for `PromptFormat`.
        where: the option or the probe set that names it, for the message.
    """
    if _parse(spec)[0] == "chat":
        return
    try:
        PromptFormat(spec)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def resolve_format(
    given: str,
    tokenizer: "PreTrainedTokenizerBase",
    docs: Sequence[Doc],
    recorded: str | None = None,
) -> PromptFormat:
    """Return the format with all that is chosen once for a whole run, by a test on all docs and
    responses; see `PromptFormat`.

    Args:
        given: what the user or the probe set names; what it leaves open is chosen.
        tokenizer: of the model.
        docs: all that the run will train on or score.
        recorded: the name or source of the format that the run has used so far; nothing is chosen
            again.

    Raises:
        UserError: the format is unusable, the tokenizer puts something other than EOS after a text,
            or the template reads a clock and what is recorded names no time.
    """
    _check_suffix(tokenizer)
    spec = _recorded_spec(given, recorded) or given
    base, time, full, rule = _parse(spec)
    found = PromptFormat(spec, tokenizer)
    if rule and (found.chat is None or time):
        return found
    prompts = [(doc, prompt) for doc in docs if (prompt := _render_or_none(found, doc)) is not None]
    if found.chat is not None:
        pinned = time or found.chat.pinned_time()
        if rule and pinned:
            raise UserError(
                f"the chat template shows the time, and the format {recorded or given!r} does not "
                "say which. Name the "
                "day that the run was trained on: --prompt_format chat@YYYY-MM-DD"
            )
        opened = not rule and any(
            found.chat.answer_prompt(doc.messages) != "".join(prompt) for doc, prompt in prompts
        )
        spec = (
            base + (f"@{pinned}" if pinned else "") + (full or ("+full_render" if opened else ""))
        )
        found = PromptFormat(spec, tokenizer)
        prompts = [(doc, found.render(doc.messages)) for doc, _ in prompts]
    is_split = all(_splits(tokenizer, prompt, doc) for doc, prompt in prompts)
    return PromptFormat(spec + (rule or ("+prefix" if is_split else "+in_use")), tokenizer)


def same_format(recorded: str, name: str) -> bool:
    """Return whether two names mean one format: they are equal, or the recorded one is older than
    the record of a template's clock."""
    old, new = _parse(recorded), _parse(name)
    return recorded == name or (not old[1] and (old[0], *old[2:]) == (new[0], *new[2:]))


def joins_in_use(name: str) -> bool:
    """Return whether the join rule in a format's name is `+in_use`."""
    return _parse(name)[3] == "+in_use"


def _parse(spec: str) -> tuple[str, str, str, str]:
    """Split a format's name into base, time, `+full_render` and join rule; what it leaves open is
    empty."""
    match = _SPEC.fullmatch(spec)
    base, time, full, rule = match.groups(default="") if match else (spec, "", "", "")
    return base, time, full, rule


def _recorded_spec(given: str, recorded: str | None) -> str | None:
    """Return what was recorded, as a full name, where what is given does not contradict it; else
    `None`.

    A recorded format without a rule is of the ordinary one; a time that is given fills in one that
    was not recorded.
    """
    old, new = _parse(recorded or ""), _parse(given)
    old = (*old[:3], old[3] or "+prefix")
    if (
        old[0] != new[0]
        or (old[1] and new[1] not in ("", old[1]))
        or any(part not in ("", known) for part, known in zip(new[2:], old[2:], strict=True))
    ):
        return None
    time = old[1] or new[1]
    return old[0] + (f"@{time}" if time else "") + old[2] + old[3]


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text) if text else datetime.now().replace(microsecond=0)
    except ValueError as error:
        raise UserError(f"the prompt format chat@{text} names no time ({error}).") from error


def _render_or_none(prompt_format: PromptFormat, doc: Doc) -> Prompt | None:
    try:
        return prompt_format.render(doc.messages)
    except UserError:
        return None


def _splits(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, doc: Doc) -> bool:
    """Return whether the prompt's ids are a prefix of the joint ids with every response."""
    ids = encode(tokenizer, prompt.text)
    joint = (encode(tokenizer, "".join(prompt) + response) for response in doc.responses.values())
    return all(found[: len(ids)] == ids for found in joint)


def _check_suffix(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `UserError` where the tokenizer puts something after every text that is not EOS."""
    ids, plain = encode(tokenizer, "a"), list(tokenizer.encode("a", add_special_tokens=False))
    if ids[len(ids) - len(plain) :] != plain:
        after = tokenizer.decode(ids[-1:])
        raise UserError(
            f"the tokenizer puts {after!r} after every text, which is not its EOS token "
            f"({tokenizer.eos_token!r}), so "
            "that no response can follow a prompt. Change its post-processor."
        )


def terminator_id(format_name: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that ends a response: the token with which the chat template ends an answer,
    else EOS.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so no terminator can be trained or scored."
        )
    if _parse(format_name)[0] == "chat":
        end = ChatTemplate(tokenizer, _time("")).answer_end()
        ids = [
            i
            for i in tokenizer.encode(end, add_special_tokens=False)
            if str(tokenizer.decode([i])).strip()
        ]
        # whatever its registration: an added token, or a text that is one token of the vocabulary
        if ids and (len(ids) == 1 or ids[0] in tokenizer.get_added_vocab().values()):
            return int(ids[0])
    return int(tokenizer.eos_token_id)


def _read_template(path: Path) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not path.is_file():
        use = f"Use {', '.join(BUILT_IN_FORMATS)} or the path of a Jinja file."
        raise unknown("prompt format", str(path), BUILT_IN_FORMATS, use=use)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a Jinja template in UTF-8 ({error}).") from error
    if "add_generation_prompt" in text:
        raise UserError(
            f"{path} is a chat template (it reads `add_generation_prompt`), not a prompt format. "
            "Save it as chat_template.jinja beside the tokenizer and use the prompt format chat."
        )
    try:
        # S701: prompts are plain text for a model, not HTML
        return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(text)
    except TemplateError as error:
        raise UserError(f"{path}: not a valid Jinja template ({error}).") from error


def _render_hh(messages: Messages) -> str:
    parts = []
    for turn in messages:
        if turn["role"] not in _HH_ROLES:
            raise UserError(
                f"the prompt format hh has no {turn['role']} turn; use chat, plain or a Jinja file."
            )
        parts.append(f"\n\n{_HH_ROLES[turn['role']]}: {turn['content'].strip()}")
    return "".join(parts) + "\n\nAssistant:"


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the token ids of a text under the BOS rule of lm-eval's `hf`: the tokenizer's own, but
    no second BOS, and no EOS at the end."""
    prefix_id = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if prefix_id is not None and text.startswith(str(tokenizer.decode([prefix_id]))):
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids = list(tokenizer.encode(text))
    ends_in_eos = ids[-1:] == [tokenizer.eos_token_id]
    if ids and tokenizer.num_special_tokens_to_add() and (ends_in_eos or ids.count(ids[0]) > 1):
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        if plain[:1] == ids[:1]:  # the text begins with what the tokenizer would put before it
            return plain
        return ids[:-1] if ends_in_eos and ids[len(ids) - len(plain) :] != plain else ids
    return ids


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, response: str, *, in_use: bool = False
) -> tuple[list[int], list[int]] | None:
    """Return the ids of the context, and those of the continuation that is trained on and scored.

    Returns `None` where the ordinary rule finds no split, since the prompt's ids are not a prefix
    of the joint ids, and where no id is left on one side.
    """
    context = encode(tokenizer, prompt.context(in_use=in_use))
    joint = encode(tokenizer, "".join(prompt) + response)
    if joint[: len(context)] == context:
        continuation = joint[len(context) :]
    else:
        continuation = encode_after(tokenizer, response) if in_use else []
    return (context, continuation) if context and continuation else None


def no_pair_reason(in_use: bool) -> str:
    """Say why `encode_pair` has found no pair."""
    if in_use:
        return "no token is left of the prompt or of the response"
    return (
        "the tokens of the prompt are not a prefix of those of prompt and response, which the "
        "run's rule asks for"
    )


def encode_after(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a text that follows another: without the space that SentencePiece puts
    before a text."""
    line_end = list(tokenizer.encode("\n", add_special_tokens=False))
    ids = list(tokenizer.encode("\n" + text, add_special_tokens=False))
    is_split = ids[: len(line_end)] == line_end
    return (
        ids[len(line_end) :] if is_split else list(tokenizer.encode(text, add_special_tokens=False))
    )


def first_visible(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> int:
    """Return the index of the first token that holds a character other than white space."""
    return next(
        (i for i, token_id in enumerate(ids) if str(tokenizer.decode([token_id])).strip()), 0
    )


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
    probe_set: ProbeSet,
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> tuple[list[EncodedDoc], list[DroppedDoc]]:
    """Encode every doc; one that the format refuses, or with one response that does not fit, is
    dropped and named.

    `max_length` is in tokens and counts prompt, response and terminator.
    """
    encoded = [encode_doc(doc, prompt_format, tokenizer, max_length) for doc in probe_set.docs]
    kept = [item for item in encoded if isinstance(item, EncodedDoc)]
    return kept, dropped_by_faults(probe_set) + [
        item for item in encoded if isinstance(item, DroppedDoc)
    ]


def dropped_by_faults(probe_set: ProbeSet) -> list[DroppedDoc]:
    """Return the docs that were left out when the set was read."""
    return [DroppedDoc(doc_id=fault.doc_id or "?", reason=str(fault)) for fault in probe_set.faults]


def refused_docs(prompt_format: PromptFormat, docs: Sequence[Doc]) -> list[DroppedDoc]:
    """Return the docs whose turns the format cannot render, with the template's own words."""
    refused = []
    for doc in docs:
        try:
            prompt_format.render(doc.messages)
        except UserError as error:
            refused.append(DroppedDoc(doc_id=doc.doc_id, reason=str(error)))
    return refused


def encode_doc(
    doc: Doc, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> EncodedDoc | DroppedDoc:
    """Encode one doc, or say why it cannot be scored. `max_length` as in `encode_probe_set`."""
    try:
        prompt = prompt_format.render(doc.messages)
    except UserError as error:
        return DroppedDoc(doc_id=doc.doc_id, reason=str(error))
    prompt_ids: list[int] = []
    continuation_ids = {}
    for category, response in doc.responses.items():
        pair = encode_pair(tokenizer, prompt, response, in_use=prompt_format.in_use)
        if pair is None:
            return DroppedDoc(
                doc_id=doc.doc_id, reason=f"`{category}`: {no_pair_reason(prompt_format.in_use)}"
            )
        prompt_ids, continuation_ids[category] = pair
        num_tokens = len(prompt_ids) + len(continuation_ids[category]) + 1
        if num_tokens > max_length:
            reason = (
                f"`{category}`: {num_tokens} tokens with prompt and terminator, over max_length "
                f"{max_length}"
            )
            return DroppedDoc(doc_id=doc.doc_id, reason=reason)
    return EncodedDoc(
        doc=doc, prompt=prompt, prompt_ids=prompt_ids, continuation_ids=continuation_ids
    )
