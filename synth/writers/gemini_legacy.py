"""Gemini through `google-generativeai`, the package that came before `google-genai`, over REST."""

import asyncio
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from google.protobuf.json_format import MessageToJson, ParseError
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from sft_probe.synth.requests import Answer, Request, Wait
from sft_probe.synth.writers.gemini import read_answer
from sft_probe.synth.writers.http import key_from_environment, refused_call, strike

with warnings.catch_warnings():
    # at each import it says that it is retired, and that Python 3.11 will be
    warnings.simplefilter("ignore", FutureWarning)
    import google.generativeai as genai
    from google.api_core.exceptions import GoogleAPICallError

_MAX_THREADS = 10  # as many connections as the package keeps


class LegacyGeminiWriter:
    """Writes with a Gemini model; each call takes a thread, 10 at most. The package knows the API v1beta only.

    Args:
        model: name, such as `gemini-2.5-flash-lite`.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.
        timeout_s: after which a thread gives up its call.

    Raises:
        UserError: neither GEMINI_API_KEY nor GOOGLE_API_KEY is set.
    """

    name = "gemini-legacy"
    api_version = "v1beta"

    def __init__(self, model: str, *, base_url: str | None = None, timeout_s: float = 120.0) -> None:
        self.model = model
        self._timeout_s = timeout_s
        self._key = key_from_environment("GEMINI_API_KEY", "GOOGLE_API_KEY")
        base_url = base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL")
        genai.configure(
            api_key=self._key,
            transport="rest",
            client_options={"api_endpoint": base_url} if base_url else None,
        )
        self._model = genai.GenerativeModel(model)
        self._executor: ThreadPoolExecutor | None = None

    async def write(self, request: Request) -> Answer:
        """One `generateContent` call."""
        self._executor = self._executor or ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="gemini-legacy")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._write, request)

    async def close(self) -> None:
        """Ends the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    def _write(self, request: Request) -> Answer:
        try:
            response = self._model.generate_content(
                request.prompt,
                generation_config={"temperature": request.temperature, "max_output_tokens": request.max_output_tokens},
                request_options={"retry": None, "timeout": self._timeout_s},
            )
        except GoogleAPICallError as error:
            headers = getattr(error.response, "headers", {})
            return refused_call(int(error.code), error.message, {"details": error.details}, headers, self._key)
        except requests.RequestException as error:
            raise Wait(f"connection failed ({type(error).__name__})", maybe_billed=_was_connected(error)) from None
        except ParseError:
            raise Wait("the answer is no JSON object", maybe_billed=True) from None
        return read_answer(strike(_to_json(response), self._key))


def _was_connected(error: requests.RequestException) -> bool:
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return not isinstance(cause, NewConnectionError | ConnectTimeoutError)


def _to_json(response: Any) -> str:
    """The answer as the REST API gave it, less fields that the package does not know."""
    message = genai.protos.GenerateContentResponse(response.to_dict())
    text: str = MessageToJson(genai.protos.GenerateContentResponse.pb(message))
    return text
