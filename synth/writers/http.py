"""What the writers that speak HTTP share: one way to a server, and one reading of what it sends."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Wait, error_answer, turned_down
from sft_probe.synth.writers.keys import Secret

_MAX_BODY_BYTES = 5_000_000  # of one answer; a text of 1,000 tokens takes a thousandth of it
_RETRIED = (408, 409, 425, 429)
_HOPELESS = (401, 402, 403, 404, 405, 407, 451)
_HOPELESS_STATES = ("FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED")
_MAX_TOKENS = 1_000_000
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")
_DAILY = re.compile(r"per[\s_-]?day|daily|insufficient_quota", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reply:
    """What a server sent to one HTTP request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any] | None:
        """Return the JSON object of the body, None where it is none."""
        try:
            value = json.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass
class Exchange:
    """What went over the wire in the call of an SDK, whatever the SDK made of it."""

    max_body_bytes: int
    is_sent: bool = False
    reply: Reply | None = None
    """The last one."""
    problem: str | None = None
    """Why there is no reply."""
    refused_url: str | None = None
    """An address of another origin that the SDK wanted to go to."""


_exchange: ContextVar[Exchange] = ContextVar("exchange")


class StoppedError(Exception):
    """Raised into an SDK where it must not go on; `Connection` knows why."""


@dataclass(frozen=True)
class Called(Generic[_T]):
    """The outcome of one call of an SDK."""

    reply: Reply
    value: _T | None
    error: str | None
    """Type of the error that the SDK raised instead of giving a value."""


