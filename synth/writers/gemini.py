"""Gemini through `google-genai` over REST: single calls, and the Batch API at half the price."""

import asyncio
import io
import json
import os
import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, TypeVar

import httpx2
from google import genai
from google.genai import types
from google.genai.client import DebugConfig

from sft_probe.errors import UserError
from sft_probe.synth.asking.batch import JobFailedError
from sft_probe.synth.asking.protocol import (
    Answer,
    Request,
    RetryLater,
    failed_answer,
    invalid_answer,
)
from sft_probe.synth.writers import key_version, least_thinking, replies
from sft_probe.synth.writers.http import Connection, guarded_client
from sft_probe.synth.writers.keys import read_key

GEMINI_URL = "https://generativelanguage.googleapis.com"
_BLOCKED = (
    *("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE"),
    *("IMAGE_SAFETY", "MODEL_ARMOR"),
)
_TIMEOUT_S = 600.0  # of one call of the Batch API: a file of 10,000 requests may take minutes
_MAX_CALL_BYTES = 5_000_000
_MAX_FILE_BYTES = 2**29  # of the answers of a job
_INVALID_ARGUMENT = (3, 400)  # as gRPC and HTTP number it
_JOB_NAME = re.compile(r"batches/[\w.-]{1,200}", re.ASCII)
_T = TypeVar("_T")


def gemini_connection(base_url: str | None, **options: Any) -> Connection:
    """Return a connection to `base_url`, else to GOOGLE_GEMINI_BASE_URL, else to Google."""
    key = read_key("GEMINI_API_KEY", "GOOGLE_API_KEY")
    return Connection(
        key, base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or GEMINI_URL, **options
    )


class _GeminiSdk:
    """A model of the SDK, without retries of its own, on a client that is made for the event loop
    that first needs it.

    Args:
        model: name, such as `gemini-3.5-flash-lite`.
        api_version: of the REST API.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.

    Raises:
        UserError: neither GEMINI_API_KEY nor GOOGLE_API_KEY is set.
    """

    name = "gemini"
    _is_body_shown = False

    def __init__(
        self, model: str, *, api_version: str = "v1beta", base_url: str | None = None
    ) -> None:
        self.model = model
        self.api_version = key_version(api_version, self.name, model)
        self._thinking = least_thinking(self.name, model).config
        self._rest_version = api_version
        self._connection = gemini_connection(base_url, is_body_shown=self._is_body_shown)
        self._http: httpx2.AsyncClient | None = None
        self._sdk: genai.client.AsyncClient | None = None

    def _client(self) -> genai.client.AsyncClient:
        """Return the client, a new one after `close`."""
        if self._sdk is None:
            self._http = guarded_client(self._connection)
            self._sdk = genai.Client(
                api_key=self._connection.key.value,
                vertexai=False,
                # else GOOGLE_GENAI_CLIENT_MODE in the environment can make it write to files
                debug_config=DebugConfig(client_mode="", replays_directory="", replay_id=""),
                http_options=types.HttpOptions(
                    base_url=self._connection.base_url,
                    api_version=self._rest_version,
                    httpx_async_client=self._http,
                    # else the SDK repeats a call that was cut off, which may be paid for twice
                    retry_options=types.HttpRetryOptions(attempts=1),
                ),
            ).aio
        return self._sdk

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._sdk is not None and self._http is not None:
            await self._sdk.aclose()
            await self._http.aclose()  # the SDK does not close a client of ours
            self._sdk = self._http = None

    def _config(self, request: Request) -> dict[str, Any]:
        """Return the `generationConfig` of a request, as the REST API has it."""
        return {
            "temperature": request.temperature,
            "maxOutputTokens": request.max_output_tokens,
            **({"thinkingConfig": self._thinking} if self._thinking else {}),
        }


class GeminiWriter(_GeminiSdk):
    """Writes with one call per text."""

    async def write(self, request: Request) -> Answer:
        """Make one `generateContent` call."""
        config = types.GenerateContentConfig.model_validate(
            {
                **self._config(request),
                "automaticFunctionCalling": {"disable": True},
                "shouldReturnHttpResponse": True,
            }
        )
        called = await self._connection.call(
            self._client().models.generate_content(
                model=self.model, contents=request.prompt, config=config
            )
        )
        return replies.read_reply(self._connection, called.reply, read_answer)


def read_answer(response: dict[str, Any], raw: str) -> Answer:
    """Return the answer in a `GenerateContentResponse`.

    A blocked prompt has no candidate. The text of a blocked or truncated answer is not used.
    """
    if not any(response.get(name) for name in ("candidates", "promptFeedback", "usageMetadata")):
        return Answer(status="error", raw=raw, reason="the answer is none of the Gemini API")
    return replies.answer_of(
        raw,
        _read_candidate(response),
        version=response.get("modelVersion"),
        tokens=_usage(response),
        thoughts=replies.at(response, "usageMetadata", "thoughtsTokenCount"),
    )


