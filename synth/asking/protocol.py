"""What a writer is asked, and what comes back: the one protocol of all writers, remote, local and
offline."""

import json
from dataclasses import dataclass, replace
from typing import Protocol

STATUSES = ("ok", "blocked", "truncated", "refused", "invalid", "error")
"""Of an answer. No status but `ok` carries a text that may enter a set; see `Answer.is_final`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be written."""

    doc_id: str
    category: str
    template: str
    """Name of the prompt template, such as `paraphrase@1`."""
    template_sha256: str
    prompt: str
    """The rendered template: all that a remote writer sees."""
    source_text: str
    """What the text is made from: rejected response, user turn or topic. Only the offline writer
    reads it."""
    num_words: int
    """Length aimed at, in words: that of the chosen response."""
    sample_index: int = 0
    """0, or 1 for the one retry of a text that failed a check."""
    temperature: float = 0.7
    max_output_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a writer gave back."""

    status: str
    """One of `STATUSES`."""
    raw: str
    """The whole answer as JSON, as it came; stored before anything is read from it."""
    text: str | None = None
    reason: str | None = None
    """Why the status is not `ok`, in the writer's words (finish reason, HTTP status)."""
    model_version: str | None = None
    num_prompt_tokens: int | None = None
    """None where the server does not say, or says what cannot be; the worst case then counts as
    spent."""
    num_output_tokens: int | None = None

    @property
    def is_turned_down(self) -> bool:
        """Whether the server did not take the request as it is (HTTP 400); that cost nothing."""
        return self.status == "invalid" and self.num_prompt_tokens == 0

    @property
    def is_final(self) -> bool:
        """Whether a model has answered. Anything else may change when a server is repaired, so it
        is asked again."""
        return self.status != "error" and not self.is_turned_down


def error_answer(reason: str, raw: str | None = None) -> Answer:
    """Return what stands for a request without an answer. The next run asks it again; it cost
    nothing (more)."""
    raw = json.dumps({"error": reason}) if raw is None else raw
    return Answer(status="error", raw=raw, reason=reason, num_prompt_tokens=0, num_output_tokens=0)


def turned_down(reason: str) -> Answer:
    """Return what stands for a request that the server does not take as it is. The next run asks it
    again."""
    return replace(error_answer(reason), status="invalid")


class Wait(Exception):  # noqa: N818 - an instruction, not a fault
    """Raised by a writer for an answer worth asking again: after `wait_s` seconds where the server
    said how long.

    `maybe_billed` where the call may have been paid for all the same (cut off, timed out,
    unreadable); `raw` is what the server sent, if anything.
    """

    def __init__(
        self,
        reason: str,
        wait_s: float | None = None,
        *,
        maybe_billed: bool = False,
        raw: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.maybe_billed = maybe_billed
        self.raw = raw


class Named(Protocol):
    """What identifies a writer."""

    name: str
    model: str
    api_version: str


class Writer(Named, Protocol):
    """Writes texts. Everything about retries, rates, money and storage is done around it."""

    async def write(self, request: Request) -> Answer:
        """One call. Raises `Wait` where the call failed in passing (429, 5xx, a cut connection, a
        time-out).

        A status of `error` is final for this run and asked again in the next. Raises `UserError`
        where no call can succeed (a wrong key or model).
        """
        ...

    async def close(self) -> None:
        """Frees connections. Called at the end of each run, in its event loop; the writer may be
        used again after."""
        ...
