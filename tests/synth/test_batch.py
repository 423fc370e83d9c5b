import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gemini_server import GeminiServer
from google.genai import types
from google.genai.files import AsyncFiles
from synth_fakes import make_request, text_of

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, Price
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Answer, Request, RetryLater
from sft_probe.synth.asking.store import Store
from sft_probe.synth.writers.gemini import GeminiBatchWriter

KEY = "AIza-a-secret-key"
MODEL = "gemini-test"
PRICE = Price(0.0, 100.0)


class BatchRuns:
    """Runs of a batch writer on one server and one store; the first may be stopped while it
    waits."""

    def __init__(self, url: str, store: Store) -> None:
        self.store = store
        self.requests = [make_request(f"batch {i}") for i in range(20)]
        self.writer = GeminiBatchWriter(MODEL, base_url=url, poll_s=0.01)

    def run(self, requests: list[Request] | None = None, **limits: Any) -> list[Answer]:
        every = Limits(first_backoff_s=0.01, price=PRICE, **limits)
        return [
            answer
            for _, answer in ask_all(requests or self.requests, self.writer, self.store, every)
        ]

    def run_and_stop(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        async def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(GeminiBatchWriter, method, stopped)
            with pytest.raises(SystemExit):
                self.run()


@pytest.fixture
def batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[BatchRuns, GeminiServer]]:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    store = Store(tmp_path / "answers.sqlite")
    with GeminiServer() as server:
        yield BatchRuns(server.url, store), server
    store.close()


JOBS_PATH = f"/v1beta/models/{MODEL}:batchGenerateContent"


def test_a_batch_is_joined_by_key_and_asked_once(batch: tuple[BatchRuns, GeminiServer]) -> None:
    runs, server = batch
    expected = [text_of(request.prompt) for request in runs.requests]
    assert [answer.text for answer in runs.run()] == expected  # the server answers in reverse order
    assert [answer.text for answer in runs.run()] == expected
    assert set(server.calls.values()) == {1}
    assert server.paths[JOBS_PATH] == 1
    assert runs.store.cost_usd() == pytest.approx(20 * 0.0025)


def test_lines_that_fail_are_errors_and_asked_again(batch: tuple[BatchRuns, GeminiServer]) -> None:
    runs, server = batch
    requests = [
        make_request(f"{fault} @faults({fault})")
        for fault in ("500", "missing", "malformed", "safety", "400")
    ]
    assert [answer.status for answer in runs.run(requests)] == [
        "error",
        "error",
        "error",
        "blocked",
        "invalid",
    ]
    assert [answer.status for answer in runs.run(requests)] == ["ok", "ok", "ok", "blocked", "ok"]
    assert server.calls["safety @faults(safety)"] == 1


