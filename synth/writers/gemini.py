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
from sft_probe.synth.writers import key_version, least_thinking
from sft_probe.synth.writers.http import Connection, guarded_client
from sft_probe.synth.writers.keys import read_key
from sft_probe.synth.writers.replies import (
    answer_for_http_error,
    answer_in,
    checked_text,
    message_of,
    read_reply,
    token_count,
)

GEMINI_URL = "https://generativelanguage.googleapis.com"
_BLOCKED = (
    "SAFETY",
    "RECITATION",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "LANGUAGE",
    "IMAGE_SAFETY",
    "MODEL_ARMOR",
)


def gemini_connection(base_url: str | None, **options: Any) -> Connection:
    """Return a connection to `base_url`, else to GOOGLE_GEMINI_BASE_URL, else to Google."""
    key = read_key("GEMINI_API_KEY", "GOOGLE_API_KEY")
    return Connection(
        key, base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or GEMINI_URL, **options
    )


class GeminiSdk:
    """The SDK's client on a connection, without retries of its own, made for the event loop that
    first needs it."""

    def __init__(self, connection: Connection, api_version: str) -> None:
        self._connection, self._api_version = connection, api_version
        self._http: httpx2.AsyncClient | None = None
        self._client: genai.client.AsyncClient | None = None

    def client(self) -> genai.client.AsyncClient:
        """Return the client, a new one after `close`."""
        if self._client is None:
            self._http = guarded_client(self._connection)
            self._client = genai.Client(
                api_key=self._connection.key.value,
                vertexai=False,
                # else GOOGLE_GENAI_CLIENT_MODE in the environment can make it write to files
                debug_config=DebugConfig(client_mode="", replays_directory="", replay_id=""),
                http_options=types.HttpOptions(
                    base_url=self._connection.base_url,
                    api_version=self._api_version,
                    httpx_async_client=self._http,
                    # else the SDK repeats a call that was cut off, which may be paid for twice
                    retry_options=types.HttpRetryOptions(attempts=1),
                ),
            ).aio
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._http is not None:
            await self._client.aclose()
            await self._http.aclose()  # the SDK does not close a client of ours
            self._client = self._http = None


class GeminiWriter:
    """Writes with a Gemini model; the key comes from GEMINI_API_KEY or GOOGLE_API_KEY.

    Args:
        model: name, such as `gemini-3.5-flash-lite`.
        api_version: of the REST API.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.

    Raises:
        UserError: no key is set.
    """

    name = "gemini"

    def __init__(
        self, model: str, *, api_version: str = "v1beta", base_url: str | None = None
    ) -> None:
        self.model = model
        self.thinking = least_thinking(self.name, model)
        self.api_version = key_version(api_version, self.name, model)
        self._connection = gemini_connection(base_url)
        self._sdk = GeminiSdk(self._connection, api_version)

    async def write(self, request: Request) -> Answer:
        """Make one `generateContent` call."""
        config = types.GenerateContentConfig.model_validate(
            {
                **generation_config(request, self.thinking.config),
                "automaticFunctionCalling": {"disable": True},
                "shouldReturnHttpResponse": True,
            }
        )
        called = await self._connection.call(
            self._sdk.client().models.generate_content(
                model=self.model, contents=request.prompt, config=config
            )
        )
        return read_reply(self._connection, called.reply, read_answer)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        await self._sdk.close()


def generation_config(request: Request, thinking: dict[str, int | str]) -> dict[str, Any]:
    """Return the `generationConfig` of a request, as the REST API has it."""
    config: dict[str, Any] = {
        "temperature": request.temperature,
        "maxOutputTokens": request.max_output_tokens,
    }
    return config | ({"thinkingConfig": thinking} if thinking else {})


