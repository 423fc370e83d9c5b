"""What a server's reply means: an answer, a retry, or the end of the run."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, RetryLater, failed_answer, invalid_answer
from sft_probe.synth.writers.http import Connection, Reply

_RETRIED = (408, 409, 425, 429)
_HOPELESS = (401, 402, 403, 404, 405, 407, 451)
_HOPELESS_STATES = ("FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED")
_MAX_TOKENS = 1_000_000
_SUCCESS = Reply(200, {}, b"")
_SECONDS = r"\d{1,9}(?:\.\d{1,9})?"
_DAILY = re.compile(r"per[\s_-]?day|daily|insufficient_quota", re.IGNORECASE)
Read = Callable[[dict[str, Any], str], Answer]
"""Makes an answer of a JSON object and its text."""


def at(value: Any, *path: str | int) -> Any:
    """Return what stands at a path in JSON, None where the JSON has another shape."""
    try:
        for step in path:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value


def answer_of(
    raw: str,
    read: tuple[str, str | None, str | None],
    *,
    version: Any,
    tokens: tuple[int | None, int | None],
    thoughts: Any,
) -> Answer:
    """Return an answer, with a remark where thoughts left no room for its text.

    `read` is its status, text and reason, `tokens` the numbers for prompt and output; version and
    thoughts (their number of tokens) are as the server says them.
    """
    status, text, reason = read
    num_thoughts, num_output = token_count(thoughts) or 0, tokens[1]
    if status != "ok" and num_output and num_thoughts > num_output / 2:
        reason = f"{reason}: {num_thoughts} of {num_output} output tokens are thoughts"
    return Answer(
        status=status,
        raw=raw,
        text=text,
        reason=reason,
        model_version=version if isinstance(version, str) else None,
        num_prompt_tokens=tokens[0],
        num_output_tokens=num_output,
    )


def read_reply(connection: Connection, reply: Reply, read_value: Read) -> Answer:
    """Return the answer in a reply, every field without the key.

    Raises:
        RetryLater: the call failed and may be repeated.
        UserError: no call can succeed.
    """
    raw = connection.key.redact(reply.body.decode("utf-8", "replace"))
    value = reply.json()
    if not 200 <= reply.status < 300:
        return answer_for_http_error(connection, reply, value, raw)
    if value is None:
        raise RetryLater("the answer is no JSON object in UTF-8", maybe_billed=True, raw=raw)
    return answer_in(connection, value, raw, read_value, reply)


def answer_in(
    connection: Connection,
    value: dict[str, Any],
    raw: str,
    read_value: Read,
    reply: Reply = _SUCCESS,
) -> Answer:
    """Return the answer in the JSON object of a successful reply; see `read_reply`."""
    if value.get("error") and not value.get("candidates") and not value.get("choices"):
        return _answer_for_error_with_200(connection, reply, value, raw)
    answer, clean = read_value(value, raw), connection.clean
    return replace(
        answer,
        text=answer.text and connection.key.redact(answer.text),
        reason=answer.reason and clean(answer.reason),
        model_version=answer.model_version and clean(answer.model_version),
    )


def answer_for_http_error(
    connection: Connection, reply: Reply, value: dict[str, Any] | None, raw: str | None = None
) -> Answer:
    """Return an `invalid_answer` for an HTTP status by which the server rejects one request.

    Raises:
        RetryLater: for a status that may change (429, 5xx).
        UserError: for a status that every request would get (a redirect, a wrong key, a daily
            quota, an unserved region).
    """
    if 300 <= reply.status < 400:
        target = connection.show_url(reply.headers.get("location", "nowhere"))
        raise connection.refusal(f"the server redirects (HTTP {reply.status}) to {target}")
    reason = f"HTTP {reply.status}: {connection.clean(message_of(value) or 'no reason given')}"
    if reply.status == 429 and (quota := _daily_quota(value)):
        raise UserError(
            f"the daily quota is used up: {connection.clean(quota)} ({reason}). All answers so far "
            "are stored; run the same command when the quota is renewed."
        )
    if reply.status in _RETRIED or reply.status >= 500:
        raise RetryLater(reason, wait_s(value, reply.headers), raw=raw)
    if reply.status in _HOPELESS or _is_hopeless(value):
        raise UserError(
            f"the server accepts no request: {reason}. Check the key and its rights, the name of "
            "the model, the address, and whether your region is served. All answers so far are "
            "stored."
        )
    return replace(invalid_answer(reason), raw=raw or "")


def _answer_for_error_with_200(
    connection: Connection, reply: Reply, value: dict[str, Any], raw: str
) -> Answer:
    """Return the answer for an error in a successful reply, which counts as paid."""
    code = at(value, "error", "code")
    message = connection.clean(message_of(value) or "no reason given")
    reason = f"HTTP {reply.status} with an error: {message}"
    if isinstance(code, int) and (code in _RETRIED or 500 <= code < 600):
        raise RetryLater(reason, wait_s(value, reply.headers), maybe_billed=True, raw=raw)
    return replace(failed_answer(reason), raw=raw, num_prompt_tokens=None, num_output_tokens=None)


def wait_s(error: Any, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, in `google.rpc.RetryInfo` or Retry-After."""
    for detail in _objects(at(_inner(error), "details")):
        delay = re.fullmatch(f"({_SECONDS})s", str(detail.get("retryDelay", "")), re.ASCII)
        if delay and str(detail.get("@type", "")).endswith("google.rpc.RetryInfo"):
            return float(delay[1])
    header = headers.get("retry-after", "").strip()
    if re.fullmatch(_SECONDS, header, re.ASCII):
        return float(header)
    try:
        date = parsedate_to_datetime(header).astimezone(UTC)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def checked_text(text: str) -> tuple[str, str | None, str | None]:
    """Return the status, text and reason of a complete text."""
    if not text.strip():
        return "invalid", None, "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "invalid", None, "the text is not valid Unicode"
    return "ok", text, None


def token_count(value: Any) -> int | None:
    """Return a server's number of tokens, None where it is impossible."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS
    return value if is_count else None


def _inner(value: Any) -> Any:
    return value.get("error", value) if isinstance(value, dict) else None


def message_of(value: Any) -> str | None:
    """Return the message in the JSON of an error."""
    inner = _inner(value)
    message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return None if not message else str(message)


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a JSON list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _daily_quota(value: Any) -> str | None:
    """Return the name of the quota where it is a daily one, or one of money."""
    inner = _inner(value)
    for detail in _objects(at(inner, "details")):
        for violation in _objects(detail.get("violations")):
            names = [str(violation.get(name, "")) for name in ("quotaId", "quotaMetric")]
            if any(map(_DAILY.search, names)):
                return next(filter(None, names))
    said = [str(at(inner, name) or "") for name in ("code", "type", "message")]
    return next((text for text in said if _DAILY.search(text)), None)


def _is_hopeless(value: Any) -> bool:
    """Return whether an error concerns the account or the region, not the request. Google answers
    400 to an unknown key."""
    inner = _inner(value)
    reasons = [detail.get("reason") for detail in _objects(at(inner, "details"))]
    return at(inner, "status") in _HOPELESS_STATES or "API_KEY_INVALID" in reasons
