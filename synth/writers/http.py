"""The one way to a server that all remote writers share: one origin, no redirects, short bodies."""

import json
from collections.abc import Awaitable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import RetryLater
from sft_probe.synth.writers.keys import Secret

_MAX_BODY_BYTES = 5_000_000  # of one answer; a text of 1,000 tokens takes a thousandth of it
_PORTS = {"http": 80, "https": 443}
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
_OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding", "set-cookie")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reply:
    """The response of a server to one HTTP request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any] | None:
        """Return the JSON object in the body, None where there is none."""
        try:
            value = json.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass
class _Exchange:
    """What went over the wire in one call of an SDK, whatever the SDK made of it."""

    max_body_bytes: int
    is_sent: bool = False
    reply: Reply | None = None
    """The last reply."""
    problem: str | None = None
    """Reason why there is no reply."""
    refused_url: str | None = None
    """Address of another origin that the SDK tried to reach."""


_exchange: ContextVar[_Exchange] = ContextVar("exchange")


class StoppedError(Exception):
    """Raised inside an SDK to end its call; `Connection` knows why."""


@dataclass(frozen=True)
class Called(Generic[_T]):
    """The outcome of one call of an SDK."""

    reply: Reply
    value: _T | None
    error: str | None
    """Type of the error that the SDK raised in place of a value."""


class Connection:
    """Connects to one origin, follows no redirect, limits bodies, and keeps the key secret.

    Args:
        key: sent by the SDK.
        base_url: of the server.
        is_body_shown: whether the SDK reads the body. Otherwise it gets an empty object, so that
            nothing a server sends can break it.

    Raises:
        UserError: `base_url` is no address.
    """

    def __init__(self, key: Secret, base_url: str, *, is_body_shown: bool = False) -> None:
        origin = _origin(base_url)
        if origin is None:
            raise UserError(
                f"{base_url!r} is not the address of a server. Give one like https://host/v1."
            )
        self.key, self.base_url = key, base_url
        self._origin, self._is_body_shown = origin, is_body_shown

    def proxy(self) -> str | None:
        """Return the environment's proxy for TLS. Plain HTTP uses none, which would see the key."""
        scheme, host, _ = self._origin
        proxy = getproxies().get("https") if scheme == "https" and not proxy_bypass(host) else None
        return f"http://{proxy}" if proxy and "://" not in proxy else proxy

    def note_request(self, url: str) -> None:
        """Record that a request goes to `url`. Raise `StoppedError` where its origin is another."""
        exchange = _exchange.get()
        if _origin(url) != self._origin:
            exchange.refused_url = url
            raise StoppedError
        exchange.is_sent, exchange.reply, exchange.problem = True, None, None

    def note_reply(self, status: int, headers: Mapping[str, str], body: bytes) -> bytes:
        """Record a reply; return the body for the SDK. Raise `StoppedError` if the call failed."""
        headers = {name.lower(): value for name, value in headers.items()}
        _exchange.get().reply = Reply(status, headers, body)
        if not 200 <= status < 300:
            raise StoppedError
        return body if self._is_body_shown else b"{}"

    def note_problem(self, problem: str, *, is_sent: bool = True) -> None:
        """Record that there is no reply and, without `is_sent`, that no request arrived."""
        exchange = _exchange.get()
        exchange.problem, exchange.is_sent = problem, is_sent

    def add_chunk(self, body: bytearray, chunk: bytes) -> None:
        """Append to a body. Raise `StoppedError` where it grows too long."""
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
            max_body_bytes: longest body; no more is read.

        Raises:
            RetryLater: there is no reply.
            UserError: the call goes to another origin.
        """
        exchange, value, problem = _Exchange(max_body_bytes), None, None
        _exchange.set(exchange)
        try:
            value = await awaitable
        except Exception as error:  # an SDK raises all sorts; only what was on the wire counts
            problem = type(error).__name__
        if exchange.refused_url is not None:
            raise self.refusal(f"a call would go to {self.show_url(exchange.refused_url)}")
        if exchange.reply is None:
            reason = exchange.problem or f"connection failed ({problem or 'no reply'})"
            raise RetryLater(reason, maybe_billed=exchange.is_sent)
        return Called(exchange.reply, value, problem)

    def refusal(self, what: str) -> UserError:
        """Return the error of a call to another server than the configured one."""
        return UserError(
            f"{what}. The key is sent to {self.show_url(self.base_url)} alone, so the run ends "
            "here. If that is the right server, give its address with --base-url; else check the "
            "address and the network."
        )

    def show_url(self, url: str) -> str:
        """Return an address for a message, without query, user and key."""
        try:
            parts = urlsplit(url)
            host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else ""
            return self.clean(host + parts.path)
        except ValueError:
            return self.clean(url)

    def clean(self, text: object) -> str:
        """Return a server's words for a message: short, printable, without the key."""
        redacted = self.key.redact(str(text))
        return "".join(char if char.isprintable() else " " for char in redacted)[:300]


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    is_whole = parts.scheme in _PORTS and parts.hostname and port
    return (parts.scheme, str(parts.hostname), int(port or 0)) if is_whole else None


def guarded_client(connection: Connection) -> httpx2.AsyncClient:
    """Return the HTTP client for an asynchronous SDK. It follows no redirect and ignores the
    environment."""
    transport = _GuardedTransport(connection)
    return httpx2.AsyncClient(
        transport=transport, follow_redirects=False, trust_env=False, timeout=None
    )


class _GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends requests to one origin, and reads each body whole before the SDK sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._inner = httpx2.AsyncHTTPTransport(limits=limits, proxy=connection.proxy())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request. Raise `StoppedError` for everything but a success."""
        self._connection.note_request(str(request.url))
        body = bytearray()
        try:
            response = await self._inner.handle_async_request(request)
            try:
                async for chunk in response.aiter_bytes():
                    self._connection.add_chunk(body, chunk)
            finally:
                await response.aclose()
        except (httpx2.HTTPError, OSError) as error:
            problem = f"connection failed ({type(error).__name__})"
            self._connection.note_problem(problem, is_sent=not isinstance(error, _NEVER_SENT))
            raise StoppedError from None
        shown = self._connection.note_reply(response.status_code, response.headers, bytes(body))
        headers = {
            name: value
            for name, value in response.headers.items()
            if name.lower() not in _OF_THE_BODY  # they describe the body as it was sent
        }
        return httpx2.Response(
            response.status_code, headers=headers, content=shown, request=request
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()