def read_answer(response: dict[str, Any], raw: str) -> Answer:
    """Return the answer in a `GenerateContentResponse`.

    A blocked prompt has no candidate. The text of a blocked or truncated answer is not used.
    """
    counts = response.get("usageMetadata")
    counts = counts if isinstance(counts, dict) else {}
    prompt_tokens, output_tokens = _usage(counts)
    if not any(response.get(name) for name in ("candidates", "promptFeedback", "usageMetadata")):
        return Answer(status="error", raw=raw, reason="the answer is none of the Gemini API")
    status, text, reason = _read_candidate(response)
    thoughts = token_count(counts.get("thoughtsTokenCount")) or 0
    if status != "ok" and output_tokens and thoughts > output_tokens / 2:
        reason = f"{reason}: {thoughts} of {output_tokens} output tokens are thoughts"
    version = response.get("modelVersion")
    return Answer(
        status=status,
        raw=raw,
        text=text,
        reason=reason,
        model_version=version if isinstance(version, str) else None,
        num_prompt_tokens=prompt_tokens,
        num_output_tokens=output_tokens,
    )


def _read_candidate(response: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return status, text and reason."""
    feedback, candidates = response.get("promptFeedback"), response.get("candidates")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        return "blocked", None, f"prompt: {feedback['blockReason']}"
    if not isinstance(candidates, list) or not candidates or not isinstance(candidates[0], dict):
        return "blocked", None, "prompt: no candidates"
    finish = str(candidates[0].get("finishReason"))
    if finish == "MAX_TOKENS":
        return "truncated", None, finish
    if finish in _BLOCKED:
        return "blocked", None, finish
    if finish != "STOP":
        return "invalid", None, f"finish reason {finish}"
    return checked_text(_text(candidates[0].get("content")))


def _text(content: Any) -> str:
    """Return the joined parts without the model's thoughts."""
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        return ""
    texts = [
        part.get("text") for part in parts if isinstance(part, dict) and not part.get("thought")
    ]
    return "".join(text for text in texts if isinstance(text, str))


def _usage(counts: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens of prompt and output, None where they are missing, partial or inconsistent.

    Thoughts are billed as output.
    """
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "totalTokenCount")
    given = {name: token_count(counts[name]) for name in names if counts.get(name) is not None}
    prompt, total = given.get("promptTokenCount"), given.get("totalTokenCount")
    if (
        prompt is None
        or None in given.values()
        or (total is None and "candidatesTokenCount" not in given)
    ):
        return None, None
    output = (given.get("candidatesTokenCount") or 0) + (given.get("thoughtsTokenCount") or 0)
    if total is None:
        return prompt, output
    return (prompt, total - prompt) if total >= prompt + output else (None, None)


_T = TypeVar("_T")
_TIMEOUT_S = 600.0  # of one call: a file of 10,000 requests may take minutes
_MAX_CALL_BYTES = 5_000_000
_MAX_FILE_BYTES = 2**29  # of the answers of a job
_INVALID_ARGUMENT = (3, 400)  # as gRPC and HTTP number it
_JOB_NAME = re.compile(r"batches/[\w.-]{1,200}", re.ASCII)


class GeminiBatchWriter:
    """Writes in batch jobs, each with one JSONL file of requests and one of answers.

    Args:
        model: name, such as `gemini-3.5-flash-lite`.
        api_version: of the REST API.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.
        poll_s: seconds between polls of a job.

    Raises:
        UserError: neither GEMINI_API_KEY nor GOOGLE_API_KEY is set.
    """

    name = "gemini-batch"

    def __init__(
        self,
        model: str,
        *,
        api_version: str = "v1beta",
        base_url: str | None = None,
        poll_s: float = 30.0,
    ) -> None:
        self.model = model
        self.thinking = least_thinking(self.name, model)
        self.api_version = key_version(api_version, self.name, model)
        self.poll_s = poll_s
        self._connection = gemini_connection(base_url, is_body_shown=True)
        self._sdk = GeminiSdk(self._connection, api_version)

    async def submit(self, display_name: str, requests: dict[str, Request]) -> str:
        """Upload the requests and create a job of them; return its name."""
        lines = "".join(
            json.dumps({"key": key, "request": self._body(item)}) + "\n"
            for key, item in requests.items()
        )
        file = await self._call(
            self._sdk.client().files.upload(
                file=io.BytesIO(lines.encode()),
                config=types.UploadFileConfig(display_name=display_name, mime_type="jsonl"),
            )
        )
        job = await self._call(
            self._sdk.client().batches.create(
                model=self.model,
                src=file.name,
                config=types.CreateBatchJobConfig(display_name=display_name),
            )
        )
        return self._checked_name(job)

    async def find(self, display_name: str) -> str | None:
        """Return the name of the job with this display name, among all jobs of the key."""

        async def search() -> types.BatchJob | None:
            async for job in await self._sdk.client().batches.list(
                config=types.ListBatchJobsConfig(page_size=100)
            ):
                if job.display_name == display_name:
                    return job
            return None

        job = await self._call(search())
        return None if job is None else self._checked_name(job)

    async def read(self, job_name: str) -> dict[str, Answer] | None:
        """Return the answers by key of a finished job, None before."""
        try:
            job = await self._call(self._sdk.client().batches.get(name=job_name))
            if self._checked_name(job) != job_name:
                raise RetryLater("the server answers with another job")
            if not job.done:
                return None
            if job.dest is None or job.dest.file_name is None:
                reason = (
                    f"{job.state.name if job.state else 'no state'}, "
                    f"{job.error or 'no reason given'}"
                )
                raise JobFailedError(self._connection.clean(reason))
            content = await self._call(
                self._sdk.client().files.download(file=job.dest.file_name), _MAX_FILE_BYTES
            )
        except _GoneError as error:
            raise JobFailedError(str(error)) from None
        return dict(
            _answer(line, self._connection) for line in content.split(b"\n") if line.strip()
        )

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        await self._sdk.close()

    def _body(self, request: Request) -> dict[str, object]:
        return {
            "contents": [{"role": "user", "parts": [{"text": request.prompt}]}],
            "generationConfig": generation_config(request, self.thinking.config),
        }

    async def _call(self, awaitable: Awaitable[_T], max_body_bytes: int = _MAX_CALL_BYTES) -> _T:
        """Await a call of the SDK. Raise `RetryLater` if it may succeed later, else `UserError`."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                called = await self._connection.call(awaitable, max_body_bytes)
        except TimeoutError:
            raise RetryLater(f"no answer in {_TIMEOUT_S:g} s", maybe_billed=True) from None
        reply = called.reply
        if reply.status == 404:
            raise _GoneError(
                f"HTTP 404: {self._connection.clean(message_of(reply.json()) or 'no reason given')}"
            )
        if not 200 <= reply.status < 300:
            answer = answer_for_http_error(self._connection, reply, reply.json())
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


def _answer(line: bytes, connection: Connection) -> tuple[str, Answer]:
    """Return the key and answer of one line. An unreadable line is an `error` that may be paid
    for."""
    unreadable = replace(failed_answer("a line of the job is unreadable"), num_prompt_tokens=None)
    try:
        value: Any = json.loads(line.decode("utf-8"))
        key, response = str(value["key"]), value.get("response")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "", unreadable
    if isinstance(response, dict):
        try:
            return key, answer_in(
                connection, response, connection.key.redact(json.dumps(response)), read_answer
            )
        except RetryLater as wait:
            return key, replace(failed_answer(str(wait), wait.raw), num_prompt_tokens=None)
    error = value.get("error")
    if not isinstance(error, dict):
        return key, unreadable
    is_turned_down = error.get("code") in _INVALID_ARGUMENT
    return key, (invalid_answer if is_turned_down else failed_answer)(
        f"job: {connection.clean(json.dumps(error))}"
    )
