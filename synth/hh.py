"""From one published preference row to chat turns and responses.

In an HH transcript the prompt is everything up to the last `\\n\\nAssistant:` that both sides
share.
"""

import itertools
import os
import re
from typing import Any, NamedTuple

from sft_probe.probe_set import LONE_SURROGATE, is_unicode

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LOOSE_TURN = re.compile(r"\s*\n[ \t]*(?=(?:Human|Assistant):)")
_TRANSCRIPT = re.compile(r"\s*Human:|\s*Assistant:[\s\S]*\n\s*Human:")
_LABEL = re.compile(r"\s*Assistant:")
_ASSISTANT = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
_NO_MESSAGES = 'not a list of messages {"role", "content"}'
Messages = list[dict[str, str]]


class RowRejectedError(Exception):
    """A row that cannot become a doc. The message is the reason, in the same words for the same
    fault."""


class Parsed(NamedTuple):
    """The contents of a row, stripped."""

    messages: Messages
    """Ends with the user's turn."""
    responses: dict[str, str]
    """Category to text."""


def parse_row(row: dict[str, Any]) -> Parsed:
    """Return the turns and both responses of a row with the columns `chosen` and `rejected`.

    Both columns hold HH transcripts, or responses to the column `prompt` (plain text, an HH
    transcript or messages), or lists of messages `{"role", "content"}` that end with the
    assistant's.

    Raises:
        RowRejectedError: the row holds no such pair.
    """
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _from_messages(prompt, chosen, rejected)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        names = ("chosen", "rejected")
        what = " and ".join(
            f"`{name}` is {kind_of(row[name])}"
            for name in names
            if name in row and not isinstance(row[name], str)
        )
        if missing := [f"`{name}`" for name in names if name not in row]:
            what = (
                f"missing: {', '.join(missing)}. The columns are {column_names(row)}. For other "
                "columns use `sft-probe probe-set --from-table FILE --prompt COLUMN --category "
                "NAME=COLUMN`"
            )
        raise RowRejectedError(
            f"`chosen` and `rejected` must both be text, or both lists of messages; {what}"
        )
    if not chosen.strip() or not rejected.strip():
        raise RowRejectedError("an empty response")
    if _TRANSCRIPT.match(chosen) and _TRANSCRIPT.match(rejected):
        return _from_transcripts(_normalise(chosen), _normalise(rejected))
    if prompt is None:
        form = r"`\n\nHuman: ... \n\nAssistant: ...`"
        raise RowRejectedError(f"no `prompt`, and the sides are not HH transcripts ({form})")
    return _parsed(parse_turns(prompt), clean_response(chosen), clean_response(rejected))


def parse_messages(messages: Any) -> tuple[Messages, str]:
    """Return the turns before the assistant's last message, and the text of that message.

    Raises:
        RowRejectedError: `messages` is not a conversation that ends with the assistant's message.
    """
    if not isinstance(messages, list):
        raise RowRejectedError(f"`messages` is {kind_of(messages)}, not a list of messages")
    turns, response = split_answer(messages)
    check_texts(turns, [response])
    return turns, response


def split_answer(messages: list[Any]) -> tuple[Messages, str]:
    """Return the turns before the last message, which is the assistant's, and its text."""
    turns = check_messages(messages)
    if turns[-1]["role"] != "assistant":
        raise RowRejectedError("the last message is not the assistant's")
    return turns[:-1], turns[-1]["content"]


def column_names(row: dict[str, Any]) -> str:
    """Return the names of a row's first twenty columns, as text that any file can hold."""
    return ", ".join(list(row)[:20]).encode("utf-8", "replace").decode() or "none"


def kind_of(value: Any) -> str:
    """Describe the type of a value that should be text."""
    if value is None:
        return "missing or null"
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def parse_turns(prompt: Any) -> Messages:
    """Return the chat turns of a prompt: plain text, an HH transcript or a list of messages.

    Raises:
        RowRejectedError: the prompt is empty or has another type.
    """
    if isinstance(prompt, list):
        return check_messages(prompt)
    if not isinstance(prompt, str):
        raise RowRejectedError(f"the prompt is {kind_of(prompt)}, not text or messages")
    if not prompt.strip():
        raise RowRejectedError("an empty prompt")
    return parse_prompt(prompt)


def parse_prompt(prompt: str) -> Messages:
    """Return the chat turns of an HH prompt, or one user turn with any other text.

    The result is empty where the last turn is not the user's.
    """
    body = prompt.rstrip()
    transcript = _normalise(body) if _TRANSCRIPT.match(body) else _unix(body)
    turns = _turns(transcript.removesuffix(_ASSISTANT)) or [
        {"role": "user", "content": _unix(body).strip()}
    ]
    return turns if turns[-1]["role"] == "user" and turns[-1]["content"] else []


