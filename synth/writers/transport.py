"""The HTTP client that is put into the asynchronous SDKs, so that what they do on the wire is
decided here."""

from typing import Any

import httpx2

from sft_probe.synth.writers.http import Connection, StoppedError

_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


def guarded_client(connection: Connection) -> httpx2.AsyncClient:
    """Return a client that follows no redirect and reads nothing of the environment but what
    `connection` allows."""
    return httpx2.AsyncClient(
        transport=_GuardedTransport(connection),
        follow_redirects=False,
        trust_env=False,
        timeout=None,
    )


class _GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends requests to one origin, and reads each body whole before an SDK sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inner = httpx2.AsyncHTTPTransport(limits=_LIMITS, proxy=connection.proxy())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request. Raises `StoppedError` for everything but a success."""
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
            is_sent = not isinstance(error, _NEVER_SENT)
            self._connection.note_problem(
                f"connection failed ({type(error).__name__})", is_sent=is_sent
            )
            raise StoppedError from None
        shown = self._connection.note_reply(response.status_code, response.headers, bytes(body))
        return httpx2.Response(
            response.status_code, headers=_plain(response.headers), content=shown, request=request
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


def _plain(headers: Any) -> dict[str, str]:
    """Return the headers less those of a body as it was sent."""
    sent = ("content-encoding", "content-length", "transfer-encoding", "set-cookie")
    return {name: value for name, value in headers.items() if name.lower() not in sent}