@pytest.mark.parametrize("method", ["read", "submit"])
def test_a_stopped_batch_run_finds_its_jobs_again(
    batch: tuple[BatchRuns, GeminiServer], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    runs, server = batch
    runs.run_and_stop(monkeypatch, method)
    assert runs.store.cost_usd() == pytest.approx(20 * 0.01)
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == 1
    assert runs.store.cost_usd() == pytest.approx(20 * 0.0025)


def test_a_job_whose_name_was_lost_is_found_by_its_display_name(
    batch: tuple[BatchRuns, GeminiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, server = batch
    submit = GeminiBatchWriter.submit

    async def killed_after(
        self: GeminiBatchWriter, display_name: str, requests: dict[str, Request]
    ) -> str:
        await submit(self, display_name, requests)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GeminiBatchWriter, "submit", killed_after)
        with pytest.raises(SystemExit):
            runs.run()
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == 1


@pytest.mark.parametrize(
    ("fault", "jobs"), [("cut", 1), ("500_after", 1), ("503", 2), ("429_retry_info", 2)]
)
def test_a_job_is_made_once_though_the_call_fails(
    batch: tuple[BatchRuns, GeminiServer], fault: str, jobs: int
) -> None:
    runs, server = batch
    server.job_faults, server.list_faults = [fault], ["503", "503"]
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == jobs
    assert set(server.calls.values()) == {1}


def test_a_job_that_may_exist_is_not_forgotten_when_the_attempts_end(
    batch: tuple[BatchRuns, GeminiServer],
) -> None:
    runs, server = batch
    server.job_faults = ["500_after"]
    with pytest.raises(UserError, match="Run the same command later"):
        runs.run(max_attempts=1)
    assert runs.store.cost_usd() == pytest.approx(20 * 0.01)
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == 1


def test_a_job_whose_results_are_gone_is_asked_for_again(
    batch: tuple[BatchRuns, GeminiServer], caplog: pytest.LogCaptureFixture
) -> None:
    runs, server = batch
    server.keeps_results = False
    assert {answer.status for answer in runs.run()} == {"error"}
    assert "HTTP 404: no such file for [key]" in caplog.text
    assert KEY not in caplog.text
    server.keeps_results = True
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == 2


def test_answers_to_other_requests_in_a_job_are_kept_too(
    batch: tuple[BatchRuns, GeminiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, server = batch
    runs.run_and_stop(monkeypatch, "read")
    some, others = runs.requests[:5], runs.requests[5:]
    assert {answer.status for answer in runs.run(some)} == {"ok"}
    assert [len(job.keys) for job in runs.store.jobs(runs.writer)] == [15]
    assert runs.store.cost_usd() == pytest.approx(5 * 0.0025 + 15 * 0.01)
    server.keeps_results = False
    assert {answer.status for answer in runs.run([*some, *others[:1]])} == {"ok", "error"}
    assert not runs.store.jobs(runs.writer)


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("upload status is not finalized")])
def test_errors_of_the_sdk_itself_are_retried(
    batch: tuple[BatchRuns, GeminiServer], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    runs, server = batch
    errors = [error]
    upload = AsyncFiles.upload

    async def flaky(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return await upload(*arguments, **options)

    monkeypatch.setattr(AsyncFiles, "upload", flaky)
    assert {answer.status for answer in runs.run()} == {"ok"}
    assert server.paths[JOBS_PATH] == 1


def test_a_failed_job_costs_nothing_and_is_asked_again(
    batch: tuple[BatchRuns, GeminiServer],
) -> None:
    runs, server = batch
    server.job_faults = ["job_failed"]
    answers = runs.run()
    assert {answer.status for answer in answers} == {"error"}
    assert "JOB_STATE_FAILED" in str(answers[0].reason)
    assert runs.store.cost_usd() == 0
    assert {answer.status for answer in runs.run()} == {"ok"}


def test_a_batch_keeps_its_budget_and_goes_on_with_more(
    batch: tuple[BatchRuns, GeminiServer],
) -> None:
    runs, server = batch
    with pytest.raises(
        UserError, match=r"15 requests were not sent.*\$0\.0550.*raise --max-cost-usd"
    ):
        runs.run(max_cost_usd=0.055)
    assert sum(server.calls.values()) == 5
    assert {answer.status for answer in runs.run(max_cost_usd=1)} == {"ok"}
    assert set(server.calls.values()) == {1}


def test_a_wrong_key_stops_a_batch_and_leaves_no_reservation(
    batch: tuple[BatchRuns, GeminiServer],
) -> None:
    runs, server = batch
    server.job_faults = ["bad_key"]
    with pytest.raises(UserError, match="accepts no request") as caught:
        runs.run()
    assert KEY not in str(caught.value)
    assert runs.store.cost_usd() == 0


def test_a_waiting_batch_reports_each_minute_and_gives_up_in_the_end(
    batch: tuple[BatchRuns, GeminiServer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, server = batch
    caplog.set_level(logging.INFO)
    server.polls_needed = 10**9
    monkeypatch.setattr(
        "sft_probe.synth.asking.batch.monotonic", itertools.count(0, 25).__next__
    )  # 25 s from look to look
    with pytest.raises(
        UserError, match=r"the batch jobs have not ended after .*the same command reads them later"
    ):
        runs.run(max_wait_s=600)
    lines = re.findall(
        r"waiting for (\d+) min: 0 of 1 batch jobs are read; batches/job0 has not ended",
        caplog.text,
    )
    assert [int(minutes) for minutes in lines] == [
        1,
        2,
        4,
        5,
        6,
        8,
        9,
    ]  # the first look after each minute
    server.polls_needed = 0
    assert {answer.status for answer in runs.run(max_wait_s=600)} == {"ok"}
    assert server.paths[JOBS_PATH] == 1


def test_a_large_batch_begins_with_a_small_job(batch: tuple[BatchRuns, GeminiServer]) -> None:
    runs, server = batch
    requests = [make_request(f"large {i}") for i in range(130)]
    server.always = "thoughts"
    with pytest.raises(
        UserError,
        match=r"of the first 50 answers none has a text: truncated: .*thoughts.*--thinking-tokens",
    ):
        runs.run(requests)
    assert server.calls.total() == 50
    server.always = ""
    answers = runs.run(requests)
    assert {answer.status for answer in answers} == {
        "ok"
    }  # the server no longer lets the model think
    assert server.paths[JOBS_PATH] == 3
    assert server.calls.total() == 50 + 130


@pytest.mark.parametrize(
    "name", ["files/x", "batches/../keys", f"batches/{KEY}", "", "None", "batches/a b"]
)
def test_an_impossible_job_name_is_not_stored(
    batch: tuple[BatchRuns, GeminiServer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _ = batch
    with pytest.raises(RetryLater, match="without the name of a job"):
        runs.writer._checked_name(types.BatchJob(name=name))
