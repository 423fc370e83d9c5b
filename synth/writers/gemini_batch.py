"""Gemini's Batch API through `google-genai`: half price, within a day."""

import asyncio
import io
import json
import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, TypeVar

from google.genai import types

from sft_probe.errors import UserError
from sft_probe.synth.asking.batch import JobFailedError
from sft_probe.synth.asking.protocol import Answer, Request, Wait, error_answer, turned_down
from sft_probe.synth.writers.gemini import (
    GeminiSdk,
    gemini_connection,
    generation_config,
    read_answer,
)
from sft_probe.synth.writers.http import Connection, message_of
from sft_probe.synth.writers.thinking import key_version, least_thinking

_T = TypeVar("_T")
_TIMEOUT_S = 600.0  # of one call: a file of 10,000 requests may be on its way for minutes
_MAX_CALL_BYTES = 5_000_000
_MAX_FILE_BYTES = 2**29  # of the answers of a job
_INVALID_ARGUMENT = (3, 400)  # as gRPC and HTTP number it
_JOB_NAME = re.compile(r"batches/[\w.-]{1,200}", re.ASCII)


class GeminiBatchWriter:
    """A `BatchWriter`: one JSONL file of requests and one of answers per job, joined by key.

    Args:
        model: name, such as `gemini-3.5-flash-lite`.
        api_version: of the REST API.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.
        poll_s: seconds between looks at a job.

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
        """Upload the requests and make a job of them; return its name."""
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
        """Look through the jobs of this key."""

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
        """Return the answers by key of a job that has ended, None before."""
        try:
            job = await self._call(self._sdk.client().batches.get(name=job_name))
            if self._checked_name(job) != job_name:
                raise Wait("the server answers with another job")
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
        """Await a call of the SDK. Raise `Wait` for what may pass, else `UserError`."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                called = await self._connection.call(awaitable, max_body_bytes)
        except TimeoutError:
            raise Wait(f"no answer in {_TIMEOUT_S:g} s", maybe_billed=True) from None
        reply = called.reply
        if reply.status == 404:
            raise _GoneError(
                f"HTTP 404: {self._connection.clean(message_of(reply.json()) or 'no reason given')}"
            )
        if not 200 <= reply.status < 300:
            answer = self._connection.failed(reply, reply.json())
            raise UserError(f"the server refuses a batch job: {answer.reason}.")
        if called.error is not None:
            raise Wait(f"the answer is unreadable ({called.error})", maybe_billed=True)
        return called.value  # type: ignore[return-value]  # there was no error

    def _checked_name(self, job: types.BatchJob) -> str:
        """Return the name of a job, which is stored and shown. Raise `Wait` where it cannot be
        one."""
        name = str(job.name)
        if not _JOB_NAME.fullmatch(name) or self._connection.key.redact(name) != name:
            raise Wait("the server answers without the name of a job", maybe_billed=True)
        return name


class _GoneError(UserError):
    """The server does not know what was asked for."""


def _answer(line: bytes, connection: Connection) -> tuple[str, Answer]:
    """Return key and answer of one line; a line without a readable answer is an `error` that may be
    paid for."""
    unreadable = replace(error_answer("a line of the job is unreadable"), num_prompt_tokens=None)
    try:
        value: Any = json.loads(line.decode("utf-8"))
        key, response = str(value["key"]), value.get("response")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "", unreadable
    if isinstance(response, dict):
        try:
            return key, connection.answer(
                response, connection.key.redact(json.dumps(response)), read_answer
            )
        except Wait as wait:
            return key, replace(error_answer(str(wait), wait.raw), num_prompt_tokens=None)
    error = value.get("error")
    if not isinstance(error, dict):
        return key, unreadable
    is_turned_down = error.get("code") in _INVALID_ARGUMENT
    return key, (turned_down if is_turned_down else error_answer)(
        f"job: {connection.clean(json.dumps(error))}"
    )
