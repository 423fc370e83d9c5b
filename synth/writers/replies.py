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
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")
_DAILY = re.compile(r"per[\s_-]?day|daily|insufficient_quota", re.IGNORECASE)


def read_reply(
    connection: Connection, reply: Reply, read_value: Callable[[dict[str, Any], str], Answer]
) -> Answer:
    """Return the answer in a reply, every field without the key.

    Args:
        connection: the connection to the server.
        reply: the server's reply.
        read_value: makes an answer of a JSON object and its text.

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
    read_value: Callable[[dict[str, Any], str], Answer],
    reply: Reply = _SUCCESS,
) -> Answer:
    """Return the answer in the JSON object of a successful reply; see `read_reply`."""
    if value.get("error") and not value.get("candidates") and not value.get("choices"):
        return _answer_for_error_with_200(connection, reply, value, raw)
    answer = read_value(value, raw)
    return replace(
        answer,
        text=None if answer.text is None else connection.key.redact(answer.text),
        reason=None if answer.reason is None else connection.clean(answer.reason),
        model_version=None
        if answer.model_version is None
        else connection.clean(answer.model_version),
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
    error = value["error"]
    code = error.get("code") if isinstance(error, dict) else None
    reason = (
        f"HTTP {reply.status} with an error: "
        f"{connection.clean(message_of(value) or 'no reason given')}"
    )
    if isinstance(code, int) and (code in _RETRIED or 500 <= code < 600):
        raise RetryLater(reason, wait_s(value, reply.headers), maybe_billed=True, raw=raw)
    return replace(failed_answer(reason), raw=raw, num_prompt_tokens=None, num_output_tokens=None)


def wait_s(error: Any, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, in `google.rpc.RetryInfo` or Retry-After."""
    for detail in _details(error):
        delay = _DURATION.fullmatch(str(detail.get("retryDelay", "")))
        if delay and str(detail.get("@type", "")).endswith("google.rpc.RetryInfo"):
            return float(delay[1])
    header = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header):
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


def _details(value: Any) -> list[dict[str, Any]]:
    inner = _inner(value)
    details = inner.get("details") if isinstance(inner, dict) else None
    return (
        [detail for detail in details if isinstance(detail, dict)]
        if isinstance(details, list)
        else []
    )


def _daily_quota(value: Any) -> str | None:
    """Return the name of the quota where it is a daily one, or one of money."""
    for detail in _details(value):
        violations = detail.get("violations")
        for violation in violations if isinstance(violations, list) else []:
            names = [
                str(violation.get(name, ""))
                for name in ("quotaId", "quotaMetric")
                if isinstance(violation, dict)
            ]
            if any(map(_DAILY.search, names)):
                return next(filter(None, names))
    inner = _inner(value)
    said = (
        [str(inner.get(name, "")) for name in ("code", "type", "message")]
        if isinstance(inner, dict)
        else []
    )
    return next((text for text in said if _DAILY.search(text)), None)


def _is_hopeless(value: Any) -> bool:
    """Return whether an error concerns the account or the region, not the request. Google answers
    400 to an unknown key."""
    inner = _inner(value)
    state = inner.get("status") if isinstance(inner, dict) else None
    return state in _HOPELESS_STATES or any(
        detail.get("reason") == "API_KEY_INVALID" for detail in _details(value)
    )