def check_texts(messages: Messages, responses: list[str]) -> None:
    """Raise `RowRejectedError` where turns and responses cannot be told apart, or are not text.

    A label left inside a text means that the row was cut in the wrong place. A model trained in
    the format `hh` would read the label as a turn.
    """
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise RowRejectedError("the prompt does not end with a user's turn that says something")
    if not all(response.strip() for response in responses):
        raise RowRejectedError("an empty response")
    contents = [turn["content"] for turn in messages]
    asked = [turn["content"].strip() for turn in messages if turn["role"] == "user"]
    if any(text.startswith("Human:") or text.endswith("Assistant:") for text in asked):
        raise RowRejectedError("a user's turn still starts with `Human:` or ends with `Assistant:`")
    if any(_TURN.search(text) for text in (*contents, *responses)):
        raise RowRejectedError(
            "more turns follow inside a text (a blank line and `Human:` or `Assistant:`)"
        )
    if not is_unicode([*contents, *responses]):
        raise RowRejectedError(LONE_SURROGATE)


def clean_response(text: str) -> str:
    """Return a response with Unix line ends, without white space or `Assistant:` in front."""
    return _LABEL.sub("", _unix(text), count=1).strip()


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def _turns(transcript: str) -> Messages:
    """Return the turns of an HH transcript; none where the text is not a transcript."""
    parts = _TURN.split(transcript)
    if len(parts) < 3 or parts[0].strip():
        return []
    return [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _normalise(transcript: str) -> str:
    """Return a transcript with Unix line ends and the blank line before each turn that some copies
    lack.

    A label after a single line end starts a turn only where the labels after blank lines do not
    alternate by themselves. Otherwise it is part of the text.
    """
    text = "\n\n" + _unix(transcript).lstrip()
    loose = _LOOSE_TURN.sub("\n\n", text)
    return loose if not _alternates(text) and _alternates(loose) else text


def _alternates(transcript: str) -> bool:
    labels = _TURN.findall(transcript)
    return len(labels) > 1 and all(one != other for one, other in itertools.pairwise(labels))


def _from_transcripts(chosen: str, rejected: str) -> Parsed:
    end = os.path.commonprefix([chosen, rejected]).rfind(_ASSISTANT)  # noqa: RUF071 - characters are meant
    if end < 0:
        raise RowRejectedError("the sides share no prompt up to a `\\n\\nAssistant:`")
    answers = [side[end + len(_ASSISTANT) :] for side in (chosen, rejected)]
    if any(_TURN.search(answer) for answer in answers):
        raise RowRejectedError(
            "the sides part before the last turn: more turns follow in one of them"
        )
    return _parsed(_turns(chosen[:end]), *answers)


def _from_messages(prompt: Any, chosen: list[Any], rejected: list[Any]) -> Parsed:
    (messages, answer), (others, other_answer) = split_answer(chosen), split_answer(rejected)
    if messages != others:
        raise RowRejectedError("the sides share no prompt: their earlier messages differ")
    if isinstance(prompt, list):
        messages = join_turns(check_messages(prompt), messages)
    elif not messages and isinstance(prompt, str) and prompt.strip():
        messages = parse_prompt(prompt)
    return _parsed(messages, answer, other_answer)


def join_turns(before: Messages, after: Messages) -> Messages:
    """Join two runs of turns. What the second repeats of the end of the first is kept once."""
    overlap = next(n for n in range(len(before), -1, -1) if before[len(before) - n :] == after[:n])
    return before[: len(before) - overlap] + after


def check_messages(messages: list[Any]) -> Messages:
    """Return the role and content of each message, without ids, names or scores.

    Raises:
        RowRejectedError: an element is not a message with a known role and text.
    """
    turns = []
    for turn in messages:
        role = turn.get("role") if isinstance(turn, dict) else None
        content = _content(turn.get("content")) if isinstance(turn, dict) else None
        if role not in ("system", "user", "assistant") or content is None:
            raise RowRejectedError(_NO_MESSAGES)
        turns.append({"role": str(role), "content": content})
    if not turns:
        raise RowRejectedError(_NO_MESSAGES)
    return turns


def _content(content: Any) -> str | None:
    """Return the text of a message: a string, or text parts joined as chat templates join them."""
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    return _unix(content).strip() if isinstance(content, str) else None


def _parsed(messages: Messages, chosen: str, rejected: str) -> Parsed:
    responses = {"chosen": _unix(chosen).strip(), "rejected": _unix(rejected).strip()}
    check_texts(messages, list(responses.values()))
    if responses["chosen"] == responses["rejected"]:
        raise RowRejectedError("both responses are the same")
    return Parsed(messages, responses)
