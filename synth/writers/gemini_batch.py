"""Gemini's Batch API through `google-genai`: half price, within a day."""

import asyncio
import io
import json
from collections.abc import Awaitable
from typing import TypeVar

import aiohttp
from google import genai
from google.genai import errors, types

from sft_probe.errors import UserError
from sft_probe.files import jsonl_lines
from sft_probe.synth.batch import JobFailedError
from sft_probe.synth.requests import Answer, Request, Wait, error_answer, turned_down
from sft_probe.synth.writers.gemini import GeminiWriter, cut_off, read_answer, refused
from sft_probe.synth.writers.http import strike

_T = TypeVar("_T")
_TIMEOUT_S = 600.0  # of one call: a file of 10,000 requests may be on its way for minutes
_INVALID_ARGUMENT = (3, 400)  # as gRPC and HTTP number it


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
        self, model: str, *, api_version: str = "v1beta", base_url: str | None = None, poll_s: float = 30.0
    ) -> None:
        self.model = model
        self.api_version = api_version
        self.poll_s = poll_s
        self._gemini = GeminiWriter(model, api_version=api_version, base_url=base_url)

    async def submit(self, display_name: str, requests: dict[str, Request]) -> str:
        """Uploads the requests and makes a job of them; returns its name."""
        lines = "".join(json.dumps({"key": key, "request": _body(item)}) + "\n" for key, item in requests.items())
        file = await self._call(
            self._client.files.upload(
                file=io.BytesIO(lines.encode()),
                config=types.UploadFileConfig(display_name=display_name, mime_type="jsonl"),
            )
        )
        job = await self._call(
            self._client.batches.create(
                model=self.model, src=file.name, config=types.CreateBatchJobConfig(display_name=display_name)
            )
        )
        return str(job.name)

    async def find(self, display_name: str) -> str | None:
        """Looks through the jobs of this key."""
        pager = await self._call(self._client.batches.list(config=types.ListBatchJobsConfig(page_size=100)))
        while True:
            for job in pager.page:
                if job.display_name == display_name:
                    return str(job.name)
            try:
                await self._call(pager.next_page())
            except IndexError:
                return None

    async def read(self, job_name: str) -> dict[str, Answer] | None:
        """Answers by key of a job that has ended, None before."""
        try:
            job = await self._call(self._client.batches.get(name=job_name))
            if not job.done:
                return None
            if job.dest is None or job.dest.file_name is None:
                reason = f"{job.state.name if job.state else 'no state'}, {job.error or 'no reason given'}"
                raise JobFailedError(strike(reason, self._gemini.key))
            content = await self._call(self._client.files.download(file=job.dest.file_name))
        except _GoneError as error:
            raise JobFailedError(str(error)) from None
        text = strike(content.decode(), self._gemini.key)
        return dict(_answer(line) for line in jsonl_lines(text) if line.strip())

    async def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        await self._gemini.close()

    @property
    def _client(self) -> genai.client.AsyncClient:
        return self._gemini.client().aio

    async def _call(self, awaitable: Awaitable[_T]) -> _T:
        """Awaits a call of the SDK. Raises `Wait` for what may pass, else `UserError`."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await awaitable
        except errors.APIError as error:
            if error.code == 404:
                raise _GoneError(f"HTTP 404: {strike(str(error.message), self._gemini.key)}") from None
            answer = refused(error, self._gemini.key)
            raise UserError(f"the server refuses a batch job: {answer.reason}.") from None
        except aiohttp.ClientError as error:
            raise cut_off(error) from None
        except TimeoutError:
            raise Wait(f"no answer in {_TIMEOUT_S:g} s", maybe_billed=True) from None
        except (ValueError, KeyError) as error:  # what the SDK makes of an answer that it cannot read
            raise Wait(f"the answer is unreadable ({type(error).__name__})", maybe_billed=True) from None


class _GoneError(UserError):
    """The server does not know what was asked for."""


def _body(request: Request) -> dict[str, object]:
    return {
        "contents": [{"role": "user", "parts": [{"text": request.prompt}]}],
        "generationConfig": {"temperature": request.temperature, "maxOutputTokens": request.max_output_tokens},
    }


def _answer(line: str) -> tuple[str, Answer]:
    """Key and answer of one line; a line without a readable answer is an `error`."""
    try:
        value = json.loads(line)
        key, response = str(value["key"]), value.get("response")
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", error_answer(f"a line of the job is unreadable: {line[:100]!r}")
    if response is None:
        error = value.get("error")
        is_final = isinstance(error, dict) and error.get("code") in _INVALID_ARGUMENT
        return key, (turned_down if is_final else error_answer)(f"job: {json.dumps(error)[:300]}")
    try:
        return key, read_answer(json.dumps(response))
    except Wait as wait:
        return key, error_answer(str(wait))
