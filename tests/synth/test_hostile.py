"""Servers that do everything wrong, against every writer that speaks to one: exit, status, money,
key."""

import json
import logging
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gemini_server import GeminiServer
from helpers import Run
from synth_fakes import raw_rows, write_rows, write_templates

KEY = "AIza+S3cret/Key=0123"
PRICE = (1.0, 10.0)
NUM_DOCS = 24
NEVER = frozenset[str]()


@dataclass(frozen=True)
class Outcome:
    """What a fault must lead to; those that differ for `gemini-batch` stand apart."""

    message: str
    """A pattern of what is said, or empty where the run ends well."""
    statuses: frozenset[str] = NEVER
    """Of the answers in the store."""
    max_requests: int = 2 * NUM_DOCS
    batch_message: str | None = None
    batch_statuses: frozenset[str] = NEVER
    is_final: bool = False
    """Whether a model has answered, so that a repaired server is not asked the same again."""


def failed(message: str, statuses: str = "error", **fields: Any) -> Outcome:
    """Twenty failures in a row; a batch job is not even made."""
    batch = fields.pop("batch_message", "the server does not answer")
    return Outcome(
        f"20 requests in a row failed.*{message}",
        frozenset({statuses}),
        batch_message=batch,
        **fields,
    )


def useless(message: str, status: str) -> Outcome:
    """Answers without a text, which are paid for; a repaired server is asked again."""
    return Outcome(
        f"none has a text: {status}: {message}",
        frozenset({"error"}),
        24,
        None,
        frozenset({"error"}),
    )


UNREADABLE = "no JSON object in UTF-8"
GOOD = Outcome("", frozenset({"ok"}), 80, "", frozenset({"ok"}), is_final=True)
REDIRECT = Outcome(
    r"redirects \(HTTP 30\d\) to http://127.0.0.1:\d+/.* alone, so the run ends", max_requests=1
)
FAULTS = {
    "redirect_302": REDIRECT,
    "redirect_307": REDIRECT,
    "redirect_key": REDIRECT,
    "bare_304": Outcome(r"redirects \(HTTP 304\) to nowhere", max_requests=1),
    "location": Outcome(
        "accepts no request: HTTP 400: User location is not supported", max_requests=1
    ),
    "daily": Outcome("daily quota is used up: GenerateRequestsPerDay", max_requests=1),
    "no_credit": Outcome("accepts no request: HTTP 402: pay first", max_requests=1),
    "no_model": Outcome(
        "accepts no request: HTTP 404", max_requests=1, batch_message="HTTP 404: no such model"
    ),
    "bad_key": Outcome(r"accepts no request: HTTP 400: API key \[key\] not valid", max_requests=1),
    "bad_request": failed(
        "HTTP 400: too long", "invalid", batch_message="refuses a batch job: HTTP 400"
    ),
    "reason_key": failed(
        r"HTTP 400: no \[key\]", "invalid", batch_message="refuses a batch job: HTTP 400"
    ),
    "error_200": failed("HTTP 200 with an error: no such parameter"),
    "error_200_busy": failed("HTTP 200 with an error: busy"),
    "503": failed("HTTP 503", max_requests=6 * NUM_DOCS),
    "429": failed("HTTP 429", max_requests=6 * NUM_DOCS),
    "zero": failed("HTTP 429: slow down", max_requests=6 * NUM_DOCS),
    "odd_details": failed("HTTP 429: slow down", max_requests=6 * NUM_DOCS),
    "retry_odd": failed("HTTP 429", max_requests=6 * NUM_DOCS),
    "malformed_error": failed("HTTP 503", max_requests=6 * NUM_DOCS),
    "nested": failed(UNREADABLE),
    "bad_utf8": failed(UNREADABLE),
    "html": failed(UNREADABLE),
    "nothing": failed(UNREADABLE),
    "number": failed(UNREADABLE),
    "huge": failed("longer than 5 MB"),
    "bomb": failed("longer than 5 MB"),
    "endless": failed("longer than 5 MB"),
    "cut": failed("connection failed", batch_message="", batch_statuses=frozenset({"ok"})),
    "hangup": failed("connection failed", batch_message="", batch_statuses=frozenset({"ok"})),
    "thoughts": useless(
        r".*1021 of 1021 output tokens are thoughts.*--thinking-tokens", "truncated"
    ),
    "max_tokens": useless("", "truncated"),
    "empty": useless("empty text", "invalid"),
    "safety": useless("", "blocked"),
    "echo_finish": useless(r"finish reason \[key\]", "invalid"),
    "echo_key": GOOD,
    "echo_escaped": GOOD,
    "echo_split": GOOD,
    "no_usage": GOOD,
    "partial_usage": GOOD,
    "zero_usage": GOOD,
    "text_usage": GOOD,
    "true_usage": GOOD,
    "negative_usage": GOOD,
    "absurd_usage": GOOD,
}
WRITERS = ("gemini", "gemini-legacy", "gemini-batch", "openai")
SLICE = {
    "redirect_307": WRITERS,
    "thoughts": ("gemini", "openai"),
    "location": ("gemini",),
    "daily": ("openai",),
    "reason_key": ("gemini-legacy",),
    "error_200": ("openai",),
    "nested": ("gemini-legacy", "gemini-batch"),
    "echo_split": ("gemini",),
    "absurd_usage": ("gemini-batch",),
}
"""What is tried in every `make test`; the whole matrix is `full`."""
MATRIX = [
    pytest.param(fault, writer, marks=() if writer in SLICE.get(fault, ()) else pytest.mark.full)
    for fault in FAULTS
    for writer in WRITERS
]


