"""Any server that speaks the chat-completions protocol of OpenAI: OpenAI itself, vLLM, Ollama."""

import json
import os
from typing import Any

import openai

from sft_probe.synth.requests import Answer, Request, Wait
from sft_probe.synth.writers.http import checked_text, key_from_environment, refused_call, strike, token_count

# the package takes httpx or its successor, so its exceptions are known by name
_NEVER_STOOD = ("ConnectError", "ConnectTimeout")
_OPENAI_URL = "https://api.openai.com/v1"


class OpenAIWriter:
    """Writes with a chat model. The key is read from OPENAI_API_KEY; a server of your own needs none.

    Args:
        model: name that the server knows.
        base_url: of the server, with its `/v1`; default: OPENAI_BASE_URL, else OpenAI's.

    Raises:
        UserError: no key is set, and the server is OpenAI's.
    """

    name = "openai"
    api_version = "v1"

    def __init__(self, model: str, *, base_url: str | None = None) -> None:
        self.model = model
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
        own_server = self._base_url != _OPENAI_URL
        self._key = (
            "none" if own_server and "OPENAI_API_KEY" not in os.environ else key_from_environment("OPENAI_API_KEY")
        )
        # OpenAI's newer models know only the new name, other servers often only the old one
        self._max_tokens_name = "max_tokens" if own_server else "max_completion_tokens"
        self._client: openai.AsyncOpenAI | None = None

    async def write(self, request: Request) -> Answer:
        """One chat completion."""
        if self._client is None:
            self._client = openai.AsyncOpenAI(api_key=self._key, base_url=self._base_url, max_retries=0)
        body: dict[str, Any] = {self._max_tokens_name: request.max_output_tokens}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": request.prompt}],
                temperature=request.temperature,
                extra_body=body,
            )
        except openai.APIStatusError as error:
            return refused_call(error.status_code, error.message, error.body, error.response.headers, self._key)
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise Wait(f"connection failed ({cause})", maybe_billed=cause not in _NEVER_STOOD) from None
        return read_completion(strike(response.text, self._key))

    async def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def read_completion(raw: str) -> Answer:
    """Reads the JSON of a chat completion. Raises `Wait` where it is no JSON object."""
    try:
        response = json.loads(raw)
    except ValueError:
        response = None
    if not isinstance(response, dict):
        raise Wait(f"the answer is no JSON object: {raw[:100]!r}", maybe_billed=True)
    status, text, reason = _read_choice(response.get("choices"))
    usage, version = response.get("usage"), response.get("model")
    counts = usage if isinstance(usage, dict) else {}
    return Answer(
        status=status,
        raw=raw,
        text=text,
        reason=reason,
        model_version=version if isinstance(version, str) else None,
        num_prompt_tokens=token_count(counts.get("prompt_tokens")),
        num_output_tokens=token_count(counts.get("completion_tokens")),
    )


def _read_choice(choices: Any) -> tuple[str, str | None, str | None]:
    """Status, text and reason."""
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return "invalid", None, "no choice with a message"
    finish = str(choice.get("finish_reason"))
    if finish == "length":
        return "truncated", None, finish
    if finish == "content_filter":
        return "blocked", None, finish
    if message.get("refusal"):
        return "refused", None, str(message["refusal"])[:300]
    if finish != "stop":
        return "invalid", None, f"finish reason {finish}"
    text = message.get("content")
    return checked_text(text if isinstance(text, str) else "")
