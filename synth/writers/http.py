"""What the writers that speak HTTP share: keys, refusals of a server, and how long it says to wait."""

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from sft_probe.errors import UserError
from sft_probe.synth.requests import Answer, Wait, turned_down

_RETRIED = (408, 409, 425, 429)
_HOPELESS = (401, 403, 404)
_MAX_TOKENS = 2**31
_MIN_KEY_CHARS = 8
_DURATION = re.compile(r"(\d+(?:\.\d+)?)s")


def key_from_environment(*names: str) -> str:
    """The first variable that is set. Raises `UserError` where none is."""
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    raise UserError(f"no key: set the environment variable {' or '.join(names)}. (Keys are read from nowhere else.)")


def strike(text: str, key: str) -> str:
    """What a server said, less the key; a shorter one is no secret but a word, such as the `EMPTY` of vLLM."""
    return text.replace(key, "[key]") if len(key) >= _MIN_KEY_CHARS else text


def refused_call(status: int, message: str, error: Any, headers: Mapping[str, str], key: str) -> Answer:
    """What to make of an HTTP error: an `invalid` answer for a request that the server will not take as it is.

    Args:
        status: HTTP status.
        message: of the server; the key is struck from it, should it be there.
        error: the decoded `error` object of a Google API, or anything.
        headers: of the response.
        key: the secret.

    Raises:
        Wait: for what may pass (429, 5xx).
        UserError: for what no request can get past (a wrong key, an unknown model).
    """
    reason = f"HTTP {status}: {strike(message, key)[:300]}"
    if status in _RETRIED or status >= 500:
        raise Wait(reason, wait_s(error, headers))
    if status in _HOPELESS or _is_bad_key(error):
        raise UserError(f"the server takes no request: {reason}. Check the key, its rights and the name of the model.")
    return turned_down(reason)


def wait_s(error: Any, headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `google.rpc.RetryInfo`, else the header Retry-After."""
    for detail in _details(error):
        delay = _DURATION.fullmatch(str(detail.get("retryDelay", "")))
        if delay and str(detail.get("@type", "")).endswith("google.rpc.RetryInfo"):
            return float(delay[1])
    header = headers.get("Retry-After") or headers.get("retry-after")
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def checked_text(text: str) -> tuple[str, str | None, str | None]:
    """Status, text and reason of a text that came whole."""
    if not text.strip():
        return "invalid", None, "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "invalid", None, "the text is not valid Unicode"
    return "ok", text, None


def token_count(value: Any) -> int | None:
    """A number of tokens as a server gave it; None where it is no such thing."""
    return value if isinstance(value, int) and 0 <= value < _MAX_TOKENS else None


def _details(error: Any) -> list[dict[str, Any]]:
    inner = error.get("error", error) if isinstance(error, dict) else None
    details = inner.get("details") if isinstance(inner, dict) else None
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _is_bad_key(error: Any) -> bool:
    """Google answers 400, not 401, to a key that it does not know."""
    return any(detail.get("reason") == "API_KEY_INVALID" for detail in _details(error))