@pytest.fixture(scope="module")
def thief() -> Iterator[GeminiServer]:
    """Another host, which must not hear of the key."""
    with GeminiServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(
            name, f" {KEY}\n"
        )  # as `$(cat key.txt)` of an editor on another system gives it
    monkeypatch.setattr("sft_probe.synth.asking.budget.backoff_s", lambda *_: 0.0)


def command(tmp_path: Path, writer: str, url: str, num_docs: int = NUM_DOCS) -> list[Any]:
    """`synth` of one category whose texts pass the checks."""
    templates, source = tmp_path / "templates", tmp_path / "pairs.jsonl"
    if not source.exists():
        write_rows(source, raw_rows(num_docs))
        write_templates(templates)
    base_url = f"{url}/openai/v1" if writer == "openai" else url
    given = {
        "source": source,
        "writer": writer,
        "model": "m",
        "base-url": base_url,
        "price": "{},{}".format(*PRICE),
        "categories": "non_response",
        "templates": templates,
        "out": tmp_path / "set",
    }
    return ["synth", *(part for name, value in given.items() for part in (f"--{name}", value))]


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for item in (
        value.items()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    ):
        yield from strings(item)


def is_planted(text: str) -> bool:
    """Whether the key stands in a text, as it is or with JSON escapes undone."""
    undone = re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
    try:
        decoded = "\n".join(strings(json.loads(text)))
    except (ValueError, RecursionError):
        decoded = ""
    return any(KEY in one for one in (text, undone, undone.replace("\\", ""), decoded))


def hunt(folder: Path, said: str) -> list[str]:
    """Where the key stands: in files, in each value of the store, in what was printed or logged."""
    found = ["output"] if is_planted(said) else []
    files = [path for path in folder.rglob("*") if path.is_file()]
    found += [
        path.name for path in files if is_planted(path.read_bytes().decode("utf-8", "replace"))
    ]
    for store in folder.rglob("answers.sqlite"):
        with sqlite3.connect(store) as connection:
            for table in ("answers", "jobs"):
                rows = connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 - a name of ours
                found += [
                    f"{table}: {value}" for row in rows for value in row if is_planted(str(value))
                ]
        connection.close()
    return found


def stored(out: Path) -> tuple[set[str], float]:
    """Statuses of the answers, and what is counted as spent."""
    path = out / "synthesis/answers.sqlite"
    if not path.exists():
        return set(), 0.0
    with sqlite3.connect(path) as connection:
        statuses = {row[0] for row in connection.execute("SELECT status FROM answers")}
        sums = [
            f"SELECT total(cost_usd) FROM {table}"  # noqa: S608
            for table in ("answers", "reservations", "jobs")
        ]
        spent = sum(connection.execute(one).fetchone()[0] for one in sums)
    connection.close()
    return statuses, spent


def billed_usd(server: GeminiServer) -> float:
    return sum(prompt * PRICE[0] + output * PRICE[1] for prompt, output in server.billed) / 1e6


@pytest.mark.parametrize(("fault", "writer"), MATRIX)
def test_a_hostile_server_ends_a_run_with_one_message_and_a_repaired_one_finishes_it(  # noqa: PLR0917 - fixtures
    fault: str,
    writer: str,
    thief: GeminiServer,
    tmp_path: Path,
    sft_probe: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    thief.seen.clear()
    expected, is_batch = FAULTS[fault], writer == "gemini-batch"
    with GeminiServer(always=fault, thief=thief.url) as server:
        server.polls_needed = 1
        asked = command(tmp_path, writer, server.url)
        bound = sft_probe(*asked, "--dry-run")
        assert not (tmp_path / "set").exists()
        result = sft_probe(*asked)
        message = (
            expected.batch_message
            if is_batch and expected.batch_message is not None
            else expected.message
        )
        assert (result.returncode, "Traceback" in result.stderr) == (2 if message else 0, False), (
            result.stderr
        )
        assert re.search(message, result.stderr, re.DOTALL), result.stderr
        statuses, spent_usd = stored(tmp_path / "set")
        assert statuses == (expected.batch_statuses if is_batch else expected.statuses)
        if not is_batch:
            assert server.num_requests <= expected.max_requests
        most_usd = float(bound.stdout.rpartition("at most ")[2])
        assert billed_usd(server) <= spent_usd + 1e-9
        assert (
            max(billed_usd(server), spent_usd) <= most_usd + 1e-4
        )  # it is printed with four digits
        assert not hunt(tmp_path, result.stdout + result.stderr + caplog.text)
        assert not thief.seen
        if not expected.is_final:  # the cause is repaired: nothing is lost
            server.always = ""
            again = sft_probe(*asked)
            assert again.returncode == 0, again.stderr
            assert f"{NUM_DOCS} docs" in again.stderr
