"""HH transcripts and other preference rows: from a row as published to turns and two responses.

In an HH transcript the prompt is everything up to the last `\\n\\nAssistant:` that both sides
share.
"""

import itertools
import os
import re
from dataclasses import dataclass
from typing import Any

from sft_probe.probe_set import LONE_SURROGATE, is_unicode

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LOOSE_TURN = re.compile(r"\s*\n[ \t]*(?=(?:Human|Assistant):)")
_TRANSCRIPT = re.compile(r"\s*Human:|\s*Assistant:[\s\S]*\n\s*Human:")
_LABEL = re.compile(r"\s*Assistant:")
_ASSISTANT = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "missing or null",
    list: "a list",
}
Messages = list[dict[str, str]]


class RowRejectedError(Exception):
    """A row that cannot become a doc; the message is the reason, the same words for the same
    fault."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt with the response that was preferred and the one that was not, all stripped."""

    messages: Messages
    """Ends with the user's turn."""
    chosen: str
    rejected: str


def parse_row(row: dict[str, Any]) -> Pair:
    """Turns and responses of a row with `chosen`, `rejected` and, but for transcripts and messages,
    `prompt`.

    Both sides are HH transcripts, or responses to `prompt` (plain text, an HH transcript or
    messages), or lists of messages `{"role", "content"}` that end with the assistant's.

    Raises:
        RowRejectedError: there is no pair in the row.
    """
    if missing := [f"`{name}`" for name in ("chosen", "rejected") if name not in row]:
        raise RowRejectedError(
            "`chosen` and `rejected` must both be text, or both lists of messages; missing: "
            f"{', '.join(missing)}. The "
            f"columns are {column_names(row)}. Other columns: `sft-probe probe-set --from-csv FILE "
            "--prompt COLUMN --category NAME=COLUMN`"
        )
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_messages(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        kinds = " and ".join(
            f"`{name}` is {kind_of(row[name])}"
            for name in ("chosen", "rejected")
            if not isinstance(row[name], str)
        )
        raise RowRejectedError(
            f"`chosen` and `rejected` must both be text, or both lists of messages; {kinds}"
        )
    if not chosen.strip() or not rejected.strip():
        raise RowRejectedError("an empty response")
    if _TRANSCRIPT.match(chosen) and _TRANSCRIPT.match(rejected):
        return _from_transcripts(_normalise(chosen), _normalise(rejected))
    if prompt is None:
        raise RowRejectedError(
            "no `prompt`, and the sides are no HH transcripts (`\\n\\nHuman: ... \\n\\nAssistant: "
            "...`)"
        )
    return _pair(parse_turns(prompt), clean_response(chosen), clean_response(rejected))


def parse_messages(messages: Any) -> tuple[Messages, str]:
    """The turns before the assistant's last one, and what it says. Raises `RowRejectedError` where
    there is none."""
    if not isinstance(messages, list):
        raise RowRejectedError(f"`messages` is {kind_of(messages)}, not a list of messages")
    turns = _checked(messages)
    if turns[-1]["role"] != "assistant":
        raise RowRejectedError("the last message is not the assistant's")
    check_texts(turns[:-1], [turns[-1]["content"]])
    return turns[:-1], turns[-1]["content"]


def column_names(row: dict[str, Any]) -> str:
    """The names of a row's columns, the first twenty, as text that can be written to any file."""
    return ", ".join(list(row)[:20]).encode("utf-8", "replace").decode() or "none"


def kind_of(value: Any) -> str:
    """What a value is that should be text, in words."""
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def parse_turns(prompt: Any) -> Messages:
    """Chat turns of a prompt in any form: a text, an HH transcript, or messages. Raises
    `RowRejectedError`."""
    if isinstance(prompt, list):
        return _checked(prompt)
    if not isinstance(prompt, str):
        raise RowRejectedError(f"the prompt is {kind_of(prompt)}, not text or messages")
    if not prompt.strip():
        raise RowRejectedError("an empty prompt")
    return parse_prompt(prompt)


def parse_prompt(prompt: str) -> Messages:
    """Chat turns of an HH prompt, or one user turn of any other text; empty where the last turn is
    not a user's."""
    body = prompt.rstrip()
    transcript = _normalise(body) if _TRANSCRIPT.match(body) else _unix(body)
    turns = _turns(transcript.removesuffix(_ASSISTANT)) or [
        {"role": "user", "content": _unix(body).strip()}
    ]
    return turns if turns[-1]["role"] == "user" and turns[-1]["content"] else []


def check_texts(messages: Messages, responses: list[str]) -> None:
    """Raises `RowRejectedError` where the turns and responses of a doc cannot be told apart, or are
    no text.

    A label that is left inside a text means that the row was cut in another way than it was
    written, and a model that is trained in the format `hh` would read it as a turn.
    """
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RowRejectedError("the prompt does not end with a user's turn that says something")
    if not all(response.strip() for response in responses):
        raise RowRejectedError("an empty response")
    for turn in messages:
        content = turn["content"].strip()
        if turn["role"] == "user" and (
            content.startswith("Human:") or content.endswith("Assistant:")
        ):
            raise RowRejectedError(
                "a user's turn still starts with `Human:` or ends with `Assistant:`"
            )
    contents = [turn["content"] for turn in messages]
    if any(_TURN.search(text) for text in (*contents, *responses)):
        raise RowRejectedError(
            "more turns follow inside a text (a blank line and `Human:` or `Assistant:`)"
        )
    if not is_unicode([*contents, *responses]):
        raise RowRejectedError(LONE_SURROGATE)


def clean_response(text: str) -> str:
    """The text of a response column: Unix line ends, no white space around it, no label
    `Assistant:` before it."""
    return _LABEL.sub("", _unix(text), count=1).strip()


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def _turns(transcript: str) -> Messages:
    """Turns of an HH transcript; empty where the text is none."""
    parts = _TURN.split(transcript)
    if len(parts) < 3 or parts[0].strip():
        return []
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _normalise(transcript: str) -> str:
    """Unix line ends, and a blank line before each turn, which some copies have stripped or made a
    line end.

    A label after a single line end is a turn only where the labels after blank lines do not take
    turns by themselves: else it is a part of what is said.
    """
    text = "\n\n" + _unix(transcript).lstrip()
    loose = _LOOSE_TURN.sub("\n\n", text)
    return loose if not _takes_turns(text) and _takes_turns(loose) else text


def _takes_turns(transcript: str) -> bool:
    labels = _TURN.findall(transcript)
    return len(labels) > 1 and all(one != other for one, other in itertools.pairwise(labels))


def _from_transcripts(chosen: str, rejected: str) -> Pair:
    end = os.path.commonprefix([chosen, rejected]).rfind(_ASSISTANT)  # noqa: RUF071 - characters are meant
    if end < 0:
        raise RowRejectedError("the sides share no prompt up to a `\\n\\nAssistant:`")
    answers = [side[end + len(_ASSISTANT) :] for side in (chosen, rejected)]
    if any(_TURN.search(answer) for answer in answers):
        raise RowRejectedError(
            "the sides part before the last turn: more turns follow in one of them"
        )
    return _pair(_turns(chosen[:end]), *answers)


def _from_messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Pair:
    sides = [_checked(chosen), _checked(rejected)]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise RowRejectedError("the last message of a side is not the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise RowRejectedError("the sides share no prompt: their earlier messages differ")
    messages = sides[0][:-1]
    if isinstance(prompt, list):
        before = _checked(prompt)
        # what the sides repeat of the prompt: all of it, its last turns, or nothing
        overlap = next(
            n for n in range(len(before), -1, -1) if before[len(before) - n :] == messages[:n]
        )
        messages = before[: len(before) - overlap] + messages
    elif not messages and isinstance(prompt, str) and prompt.strip():
        messages = parse_prompt(prompt)
    return _pair(messages, sides[0][-1]["content"], sides[1][-1]["content"])


def _checked(messages: list[Any]) -> Messages:
    """Role and content of each message; all else that it may hold (ids, names, scores) is no part
    of the prompt."""
    turns = [
        {"role": turn.get("role"), "content": _content(turn.get("content"))}
        for turn in messages
        if isinstance(turn, dict)
    ]
    is_valid = len(turns) == len(messages) > 0 and all(
        turn["role"] in ("system", "user", "assistant") and turn["content"] is not None
        for turn in turns
    )
    if not is_valid:
        raise RowRejectedError('not a list of messages {"role", "content"}')
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]


def _content(content: Any) -> str | None:
    """The text of a message: a string, or a list of text parts one after the other, as chat
    templates render them."""
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return _unix("".join(texts)).strip() if len(texts) == len(parts) else None
    return _unix(content).strip() if isinstance(content, str) else None


def _pair(messages: Messages, chosen: str, rejected: str) -> Pair:
    pair = Pair(messages=messages, chosen=_unix(chosen).strip(), rejected=_unix(rejected).strip())
    check_texts(messages, [pair.chosen, pair.rejected])
    if pair.chosen == pair.rejected:
        raise RowRejectedError("both responses are the same")
    return pair