def _read_candidate(response: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return status, text and reason."""
    candidate = replies.at(response, "candidates", 0)
    if reason := replies.at(response, "promptFeedback", "blockReason"):
        return "blocked", None, f"prompt: {reason}"
    if not isinstance(candidate, dict):
        return "blocked", None, "prompt: no candidates"
    finish = str(candidate.get("finishReason"))
    if finish == "MAX_TOKENS":
        return "truncated", None, finish
    if finish in _BLOCKED:
        return "blocked", None, finish
    if finish != "STOP":
        return "invalid", None, f"finish reason {finish}"
    parts = replies.at(candidate, "content", "parts")
    texts = [
        replies.at(part, "text")
        for part in (parts if isinstance(parts, list) else [])
        if not replies.at(part, "thought")
    ]
    return replies.checked_text("".join(text for text in texts if isinstance(text, str)))


def _usage(response: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens of prompt and output, None where they are missing, partial or inconsistent.

    Thoughts are billed as output.
    """
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "totalTokenCount")
    given = [replies.at(response, "usageMetadata", name) for name in names]
    prompt, text, thoughts, total = map(replies.token_count, given)
    is_whole = all(replies.token_count(count) is not None for count in given if count is not None)
    if prompt is None or not is_whole or (total is None and text is None):
        return None, None
    output = (text or 0) + (thoughts or 0)
    if total is None:
        return prompt, output
    return (prompt, total - prompt) if total >= prompt + output else (None, None)


class GeminiBatchWriter(_GeminiSdk):
    """Writes in batch jobs, each with one JSONL file of requests and one of answers."""

    name = "gemini-batch"
    _is_body_shown = True

    def __init__(self, model: str, *, poll_s: float = 30.0, **options: Any) -> None:
        super().__init__(model, **options)
        self.poll_s = poll_s

    async def submit(self, display_name: str, requests: dict[str, Request]) -> str:
        """Upload the requests and create a job of them; return its name."""
        bodies = {
            key: {
                "contents": [{"role": "user", "parts": [{"text": request.prompt}]}],
                "generationConfig": self._config(request),
            }
            for key, request in requests.items()
        }
        lines = (json.dumps({"key": key, "request": body}) + "\n" for key, body in bodies.items())
        file = await self._call(
            self._client().files.upload(
                file=io.BytesIO("".join(lines).encode()),
                config=types.UploadFileConfig(display_name=display_name, mime_type="jsonl"),
            )
        )
        job = await self._call(
            self._client().batches.create(
                model=self.model,
                src=file.name,
                config=types.CreateBatchJobConfig(display_name=display_name),
            )
        )
        return self._checked_name(job)

    async def find(self, display_name: str) -> str | None:
        """Return the name of the job with this display name, among all jobs of the key."""

        async def search() -> types.BatchJob | None:
            config = types.ListBatchJobsConfig(page_size=100)
            async for job in await self._client().batches.list(config=config):
                if job.display_name == display_name:
                    return job
            return None

        job = await self._call(search())
        return None if job is None else self._checked_name(job)

    async def read(self, job_name: str) -> dict[str, Answer] | None:
        """Return the answers by key of a finished job, None before."""
        try:
            job = await self._call(self._client().batches.get(name=job_name))
            if self._checked_name(job) != job_name:
                raise RetryLater("the server answers with another job")
            if not job.done:
                return None
            if job.dest is None or job.dest.file_name is None:
                state = job.state.name if job.state else "no state"
                reason = f"{state}, {job.error or 'no reason given'}"
                raise JobFailedError(self._connection.clean(reason))
            content = await self._call(
                self._client().files.download(file=job.dest.file_name), _MAX_FILE_BYTES
            )
        except _GoneError as error:
            raise JobFailedError(str(error)) from None
        lines = content.split(b"\n")
        return dict(_read_line(line, self._connection) for line in lines if line.strip())

    async def _call(self, awaitable: Awaitable[_T], max_body_bytes: int = _MAX_CALL_BYTES) -> _T:
        """Await a call of the SDK. Raise `RetryLater` if it may succeed later, else `UserError`."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                called = await self._connection.call(awaitable, max_body_bytes)
        except TimeoutError:
            raise RetryLater(f"no answer in {_TIMEOUT_S:g} s", maybe_billed=True) from None
        reply = called.reply
        if reply.status == 404:
            reason = replies.message_of(reply.json()) or "no reason given"
            raise _GoneError(f"HTTP 404: {self._connection.clean(reason)}")
        if not 200 <= reply.status < 300:
            answer = replies.answer_for_http_error(self._connection, reply, reply.json())
            raise UserError(f"the server refuses a batch job: {answer.reason}.")
        if called.error is not None:
            raise RetryLater(f"the answer is unreadable ({called.error})", maybe_billed=True)
        return called.value  # type: ignore[return-value]  # there was no error

    def _checked_name(self, job: types.BatchJob) -> str:
        """Return the name of a job, which is stored and shown.

        Raises:
            RetryLater: it cannot be a name.
        """
        name = str(job.name)
        if not _JOB_NAME.fullmatch(name) or self._connection.key.redact(name) != name:
            raise RetryLater("the server answers without the name of a job", maybe_billed=True)
        return name


class _GoneError(UserError):
    """The server does not know the job or file."""


def _read_line(line: bytes, connection: Connection) -> tuple[str, Answer]:
    """Return the key and answer of one line. An unreadable line is an `error` that may be paid
    for."""
    unreadable = replace(failed_answer("a line of the job is unreadable"), num_prompt_tokens=None)
    try:
        value: Any = json.loads(line.decode("utf-8"))
        key, response, error = str(value["key"]), value.get("response"), value.get("error")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "", unreadable
    if isinstance(response, dict):
        raw = connection.key.redact(json.dumps(response))
        try:
            return key, replies.answer_in(connection, response, raw, read_answer)
        except RetryLater as wait:
            return key, replace(failed_answer(str(wait), wait.raw), num_prompt_tokens=None)
    if not isinstance(error, dict):
        return key, unreadable
    record = invalid_answer if error.get("code") in _INVALID_ARGUMENT else failed_answer
    return key, record(f"job: {connection.clean(json.dumps(error))}")