class Connection:
    """The one way to a server: one origin, no redirects, bodies of a limited size, a key that shows
    nowhere.

    Args:
        key: sent by the SDK.
        base_url: of the server.
        is_body_shown: whether the SDK reads what the server sends. Otherwise it is given an empty
        object, and nothing
            that a server sends can break it.

    Raises:
        UserError: `base_url` is no address.
    """

    def __init__(self, key: Secret, base_url: str, *, is_body_shown: bool = False) -> None:
        origin = _origin(base_url)
        if origin is None:
            raise UserError(
                f"{base_url!r} is no address of a server. Give one like https://host/v1."
            )
        self.key, self.base_url = key, base_url
        self._origin, self._is_body_shown = origin, is_body_shown

    def proxy(self) -> str | None:
        """Return the proxy of the environment: a tunnel for TLS. Plain HTTP goes without, or the
        proxy has the key."""
        scheme, host, _ = self._origin
        proxy = getproxies().get("https") if scheme == "https" and not proxy_bypass(host) else None
        return f"http://{proxy}" if proxy and "://" not in proxy else proxy

    def note_request(self, url: str) -> None:
        """Record that a request goes to `url`. Raises `StoppedError` where it is of another
        origin."""
        exchange = _exchange.get()
        if _origin(url) != self._origin:
            exchange.refused_url = url
            raise StoppedError
        exchange.is_sent, exchange.reply, exchange.problem = True, None, None

    def note_reply(self, status: int, headers: Mapping[str, str], body: bytes) -> bytes:
        """Record a reply; return the body that the SDK is given. Raises `StoppedError` where the
        call has failed."""
        _exchange.get().reply = Reply(
            status, {name.lower(): value for name, value in headers.items()}, body
        )
        if not 200 <= status < 300:
            raise StoppedError
        return body if self._is_body_shown else b"{}"

    def note_problem(self, problem: str, *, is_sent: bool = True) -> None:
        """Record that no reply comes. Without `is_sent` the server has not even got the request."""
        exchange = _exchange.get()
        exchange.problem, exchange.is_sent = problem, is_sent

    def add_chunk(self, body: bytearray, chunk: bytes) -> None:
        """Append to a body. Raises `StoppedError` where it grows too long."""
        body += chunk
        limit = _exchange.get().max_body_bytes
        if len(body) > limit:
            self.note_problem(f"the answer is longer than {limit / 1e6:g} MB")
            raise StoppedError

    async def call(
        self, awaitable: Awaitable[_T], max_body_bytes: int = _MAX_BODY_BYTES
    ) -> Called[_T]:
        """Await a call of an SDK; return what the server sent, whatever the SDK made of it.

        Args:
            awaitable: the call.
            max_body_bytes: of an answer; more is not read.

        Raises:
            Wait: there is no reply.
            UserError: the call leads to another origin.
        """
        exchange, value, problem = _begin_exchange(max_body_bytes), None, None
        try:
            value = await awaitable
        except Exception as error:  # an SDK raises all sorts; only what was on the wire counts
            problem = type(error).__name__
        return self._called(exchange, value, problem)

    def call_blocking(self, function: Callable[[], _T]) -> Called[_T]:
        """Make a call of an SDK that blocks; see `call`."""
        exchange, value, problem = _begin_exchange(_MAX_BODY_BYTES), None, None
        try:
            value = function()
        except Exception as error:  # see above
            problem = type(error).__name__
        return self._called(exchange, value, problem)

    def _called(self, exchange: Exchange, value: _T | None, error: str | None) -> Called[_T]:
        if exchange.refused_url is not None:
            raise self.refusal(f"a call would go to {self.show_url(exchange.refused_url)}")
        if exchange.reply is None:
            raise Wait(
                exchange.problem or f"connection failed ({error or 'no reply'})",
                maybe_billed=exchange.is_sent,
            )
        return Called(exchange.reply, value, error)

    def refusal(self, what: str) -> UserError:
        """Return the error of a call that leads away from the configured server."""
        return UserError(
            f"{what}. The key goes to {self.show_url(self.base_url)} and nowhere else, so the run "
            "ends here. If that "
            "is the right server, give its address with --base-url; else check the address and the "
            "network."
        )

    def show_url(self, url: str) -> str:
        """Return an address for a message: without query, user and key."""
        try:
            parts = urlsplit(url)
            shown = (
                f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
                if parts.netloc
                else parts.path
            )
        except ValueError:
            shown = url
        return self.clean(shown)

    def clean(self, text: object) -> str:
        """Return words of a server for a message: short, printable, without the key."""
        return "".join(char if char.isprintable() else " " for char in self.key.redact(str(text)))[
            :300
        ]

    def read(self, reply: Reply, read_value: Callable[[dict[str, Any], str], Answer]) -> Answer:
        """Return the answer in a reply, every field without the key.

        Args:
            reply: of the server.
            read_value: makes an answer of a JSON object and its text.

        Raises:
            Wait: the call failed and may be repeated.
            UserError: no call can succeed.
        """
        raw = self.key.redact(reply.body.decode("utf-8", "replace"))
        value = reply.json()
        if not 200 <= reply.status < 300:
            return self.failed(reply, value, raw)
        if value is None:
            raise Wait("the answer is no JSON object in UTF-8", maybe_billed=True, raw=raw)
        return self.answer(value, raw, read_value, reply)

    def answer(
        self,
        value: dict[str, Any],
        raw: str,
        read_value: Callable[[dict[str, Any], str], Answer],
        reply: Reply = Reply(200, {}, b""),
    ) -> Answer:
        """Return the answer in a JSON object that came with a success; see `read`."""
        if value.get("error") and not value.get("candidates") and not value.get("choices"):
            return self._error_with_200(reply, value, raw)
        answer = read_value(value, raw)
        return replace(
            answer,
            text=None if answer.text is None else self.key.redact(answer.text),
            reason=None if answer.reason is None else self.clean(answer.reason),
            model_version=None
            if answer.model_version is None
            else self.clean(answer.model_version),
        )

    def failed(self, reply: Reply, value: dict[str, Any] | None, raw: str | None = None) -> Answer:
        """Return what an HTTP status other than 200 means for a request: the server does not take
        it as it is.

        Raises:
            Wait: for what may pass (429, 5xx).
            UserError: for what no request can get past (a redirect, a wrong key, a daily quota, an
            unserved region).
        """
        if 300 <= reply.status < 400:
            target = self.show_url(reply.headers.get("location", "nowhere"))
            raise self.refusal(f"the server redirects (HTTP {reply.status}) to {target}")
        reason = f"HTTP {reply.status}: {self.clean(message_of(value) or 'no reason given')}"
        if reply.status == 429 and (quota := _daily_quota(value)):
            raise UserError(
                f"the quota of the day is used up: {self.clean(quota)} ({reason}). All answers so "
                "far are stored; run "
                "the same command when the quota is renewed."
            )
        if reply.status in _RETRIED or reply.status >= 500:
            raise Wait(reason, wait_s(value, reply.headers), raw=raw)
        if reply.status in _HOPELESS or _is_hopeless(value):
            raise UserError(
                f"the server takes no request: {reason}. Check the key and its rights, the name of "
                "the model, the "
                "address and whether your region is served. All answers so far are stored."
            )
        return replace(turned_down(reason), raw=raw or "")

    def _error_with_200(self, reply: Reply, value: dict[str, Any], raw: str) -> Answer:
        """An error inside a success: what it cost is not known, so it counts as paid."""
        error = value["error"]
        code = error.get("code") if isinstance(error, dict) else None
        reason = (
            f"HTTP {reply.status} with an error: "
            f"{self.clean(message_of(value) or 'no reason given')}"
        )
        if isinstance(code, int) and (code in _RETRIED or 500 <= code < 600):
            raise Wait(reason, wait_s(value, reply.headers), maybe_billed=True, raw=raw)
        return replace(
            error_answer(reason), raw=raw, num_prompt_tokens=None, num_output_tokens=None
        )


def _begin_exchange(max_body_bytes: int) -> Exchange:
    exchange = Exchange(max_body_bytes)
    _exchange.set(exchange)
    return exchange


def wait_s(error: Any, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asks to wait: `google.rpc.RetryInfo`, else the header
    Retry-After."""
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
    """Return status, text and reason of a text that came whole."""
    if not text.strip():
        return "invalid", None, "empty text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "invalid", None, "the text is not valid Unicode"
    return "ok", text, None


def token_count(value: Any) -> int | None:
    """Return a number of tokens as a server gave it, None where it cannot be one."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS
    return value if is_count else None


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (
        (parts.scheme, parts.hostname, port)
        if parts.scheme in _PORTS and parts.hostname and port
        else None
    )


def _inner(value: Any) -> Any:
    return value.get("error", value) if isinstance(value, dict) else None


def message_of(value: Any) -> str | None:
    """Return what a server says in the JSON of an error."""
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
    """Return the name of the quota where it is one of a day, or of money."""
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
    """Whether an error is of the account or the place, not of the request. Google answers 400 to an
    unknown key."""
    inner = _inner(value)
    state = inner.get("status") if isinstance(inner, dict) else None
    return state in _HOPELESS_STATES or any(
        detail.get("reason") == "API_KEY_INVALID" for detail in _details(value)
    )
