"""HH transcripts and other preference rows: from a row as published to turns and two responses.

In an HH transcript the prompt is everything up to the last `\\n\\nAssistant:` that both sides share.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")
_ASSISTANT = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
Messages = list[dict[str, str]]


class RowRejectedError(Exception):
    """A row that cannot become a doc; the message is the reason, the same words for the same fault."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt with the response that was preferred and the one that was not, all stripped."""

    messages: Messages
    """Ends with the user's turn."""
    chosen: str
    rejected: str


def parse_row(row: dict[str, Any]) -> Pair:
    """Turns and responses of a row with `chosen`, `rejected` and, but for transcripts and messages, `prompt`.

    Both sides are HH transcripts, or responses to `prompt` (plain text, an HH transcript or messages), or lists of
    messages `{"role", "content"}` that end with the assistant's.

    Raises:
        RowRejectedError: there is no pair in the row.
    """
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_messages(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowRejectedError("`chosen` and `rejected` must both be text, or both lists of messages")
    if not chosen.strip() or not rejected.strip():
        raise RowRejectedError("an empty response")
    if _TRANSCRIPT.match(chosen) and _TRANSCRIPT.match(rejected):
        return _from_transcripts(_normalise(chosen), _normalise(rejected))
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowRejectedError("an empty prompt")
        return _pair(parse_prompt(prompt.replace("\r\n", "\n")), chosen, rejected)
    if isinstance(prompt, list):
        return _pair(_checked(prompt), chosen, rejected)
    raise RowRejectedError("no `prompt`, and the sides are no HH transcripts (`\\n\\nHuman: ... \\n\\nAssistant: ...`)")


def parse_prompt(prompt: str) -> Messages:
    """Chat turns of an HH prompt, or one user turn of any other text; empty where the last turn is not a user's."""
    body = prompt.rstrip()
    turns = _turns(body.removesuffix(_ASSISTANT)) or [{"role": "user", "content": body.strip()}]
    return turns if turns[-1]["role"] == "user" and turns[-1]["content"] else []


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
    """Unix line ends, and the two newlines before the first turn that some copies have stripped."""
    return "\n\n" + transcript.replace("\r\n", "\n").lstrip()


def _from_transcripts(chosen: str, rejected: str) -> Pair:
    end = os.path.commonprefix([chosen, rejected]).rfind(_ASSISTANT)  # noqa: RUF071 - characters are meant
    if end < 0:
        raise RowRejectedError("the sides share no prompt up to a `\\n\\nAssistant:`")
    answers = [side[end + len(_ASSISTANT) :] for side in (chosen, rejected)]
    if any(_TURN.search(answer) for answer in answers):
        raise RowRejectedError("the sides part before the last turn: more turns follow in one of them")
    return _pair(_turns(chosen[:end]), *answers)


def _from_messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Pair:
    sides = [_checked(chosen), _checked(rejected)]
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise RowRejectedError("the last message of a side is not the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise RowRejectedError("the sides share no prompt: their earlier messages differ")
    before = _checked(prompt) if isinstance(prompt, list) and prompt != chosen[: len(prompt)] else []
    messages = before + sides[0][:-1]
    if not messages and isinstance(prompt, str) and prompt.strip():
        messages = parse_prompt(prompt)
    return _pair(messages, sides[0][-1]["content"], sides[1][-1]["content"])


def _checked(messages: list[Any]) -> Messages:
    is_valid = bool(messages) and all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not is_valid:
        raise RowRejectedError('not a list of messages {"role", "content"}')
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _pair(messages: Messages, chosen: str, rejected: str) -> Pair:
    pair = Pair(messages=messages, chosen=chosen.strip(), rejected=rejected.strip())
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RowRejectedError("the prompt does not end with a user's turn that says something")
    if not pair.chosen or not pair.rejected:
        raise RowRejectedError("an empty response")
    if pair.chosen == pair.rejected:
        raise RowRejectedError("both responses are the same")
    try:
        "".join([pair.chosen, pair.rejected, *(turn["content"] for turn in messages)]).encode()
    except UnicodeEncodeError as error:
        raise RowRejectedError("half a surrogate pair, which is no Unicode text") from error
    return pair
