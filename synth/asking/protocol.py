"""Requests, answers, and the one protocol of all writers, remote, local and offline."""

import json
from dataclasses import dataclass, field, replace
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to write."""

    doc_id: str
    category: str
    template: str
    """Name of the prompt template, such as `paraphrase@1`."""
    template_sha256: str
    prompt: str
    """The rendered template, all that a remote writer sees."""
    source_text: str
    """The text to start from: rejected response, user turn or topic. Used by the checks."""
    num_words: int
    """Target length in words, that of the chosen response."""
    sample_index: int = 0
    """0, or 1 for the one retry of a text that failed a check."""
    temperature: float = 0.7
    max_output_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a writer returned."""

    status: str
    """`ok`, `blocked`, `truncated`, `refused`, `invalid` or `error`. Only `ok` carries a text that
    may enter a set."""
    raw: str
    """The whole answer as JSON, as it came; stored before anything is read from it."""
    text: str | None = None
    reason: str | None = None
    """Why the status is not `ok`, in the writer's words (finish reason, HTTP status)."""
    model_version: str | None = None
    num_prompt_tokens: int | None = None
    """None where the server reports no count, or an impossible one. The worst case is then counted
    as spent."""
    num_output_tokens: int | None = None

    @property
    def is_turned_down(self) -> bool:
        """Whether the server did not accept the request (HTTP 400), which cost nothing."""
        return self.status == "invalid" and self.num_prompt_tokens == 0

    @property
    def is_final(self) -> bool:
        """Whether a model has answered. Other answers are requested again by the next run."""
        return self.status != "error" and not self.is_turned_down


def failed_answer(reason: str, raw: str | None = None) -> Answer:
    """Record that a request failed and why, at no (further) cost. The next run asks it again."""
    raw = json.dumps({"error": reason}) if raw is None else raw
    return Answer(status="error", raw=raw, reason=reason, num_prompt_tokens=0, num_output_tokens=0)


def invalid_answer(reason: str) -> Answer:
    """Record that the server does not accept a request. The next run asks it again."""
    return replace(failed_answer(reason), status="invalid")


@dataclass(eq=False)
class RetryLater(Exception):  # noqa: N818 - an instruction, not a fault
    """Raised by a writer for a call that may succeed later."""

    reason: str
    """Why the call failed."""
    wait_s: float | None = None
    """Seconds to wait, where the server named them."""
    maybe_billed: bool = field(default=False, kw_only=True)
    """Whether the call may have been paid for (cut off, timed out, unreadable)."""
    raw: str | None = field(default=None, kw_only=True)
    """What the server sent, if anything."""

    def __str__(self) -> str:
        return self.reason


class WriterId(Protocol):
    """What identifies a writer."""

    name: str
    """Name of the writer, as `--writer` takes it."""
    model: str
    api_version: str
    """Version of the API, with whatever else changes the texts."""


class Writer(WriterId, Protocol):
    """Writes texts. Retries, rates, money and storage are handled by the caller."""

    async def write(self, request: Request) -> Answer:
        """Make one call.

        An answer with the status `error` is final for this run and requested again by the next.

        Raises:
            RetryLater: the call failed for now (429, 5xx, a cut connection, a time-out).
            UserError: no call can succeed (a wrong key or model).
        """
        ...

    async def close(self) -> None:
        """Close connections, at the end of a run, in its event loop. The writer may be used again
        afterwards."""
        ...
