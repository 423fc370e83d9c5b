"""Servers with OpenAI's chat-completions protocol: OpenAI itself, vLLM, Ollama and others."""

import os
from typing import Any

import openai

from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.writers.http import Connection, guarded_client
from sft_probe.synth.writers.keys import Secret, read_key
from sft_probe.synth.writers.replies import answer_of, at, checked_text, read_reply, token_count

_FINISHES = {"length": "truncated", "content_filter": "blocked"}
_THOUGHTS = ("reasoning_content", "reasoning")  # as vLLM, DeepSeek and others name them
_OPENAI_URL = "https://api.openai.com/v1"


class OpenAIWriter:
    """Writes with a chat model. The key comes from OPENAI_API_KEY; a server of your own needs none.

    Args:
        model: name of the model at the server.
        base_url: address of the server, with `/v1`; default: OPENAI_BASE_URL, else OpenAI's.

    Raises:
        UserError: no key is set, and the server is OpenAI's.
    """

    name = "openai"
    api_version = "v1"

    def __init__(self, model: str, *, base_url: str | None = None) -> None:
        self.model = model
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
        own_server = base_url.rstrip("/") != _OPENAI_URL
        has_key = bool(os.environ.get("OPENAI_API_KEY", "").strip())
        key = Secret("none") if own_server and not has_key else read_key("OPENAI_API_KEY")
        self._connection = Connection(key, base_url)
        # OpenAI's newer models know only the new name, other servers often only the old one
        self._max_tokens_name = "max_tokens" if own_server else "max_completion_tokens"
        self._client: openai.AsyncOpenAI | None = None

    async def write(self, request: Request) -> Answer:
        """Request one chat completion."""
        self._client = self._client or openai.AsyncOpenAI(
            api_key=self._connection.key.value,
            base_url=self._connection.base_url,
            max_retries=0,
            http_client=guarded_client(self._connection),
        )
        called = await self._connection.call(
            self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": request.prompt}],
                temperature=request.temperature,
                extra_body={self._max_tokens_name: request.max_output_tokens},
            )
        )
        return read_reply(self._connection, called.reply, read_completion)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def read_completion(response: dict[str, Any], raw: str) -> Answer:
    """Return the answer in a chat completion."""
    if not response.get("choices") and not isinstance(response.get("usage"), dict):
        return Answer(status="error", raw=raw, reason="the answer is no chat completion")
    prompt, output = (
        token_count(at(response, "usage", name)) for name in ("prompt_tokens", "completion_tokens")
    )
    return answer_of(
        raw,
        _read_choice(response),
        version=response.get("model"),
        tokens=(prompt, output),
        thoughts=at(response, "usage", "completion_tokens_details", "reasoning_tokens"),
    )


def _read_choice(response: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return status, text and reason."""
    message = at(response, "choices", 0, "message")
    if not isinstance(message, dict):
        return "invalid", None, "no choice with a message"
    finish, text = str(at(response, "choices", 0, "finish_reason")), message.get("content")
    is_thought = not text and any(message.get(name) for name in _THOUGHTS)
    if message.get("refusal") and finish not in _FINISHES:
        return "refused", None, str(message["refusal"])
    status = _FINISHES.get(finish, "invalid" if finish != "stop" or is_thought else "ok")
    if status != "ok":
        return status, None, f"finish reason {finish}{': thoughts alone' if is_thought else ''}"
    return checked_text(text if isinstance(text, str) else "")
