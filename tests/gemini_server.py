"""A server that speaks as much of the Gemini REST protocol as the SDKs use, and fails on demand.

A prompt may hold `@faults(a,b,c)`: the first call with it meets fault a, the second b, the third c,
later ones none. Answers: blocked_prompt safety recitation max_tokens empty no_finish surrogate
thought other_version bad_request bad_key no_model echo_key. Failures: 429 429_retry_info
429_retry_after 500 503 slow cut hangup malformed malformed_error, and those of gemini_faults.py.
`always` is a fault of every call, whatever its prompt says. It also answers chat completions as
OpenAI does (`/openai/v1`), with the same faults. Run: python tests/gemini_server.py --port 0
--latency-s 0.05    (prints its address; GET /calls counts calls by prompt)
"""

import argparse
import asyncio
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from gemini_faults import USAGES, endless, escaped, wire_fault
from synth_fakes import text_of

VERSION = "test-model-001"
_FAULTS = re.compile(r"@faults\(([a-z0-9_,]+)\)")
_SLOW_S = 30.0
_RETRY_S = 0.05


class GeminiServer:
    """The server and what it has seen; as a context manager it runs in a thread of its own."""

    def __init__(self, latency_s: float = 0.0, always: str = "", thief: str = "") -> None:
        self.latency_s = latency_s
        self.always = always
        self.thief = thief
        """Address that redirects lead to."""
        self.billed: list[tuple[int, int]] = []
        """Tokens of prompt and output of every call that is paid for."""
        self.calls: Counter[str] = Counter()
        """Calls by prompt that were answered with tokens to pay for."""
        self.requests: Counter[str] = Counter()
        """All calls by prompt."""
        self.paths: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.bodies: deque[dict[str, Any]] = deque(maxlen=100)
        self.polls_needed = 2
        self.in_flight = self.most_in_flight = 0
        self.num_requests = 0
        self.seen: deque[str] = deque(maxlen=1000)
        """Path and headers of the last requests."""
        self.job_faults: list[str] = []
        self.list_faults: list[str] = []
        self.keeps_results = True
        self._files: dict[str, bytes] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._polls: Counter[str] = Counter()
        self.url = ""

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=2**30, middlewares=[self._wire])
        app.router.add_get("/calls", self._counts)
        app.router.add_post("/{version:v1|v1beta}/models/{model}:generateContent", self._generate)
        app.router.add_post(
            "/{version:v1|v1beta}/models/{model}:batchGenerateContent", self._create_job
        )
        app.router.add_get("/{version:v1|v1beta}/batches", self._list_jobs)
        app.router.add_get("/{version:v1|v1beta}/batches/{job}", self._get_job)
        app.router.add_post("/upload/{version:v1|v1beta}/files", self._start_upload)
        app.router.add_post("/upload/bytes/{file}", self._upload)
        app.router.add_get("/{version:v1|v1beta}/files/{file}:download", self._download)
        app.router.add_post("/openai/v1/chat/completions", self._complete)
        return app

    def __enter__(self) -> "GeminiServer":
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.listen(0))
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.run_until_complete(_cancel_all())
        self._loop.close()

    async def listen(self, port: int) -> None:
        """Binds a port of the loopback (0: a free one) and sets `url`."""
        self._runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _counts(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"calls": self.calls, "requests": self.requests, "most_in_flight": self.most_in_flight}
        )

    @web.middleware
    async def _wire(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Counts every request, and fails before anything is understood of it where `always` says
        so."""
        if request.path == "/calls":
            return await handler(request)
        self.num_requests += 1
        self.seen.append(f"{request.raw_path} {dict(request.headers)}")
        fault = wire_fault(
            self.always, _key_of(request.headers), f"{self.thief}{request.path}", self.num_requests
        )
        if fault is None and self.always != "endless":
            return await handler(request)
        if fault is None or fault.status == 200:
            self.billed.append((50, 50))
        return await endless(request) if fault is None else fault

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._received(request)
        return await self._answer(request, body["contents"][0]["parts"][0]["text"], _gemini_answer)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._received(request)
        return await self._answer(request, body["messages"][0]["content"], _openai_answer)

    async def _received(self, request: web.Request) -> dict[str, Any]:
        self.paths[request.path] += 1
        self.keys.add(
            request.headers.get("x-goog-api-key") or request.headers.get("Authorization", "")
        )
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        return body

    async def _answer(self, request: web.Request, prompt: str, render: Any) -> web.StreamResponse:
        fault = self._next_fault(prompt)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(_SLOW_S if fault == "slow" else self.latency_s)
        finally:
            self.in_flight -= 1
        failure = _failure(fault, request.headers)
        if failure is not None:
            return failure
        self.calls[prompt] += 1
        answer = render(prompt, fault, _key_of(request.headers))
        self.billed.append((len(prompt) // 4, 1021 if fault == "thoughts" else 25))
        text = json.dumps(answer)
        if fault == "malformed":
            text = text[: len(text) // 2]
        if fault == "echo_key":
            text = text.replace("Answer ", f"Answer {_key_of(request.headers)} ")
        if fault == "echo_escaped":
            text = text.replace("Answer ", f"Answer {escaped(_key_of(request.headers))} ")
        if fault in ("cut", "hangup"):
            return await _cut(request, text if fault == "cut" else "")
        return web.Response(text=text, content_type="application/json")

    def _next_fault(self, prompt: str) -> str:
        faults = _FAULTS.search(prompt)
        number = self.requests[prompt]
        self.requests[prompt] += 1
        names = faults[1].split(",") if faults else []
        if self.always:
            return self.always
        return names[number] if number < len(names) else ""

    async def _start_upload(self, _: web.Request) -> web.Response:
        name = f"file{len(self._files)}"
        self._files[name] = b""
        url = self.thief if self.always == "upload_elsewhere" else self.url
        return web.Response(headers={"X-Goog-Upload-URL": f"{url}/upload/bytes/{name}"})

    async def _upload(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        self._files[name] += await request.read()
        final = "finalize" in request.headers["X-Goog-Upload-Command"]
        headers = {"X-Goog-Upload-Status": "final" if final else "active"}
        return web.json_response({"file": {"name": f"files/{name}"}}, headers=headers)

    async def _create_job(self, request: web.Request) -> web.StreamResponse:
        batch = (await self._received(request))["batch"]
        fault = self.job_faults.pop(0) if self.job_faults else ""
        failure = _failure(fault or self.always, request.headers)
        if failure is not None:
            return failure
        name = f"batches/job{len(self._jobs)}"
        source = batch["inputConfig"]["fileName"].removeprefix("files/")
        job: dict[str, Any] = {
            "name": name,
            "metadata": {"displayName": batch["displayName"], "state": "BATCH_STATE_RUNNING"},
        }
        self._jobs[name] = job
        lines = [json.loads(line) for line in self._files[source].splitlines()]
        key = _key_of(request.headers)
        self._files[f"out{name[8:]}"] = b"".join(
            self._batch_line(line, key) for line in reversed(lines)
        )
        if fault == "job_failed":
            job["metadata"]["state"] = "BATCH_STATE_FAILED"
        if fault == "cut":
            return await _cut(request, json.dumps(job))
        if fault == "500_after":
            return _error(500, "the job was made all the same")
        return web.json_response(job)

    def _batch_line(self, line: dict[str, Any], key: str) -> bytes:
        prompt = line["request"]["contents"][0]["parts"][0]["text"]
        fault = self._next_fault(prompt)
        if fault == "missing":
            return b""
        if fault == "malformed":
            return b'{"key": \n'
        if fault.isdigit():
            answer = {"key": line["key"], "error": {"code": int(fault), "message": "no luck"}}
        else:
            self.calls[prompt] += 1
            answer = {"key": line["key"], "response": _gemini_answer(prompt, fault, key)}
            self.billed.append((len(prompt) // 4, 1021 if fault == "thoughts" else 25))
        text = json.dumps(answer)
        if fault == "echo_escaped":
            text = text.replace("Answer ", f"Answer {escaped(key)} ")
        return text.encode() + b"\n"

    async def _list_jobs(self, request: web.Request) -> web.Response:
        failure = _failure(self.list_faults.pop(0) if self.list_faults else "", request.headers)
        if failure is not None:
            return failure
        return web.json_response({"operations": list(self._jobs.values())})

    async def _get_job(self, request: web.Request) -> web.Response:
        job = self._jobs.get(f"batches/{request.match_info['job']}")
        if job is None:
            return _error(404, "no such job")
        self._polls[job["name"]] += 1
        if (
            job["metadata"]["state"] == "BATCH_STATE_RUNNING"
            and self._polls[job["name"]] >= self.polls_needed
        ):
            job["metadata"] |= {
                "state": "BATCH_STATE_SUCCEEDED",
                "output": {"responsesFile": f"files/out{job['name'][8:]}"},
            }
        return web.json_response(job)

    async def _download(self, request: web.Request) -> web.Response:
        if not self.keeps_results:
            return _error(404, f"no such file for {_key_of(request.headers)}")
        return web.Response(body=self._files[request.match_info["file"]])


def _gemini_answer(prompt: str, fault: str, key: str) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "promptTokenCount": len(prompt) // 4,
        "candidatesTokenCount": 20,
        "thoughtsTokenCount": 5,
    }
    if fault == "thoughts":
        usage = {"promptTokenCount": len(prompt) // 4, "thoughtsTokenCount": 1021}
    usage["totalTokenCount"] = sum(usage.values())
    answer: dict[str, Any] = {
        "usageMetadata": USAGES.get(fault, usage),
        "modelVersion": VERSION,
        "responseId": "r",
    }
    if fault == "thoughts":
        return answer | {
            "candidates": [{"finishReason": "MAX_TOKENS", "content": {"role": "model"}}]
        }
    if fault == "echo_split":
        halves = [{"text": key[:9]}, {"text": f"{key[9:]} " + text_of(prompt)}]
        return answer | {"candidates": [{"finishReason": "STOP", "content": {"parts": halves}}]}
    if fault == "echo_finish":
        return answer | {"modelVersion": key, "candidates": [{"finishReason": key}]}
    if fault == "blocked_prompt":
        usage.pop("candidatesTokenCount")
        return answer | {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}
    reasons = {"safety": "SAFETY", "recitation": "RECITATION", "max_tokens": "MAX_TOKENS"}
    text = {"empty": "", "surrogate": "half \ud83d"}.get(fault, text_of(prompt))
    parts: list[dict[str, Any]] = [{"text": text[:8]}, {"text": text[8:]}]
    if fault == "thought":
        parts.insert(0, {"text": "a thought", "thought": True})
    candidate: dict[str, Any] = {"finishReason": reasons.get(fault, "STOP"), "index": 0}
    if fault not in ("safety", "recitation"):
        candidate["content"] = {"role": "model", "parts": parts}
    if fault == "no_finish":
        candidate.pop("finishReason")
    if fault == "other_version":
        answer["modelVersion"] = "test-model-002"
    return answer | {"candidates": [candidate]}


def _openai_answer(prompt: str, fault: str, key: str) -> dict[str, Any]:
    num_tokens: dict[str, Any] = {
        "prompt_tokens": len(prompt) // 4,
        "completion_tokens": 25,
        "total_tokens": len(prompt) // 4 + 25,
    }
    if fault == "thoughts":
        num_tokens |= {
            "completion_tokens": 1021,
            "completion_tokens_details": {"reasoning_tokens": 1021},
        }
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "" if fault == "empty" else text_of(prompt),
    }
    if fault == "refusal":
        message = {"role": "assistant", "content": None, "refusal": "I will not."}
    if fault in ("thoughts", "reasoning"):
        message = {"role": "assistant", "content": None, "reasoning_content": "Let me think."}
    finishes = {
        "max_tokens": "length",
        "thoughts": "length",
        "safety": "content_filter",
        "echo_finish": key,
    }
    finish = finishes.get(fault, "stop")
    return {
        "id": "c",
        "model": "test-model-002" if fault == "other_version" else VERSION,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": USAGES.get(fault, num_tokens),
    }


def _failure(fault: str, headers: Any) -> web.Response | None:
    """The HTTP error that a fault stands for."""
    key = _key_of(headers)
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{_RETRY_S}s"}
    invalid = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
    if fault in ("429", "500", "503"):
        return _error(int(fault), "try again")
    if fault == "malformed_error":
        return web.Response(status=503, text="{", content_type="application/json")
    errors: dict[str, tuple[int, str, list[Any], dict[str, str]]] = {
        "429_retry_info": (429, "quota", [info], {}),
        "429_retry_after": (429, "quota", [], {"Retry-After": "1"}),
        "bad_request": (400, f"too long {key}", [], {}),
        "bad_key": (400, f"API key {key} not valid", [invalid], {}),
        "no_model": (404, "no such model", [], {}),
    }
    return _error(*errors[fault]) if fault in errors else None


def _key_of(headers: Any) -> str:
    return str(
        headers.get("x-goog-api-key") or headers.get("Authorization", "").removeprefix("Bearer ")
    )


def _error(code: int, message: str, details: Any = (), headers: Any = None) -> web.Response:
    status = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}.get(
        code, "UNAVAILABLE"
    )
    error = {"code": code, "message": message, "status": status, "details": list(details)}
    return web.json_response({"error": error}, status=code, headers=headers)


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _cut(request: web.Request, text: str) -> web.StreamResponse:
    """Half of an answer, or nothing of none, then the connection is gone."""
    assert request.transport is not None
    if not text:
        request.transport.abort()
        return web.Response()
    response = web.StreamResponse(
        headers={"Content-Type": "application/json", "Content-Length": str(len(text))}
    )
    await response.prepare(request)
    await response.write(text[: len(text) // 2].encode())
    request.transport.abort()
    return response


async def _main(port: int, latency_s: float) -> None:
    server = GeminiServer(latency_s)
    await server.listen(port)
    print(server.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--latency-s", type=float, default=0.0)
    options = flags.parse_args()
    asyncio.run(_main(options.port, options.latency_s))
