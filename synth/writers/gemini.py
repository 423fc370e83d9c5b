"""Gemini through `google-genai`, over REST."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.request import getproxies

import aiohttp
from google import genai
from google.genai import errors, types

from sft_probe.synth.requests import Answer, Request, Wait
from sft_probe.synth.writers.http import checked_text, key_from_environment, refused_call, strike, token_count

_BLOCKED = (
    "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY", "MODEL_ARMOR",
)  # fmt: skip


class GeminiWriter:
    """Writes with a Gemini model. The key is read from GEMINI_API_KEY or GOOGLE_API_KEY.

    Args:
        model: name, such as `gemini-3.5-flash-lite`.
        api_version: of the REST API.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.

    Raises:
        UserError: no key is set.
    """

    name = "gemini"

    def __init__(self, model: str, *, api_version: str = "v1beta", base_url: str | None = None) -> None:
        self.model = model
        self.api_version = api_version
        self._base_url = base_url
        self.key = key_from_environment("GEMINI_API_KEY", "GOOGLE_API_KEY")
        self._client: genai.Client | None = None
        self._session: aiohttp.ClientSession | None = None

    async def write(self, request: Request) -> Answer:
        """One `generateContent` call."""
        try:
            response = await self.client().aio.models.generate_content(
                model=self.model, contents=request.prompt, config=_config(request)
            )
        except errors.APIError as error:
            return refused(error, self.key)
        except aiohttp.ClientError as error:
            raise cut_off(error) from None
        except json.JSONDecodeError:
            raise Wait("the body of an HTTP error is no JSON") from None
        return read_answer(strike(response.sdk_http_response.body or "", self.key))

    async def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        if self._client is not None and self._session is not None:
            await self._client.aio.aclose()
            await self._session.close()
            self._client = self._session = None

    def client(self) -> genai.Client:
        """The SDK's client, with its own retries off; for the running event loop."""
        if self._client is None:
            # the SDK's own session looks into ~/.netrc before each call, in a thread
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=bool(getproxies()))
            self._client = genai.Client(
                api_key=self.key,
                vertexai=False,
                http_options=types.HttpOptions(
                    base_url=self._base_url,
                    api_version=self.api_version,
                    aiohttp_client=self._session,
                    # without this the SDK asks again after a cut connection, which may be paid for twice
                    retry_options=types.HttpRetryOptions(attempts=1),
                ),
            )
        return self._client


def _config(request: Request) -> types.GenerateContentConfig:
    return types.GenerateContentConfig(
        temperature=request.temperature,
        max_output_tokens=request.max_output_tokens,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        should_return_http_response=True,
    )


def refused(error: errors.APIError, key: str) -> Answer:
    """What to make of an HTTP error; see `refused_call`."""
    headers: Mapping[str, str] = getattr(error.response, "headers", None) or {}
    return refused_call(error.code, str(error.message), error.details, headers, key)


def cut_off(error: Exception) -> Wait:
    """A connection that broke: paid for, perhaps, unless it never stood."""
    billed = not isinstance(error, aiohttp.ClientConnectorError)
    return Wait(f"connection failed ({type(error).__name__})", maybe_billed=billed)


def read_answer(raw: str) -> Answer:
    """Reads the JSON of a `GenerateContentResponse`.

    A blocked prompt has no candidate; a blocked answer may have text, which is not used; nor is that of a cut one.

    Raises:
        Wait: `raw` is no JSON object.
    """
    try:
        response = json.loads(raw)
    except ValueError:
        response = None
    if not isinstance(response, dict):
        raise Wait(f"the answer is no JSON object: {raw[:100]!r}", maybe_billed=True)
    status, text, reason = _read_candidate(response)
    prompt_tokens, output_tokens = _usage(response.get("usageMetadata"))
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
    """Status, text and reason."""
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
    """The parts joined, less the model's thoughts."""
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        return ""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and not part.get("thought")]
    return "".join(text for text in texts if isinstance(text, str))


def _usage(usage: Any) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the output; thinking is billed as output."""
    counts = usage if isinstance(usage, dict) else {}
    prompt = token_count(counts.get("promptTokenCount"))
    if prompt is None:
        return None, None
    output = (token_count(counts.get("candidatesTokenCount")) or 0) + (
        token_count(counts.get("thoughtsTokenCount")) or 0
    )
    total = token_count(counts.get("totalTokenCount")) or 0
    return prompt, max(output, total - prompt)
