"""What `GeminiServer` can do wrong in every call, whatever is asked (its `always`)."""

import contextlib
import gzip
import json
from typing import Any

from aiohttp import web

_RPC = "type.googleapis.com/google.rpc"
_DAILY = [
    {
        "@type": f"{_RPC}.QuotaFailure",
        "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
    },
    {"@type": f"{_RPC}.RetryInfo", "retryDelay": "36s"},
]
ERRORS: dict[str, tuple[int, dict[str, Any]]] = {
    "location": (
        400,
        {
            "status": "FAILED_PRECONDITION",
            "message": "User location is not supported for the API use.",
        },
    ),
    "daily": (
        429,
        {"status": "RESOURCE_EXHAUSTED", "message": "You exceeded your quota.", "details": _DAILY},
    ),
    "zero": (
        429,
        {"message": "slow down", "details": [{"@type": f"{_RPC}.RetryInfo", "retryDelay": "0s"}]},
    ),
    "odd_details": (
        429,
        {
            "message": "slow down",
            "details": [7, {"@type": 3, "violations": {"a": 1}}, {"retryDelay": []}],
        },
    ),
    "no_credit": (402, {"message": "pay first"}),
    "error_200": (200, {"code": 400, "message": "no such parameter"}),
    "error_200_busy": (200, {"code": 503, "message": "busy"}),
}
"""HTTP status and error object of a server that does what `cases` of real ones did."""
BODIES: dict[str, bytes] = {
    "nested": b'{"a": ' + b"[" * 200_000,
    "bad_utf8": b'{"candidates": [{"finishReason": "STOP", "content": {"parts": [{"text": '
    b'"\xff"}]}}]}',
    "html": b"<html>Please log in</html>",
    "nothing": b"",
    "number": b"1" * 5000,
    "huge": b'{"pad": "' + b"x" * 6_000_000 + b'"}',
}
"""What is no answer, with HTTP 200."""
RETRY_AFTER = (
    "\u00b2",
    "9" * 400,
    "-5",
    "nan",
    "1e999",
    "Wed, 99 Foo 0000",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "soon",
)
USAGES: dict[str, dict[str, Any] | None] = {
    "no_usage": None,
    "partial_usage": {"promptTokenCount": 9, "prompt_tokens": 9},
    "zero_usage": dict.fromkeys(
        (
            "promptTokenCount",
            "candidatesTokenCount",
            "totalTokenCount",
            "prompt_tokens",
            "completion_tokens",
        ),
        0,
    ),
    "text_usage": {
        "promptTokenCount": "9",
        "candidatesTokenCount": "9",
        "prompt_tokens": "9",
        "completion_tokens": "9",
    },
    "true_usage": {
        "promptTokenCount": True,
        "candidatesTokenCount": True,
        "prompt_tokens": True,
        "completion_tokens": True,
    },
    "negative_usage": {
        "promptTokenCount": -9,
        "candidatesTokenCount": -9,
        "prompt_tokens": -9,
        "completion_tokens": -9,
    },
    "absurd_usage": dict.fromkeys(
        ("promptTokenCount", "candidatesTokenCount", "prompt_tokens", "completion_tokens"),
        2**31 - 1,
    ),
}
"""Counts of tokens that are not those of the answer."""


def wire_fault(fault: str, key: str, target: str, number: int) -> web.Response | None:
    """Return the answer to any request under this fault; None where the server does not fail so
    early.

    Args:
        fault: what is wrong.
        key: the client's; some faults repeat it.
        target: of redirects.
        number: of the request, for faults that vary.
    """
    headers: dict[str, str] = {}
    status, body = 200, BODIES.get(fault, b"")
    if fault in ("redirect_302", "redirect_307", "redirect_key"):
        status = 307 if fault == "redirect_307" else 302
        headers["Location"] = f"{target}?key={key}" if fault == "redirect_key" else target
    elif fault == "reason_key":
        return web.Response(
            status=400,
            reason=f"no {key}",
            body=b'{"error": {"message": "no %s"}}' % escaped(key).encode(),
        )
    elif fault == "bare_304":
        status = 304
    elif fault == "retry_odd":
        status, body = 429, f"no {key}".encode()
        headers |= {
            "Retry-After": RETRY_AFTER[number % len(RETRY_AFTER)],
            "Set-Cookie": f"a={key}; =;",
        }
    elif fault in ERRORS:
        status, body = ERRORS[fault][0], json.dumps({"error": ERRORS[fault][1]}).encode()
    elif fault == "bomb":
        headers["Content-Encoding"], body = "gzip", gzip.compress(b"0" * 20_000_000)
    elif fault not in BODIES:
        return None
    return web.Response(
        status=status, body=body, headers=headers | {"Content-Type": "application/json"}
    )


def escaped(text: str) -> str:
    """Return the text with every other character as JSON may escape it."""
    return "".join(f"\\u{ord(char):04x}" if i % 2 else char for i, char in enumerate(text))


async def endless(request: web.Request) -> web.StreamResponse:
    """Send blanks until the client has had enough."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" " * 100_000)
    return response
