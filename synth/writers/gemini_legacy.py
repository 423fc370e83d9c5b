"""Gemini through `google-generativeai`, the predecessor of `google-genai`, over REST."""

import io
import os
import warnings
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError

from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.writers import in_thread
from sft_probe.synth.writers.gemini import gemini_connection, read_answer
from sft_probe.synth.writers.http import Connection, StoppedError
from sft_probe.synth.writers.replies import read_reply

with warnings.catch_warnings():
    # each import warns that the package is retired, and that Python 3.11 will be
    warnings.simplefilter("ignore", FutureWarning)
    import google.generativeai as genai
    from google.ai.generativelanguage_v1beta import GenerativeServiceClient
    from google.api_core.client_options import ClientOptions

_CHUNK_BYTES = 65536
_NEVER_SENT = (NewConnectionError, ConnectTimeoutError, ProxyError)
_MAX_CONNECTIONS = 100


class LegacyGeminiWriter:
    """Writes with a Gemini model, one thread per call. The package knows only the API v1beta.

    Args:
        model: name, such as `gemini-2.5-flash-lite`.
        base_url: of the server; default: GOOGLE_GEMINI_BASE_URL, else Google's.
        timeout_s: longest silence, after which a thread gives up its call.

    Raises:
        UserError: neither GEMINI_API_KEY nor GOOGLE_API_KEY is set.
    """

    name = "gemini-legacy"
    api_version = "v1beta"

    def __init__(
        self, model: str, *, base_url: str | None = None, timeout_s: float = 120.0
    ) -> None:
        self.model = model
        self._timeout_s = timeout_s
        self._connection = gemini_connection(base_url)
        options = ClientOptions(
            api_key=self._connection.key.value, api_endpoint=self._connection.base_url
        )
        self._service = GenerativeServiceClient(transport="rest", client_options=options)
        # private: the package offers no other access to its HTTP session
        session: requests.Session = self._service.transport._session
        session.trust_env = False  # neither ~/.netrc nor proxies that would see the key
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        for scheme in ("https://", "http://"):
            session.mount(scheme, _GuardedAdapter(self._connection))
        self._model = genai.GenerativeModel(model)
        # private: else the package makes a client of its own, with another session
        self._model._client = self._service

    async def write(self, request: Request) -> Answer:
        """Make one `generateContent` call."""
        called = await self._connection.call(in_thread(self._generate, request))
        return read_reply(self._connection, called.reply, read_answer)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._service.transport._session.close()

    def _generate(self, request: Request) -> object:
        return self._model.generate_content(
            request.prompt,
            generation_config={
                "temperature": request.temperature,
                "max_output_tokens": request.max_output_tokens,
            },
            request_options={"retry": None, "timeout": self._timeout_s},
        )


class _GuardedAdapter(HTTPAdapter):
    """Sends requests to one origin, and reads each body whole before the package sees it."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(pool_maxsize=_MAX_CONNECTIONS)
        self._connection = connection

    def send(
        self, request: requests.PreparedRequest, *args: Any, **options: Any
    ) -> requests.Response:
        """Send one request. Raise `StoppedError` for everything but a success."""
        self._connection.note_request(str(request.url))
        proxy = self._connection.proxy()
        options |= {"stream": True, "proxies": {"https": proxy} if proxy else {}}
        body = bytearray()
        try:
            with super().send(request, *args, **options) as response:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    self._connection.add_chunk(body, chunk)
        except (requests.RequestException, OSError) as error:
            cause = getattr(error.args[0], "reason", None) if error.args else None
            problem = f"connection failed ({type(error).__name__})"
            self._connection.note_problem(problem, is_sent=not isinstance(cause, _NEVER_SENT))
            raise StoppedError from None
        shown = requests.Response()
        shown.raw = io.BytesIO(
            self._connection.note_reply(response.status_code, response.headers, bytes(body))
        )
        shown.status_code, shown.url, shown.request = response.status_code, response.url, request
        return shown
