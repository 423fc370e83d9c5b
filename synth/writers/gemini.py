"""Gemini through `google-genai`, over REST."""

import os
from typing import Any

import httpx2
from google import genai
from google.genai import types
from google.genai.client import DebugConfig

from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.writers.http import Connection, checked_text, token_count
from sft_probe.synth.writers.keys import read_key
from sft_probe.synth.writers.thinking import key_version, least_thinking
from sft_probe.synth.writers.transport import guarded_client

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
    """Return the connection of a Gemini writer: to `base_url`, else to GOOGLE_GEMINI_BASE_URL, else
    to Google."""
    key = read_key("GEMINI_API_KEY", "GOOGLE_API_KEY")
    return Connection(
        key, base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or GEMINI_URL, **options
    )


class GeminiSdk:
    """The SDK's client on a connection, with its own retries off. It is made for the event loop
    that first needs it."""

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
                # its defaults come from the environment, where GOOGLE_GENAI_CLIENT_MODE makes it
                # write to files
                debug_config=DebugConfig(client_mode="", replays_directory="", replay_id=""),
                http_options=types.HttpOptions(
                    base_url=self._connection.base_url,
                    api_version=self._api_version,
                    httpx_async_client=self._http,
                    # without this the SDK asks again after a cut connection, which may be paid for
                    # twice
                    retry_options=types.HttpRetryOptions(attempts=1),
                ),
            ).aio
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._http is not None:
            await self._client.aclose()
            await self._http.aclose()  # the SDK leaves one that it was given open
            self._client = self._http = None


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
        return self._connection.read(called.reply, read_answer)

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

    A blocked prompt has no candidate; a blocked answer may have text, which is not used; nor is
    that of a cut one.
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
    """Return the parts joined, less the model's thoughts."""
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        return ""
    texts = [
        part.get("text") for part in parts if isinstance(part, dict) and not part.get("thought")
    ]
    return "".join(text for text in texts if isinstance(text, str))


def _usage(counts: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens of prompt and output, None where they are missing, partial or contradict
    each other.

    Thinking is billed as output.
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
