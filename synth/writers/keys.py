"""API keys, read from the environment and redacted from everything that is logged or stored."""

import logging
import os
import re
import traceback
from typing import Any

from sft_probe.errors import UserError

_MIN_KEY_CHARS = 8
_secrets: set["Secret"] = set()


class Secret:
    """A key, sent to one origin and redacted from everything that is logged or stored."""

    def __init__(self, value: str) -> None:
        self.value = value
        # every character as itself, or escaped by JSON (within JSON), in a URL or in HTML
        escaped = (
            rf"(?:\\*(?:{re.escape(char)}|u00(?i:{ord(char):02x}))"
            rf"|%(?i:{ord(char):02x})|&#{ord(char)};)"
            for char in value
        )
        # a shorter value is not a secret but a word, such as the `EMPTY` of vLLM
        is_secret = len(value) >= _MIN_KEY_CHARS
        self._pattern = re.compile("".join(escaped)) if is_secret else None

    def redact(self, text: str) -> str:
        """Return `text` without the key, however its characters are escaped."""
        return self._pattern.sub("[key]", text) if self._pattern else text


def read_key(*names: str) -> Secret:
    """Return the key in the first of these environment variables that is set.

    From now on it is redacted from all log records.

    Raises:
        UserError: none is set, or its value has impossible characters.
    """
    for name in names:
        value = os.environ.get(name, "").strip()
        if not value:
            continue
        if not all("!" <= char <= "~" for char in value):
            raise UserError(
                f"the environment variable {name} holds characters that no key has. Copy the key "
                "again."
            )
        secret = Secret(value)
        if not _secrets:
            _redact_logs()
        _secrets.add(secret)
        return secret
    raise UserError(
        f"no key: set the environment variable {' or '.join(names)}. (Keys are read from nowhere "
        "else.)"
    )


def _redact_logs() -> None:
    """Redact the keys from every log record of this process: SDKs log headers, addresses and
    answers."""
    make = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # of a wrong format; `logging` would print the arguments as they are
            message = f"{record.msg} {record.args!r}"
        record.msg, record.args = redact_all(message), None
        if record.exc_info:
            error = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = redact_all(error).rstrip("\n")
        return record

    logging.setLogRecordFactory(make_redacted)


def redact_all(text: str) -> str:
    """Return `text` without any key that this process has read."""
    for secret in _secrets:
        text = secret.redact(text)
    return text
