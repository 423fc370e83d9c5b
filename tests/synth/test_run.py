import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synth_fakes import CENT, FAST, FakeWriter, make_request, prompts, text_of

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, Pace, backoff_s
from sft_probe.synth.asking.live import Progress, ask_all
from sft_probe.synth.asking.protocol import Answer, Request, RetryLater
from sft_probe.synth.asking.store import Store

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "answers.sqlite")
    yield store
    store.close()


def texts(answers: Iterator[tuple[Request, Answer]]) -> list[tuple[str, str | None]]:
    return [(request.prompt, answer.text) for request, answer in answers]


def test_all_answers_come_in_order_and_are_asked_for_once(store: Store) -> None:
    writer, requests = FakeWriter(), prompts(300)
    expected = [(request.prompt, text_of(request.prompt)) for request in requests]
    assert texts(ask_all(requests, writer, store, FAST)) == expected
    assert 1 < writer.most_in_flight <= 8
    assert set(writer.calls.values()) == {1}
    assert (
        texts(ask_all(requests, FakeWriter(lambda *_: ValueError("called again")), store, FAST))
        == expected
    )
    assert writer.num_closed == 1


def test_requests_are_drawn_only_as_far_as_needed(store: Store) -> None:
    drawn = itertools.count()
    answers = ask_all(
        (make_request(f"p{next(drawn)}") for _ in range(10**9)), FakeWriter(), store, FAST
    )
    assert next(answers)[0].prompt == "p0"
    answers.close()
    assert next(drawn) < 5000


def test_the_same_prompt_is_asked_for_once_though_both_are_in_flight(store: Store) -> None:
    writer = FakeWriter()
    requests = [make_request("p", doc_id="a"), make_request("p", doc_id="b"), make_request("q")]
    assert [answer.text for _, answer in ask_all(requests, writer, store, FAST)] == [
        text_of(p) for p in "ppq"
    ]
    assert writer.calls == {"p": 1, "q": 1}


def test_requests_that_fail_for_a_moment_are_retried(store: Store) -> None:
    writer = FakeWriter(lambda _, call: RetryLater("HTTP 503") if call < 3 else None)
    assert all(answer.status == "ok" for _, answer in ask_all(prompts(5), writer, store, FAST))
    assert set(writer.calls.values()) == {3}


def test_requests_that_keep_failing_are_errors_and_retried_by_the_next_run(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = FakeWriter(
        lambda prompt, call: RetryLater("HTTP 503: busy") if prompt == "p1" and call <= 6 else None
    )
    answers = [
        answer for _, answer in ask_all(prompts(3), writer, store, FAST, progress=Progress(3))
    ]
    assert [answer.status for answer in answers] == ["ok", "error", "ok"]
    assert (answers[1].text, answers[1].reason) == (None, "HTTP 503: busy")
    assert writer.calls["p1"] == 6
    assert "3 of 3 texts done, 0 from the store" in caplog.text
    assert "1 error" in caplog.text
    assert [answer.status for _, answer in ask_all(prompts(3), writer, store, FAST)] == ["ok"] * 3
    assert writer.calls == {"p0": 1, "p1": 7, "p2": 1}


@pytest.mark.parametrize("status", ["blocked", "truncated", "refused", "invalid"])
def test_requests_that_would_fail_again_are_not_retried(store: Store, status: str) -> None:
    writer = FakeWriter(lambda *_: {"status": status, "text": None, "reason": "why"})
    for _ in range(2):
        assert [(a.status, a.reason) for _, a in ask_all(prompts(2), writer, store, FAST)] == [
            (status, "why")
        ] * 2
    assert set(writer.calls.values()) == {1}


def test_no_call_is_made_before_the_time_the_server_names(store: Store) -> None:
    writer = FakeWriter(
        lambda prompt, call: RetryLater("HTTP 429", 0.4) if prompt == "p0" and call == 1 else None
    )
    assert len(list(ask_all(prompts(100), writer, store, FAST))) == 100
    gaps = [after - before for before, after in itertools.pairwise(writer.times)]
    assert sum(gap > 0.35 for gap in gaps) == 1


def test_calls_that_were_already_scheduled_wait_for_the_time_the_server_names(store: Store) -> None:
    def plan(prompt: str, call: int) -> Exception | None:
        return RetryLater("HTTP 429", 0.5) if prompt == "p0" and call == 1 else None

    writer = FakeWriter(plan)
    list(
        ask_all(prompts(12), writer, store, Limits(concurrency=8, requests_per_minute=1200))
    )  # a place each 0.05 s
    assert writer.times[1] - writer.times[0] > 0.45


def test_a_wait_for_a_daily_quota_ends_the_run_with_a_message(store: Store) -> None:
    writer = FakeWriter(lambda *_: RetryLater("HTTP 429: quota of the day", 40_000))
    with pytest.raises(UserError, match=r"asks to wait 40000 s \(HTTP 429: quota of the day\)"):
        list(ask_all(prompts(100), writer, store, Limits(price=CENT)))
    assert store.cost_usd() == 0


def test_the_limit_of_requests_per_minute_holds(store: Store) -> None:
    writer = FakeWriter()
    list(ask_all(prompts(11), writer, store, Limits(concurrency=8, requests_per_minute=1200)))
    assert 0.5 <= writer.times[-1] - writer.times[0] < 5


@given(st.floats(1, 1e6), st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 100)), min_size=1))
def test_a_pace_never_gives_more_than_its_rate(
    per_minute: float, steps: list[tuple[float, float]]
) -> None:
    now = [0.0]
    pace = Pace(per_minute, lambda: now[0])
    booked = []
    for units, later_s in steps:
        now[0] += later_s
        booked.append((now[0] + pace.book(units), units))
    for (start_s, units), (next_s, _) in itertools.pairwise(booked):
        assert next_s >= start_s + units * 60 / per_minute - 1e-6 * max(1, start_s)


@given(st.integers(1, 60))
def test_backoff_grows_to_a_minute_at_most(attempt: int) -> None:
    ceiling = min(60, 2 ** (attempt - 1))
    waits = [backoff_s(Limits(), attempt) for _ in range(200)]
    assert 0 <= min(waits) < 0.2 * ceiling < 0.8 * ceiling < max(waits) <= ceiling


def test_another_version_of_the_model_stops_the_run(store: Store) -> None:
    writer = FakeWriter(
        lambda prompt, call: {"model_version": "2"} if prompt == "p5" and call == 1 else None
    )
    with pytest.raises(
        UserError, match=r"from version '1' so far, and now from '2'.*start in a new directory"
    ):
        list(ask_all(prompts(100), writer, store, Limits(concurrency=1)))
    bad = store.get(writer, make_request("p5"))
    assert bad is not None
    assert (bad.status, bad.text) == ("error", None)
    assert [answer.status for _, answer in ask_all(prompts(10), writer, store, FAST)] == ["ok"] * 10


def test_a_run_ends_early_where_every_call_fails(store: Store) -> None:
    writer = FakeWriter(lambda *_: RetryLater("connection failed"))
    with pytest.raises(
        UserError, match="20 requests in a row failed, the last with: connection failed"
    ):
        list(ask_all(prompts(1000), writer, store, FAST))
    assert len(writer.calls) < 40


def test_a_run_begins_with_one_call_and_grows_with_what_ends_well(store: Store) -> None:
    writer = FakeWriter(lambda *_: {"status": "truncated", "text": None})
    list(ask_all(prompts(30), writer, store, FAST))
    assert writer.most_in_flight == 1
    stops = FakeWriter(lambda *_: UserError("bad key"))
    with pytest.raises(UserError, match="bad key"):
        list(ask_all((make_request(f"q{i}") for i in range(30)), stops, store, FAST))
    assert stops.calls.total() == 1


def test_requests_that_a_server_turned_down_are_retried_and_counted_once(store: Store) -> None:
    def turn_down(*_: object) -> dict[str, Any]:
        return {"status": "invalid", "text": None, "num_prompt_tokens": 0, "num_output_tokens": 0}

    for number in (20, 40):  # those of the run before say nothing new; then the next 20 end it
        writer = FakeWriter(turn_down)
        with pytest.raises(UserError, match="20 requests in a row failed"):
            list(ask_all(prompts(100), writer, store, FAST))
        assert writer.calls.total() == number
    good = FakeWriter()
    assert {answer.status for _, answer in ask_all(prompts(100), good, store, FAST)} == {"ok"}
    assert good.calls.total() == 100
    few = FakeWriter(lambda prompt, _: turn_down() if int(prompt[1:]) % 3 == 0 else None)
    many = [make_request(f"p{i}", template="other@1", template_sha256="1" * 64) for i in range(90)]
    for calls in (90, 30):  # a third is not taken, again and again, and ends nothing
        few.calls.clear()
        assert len(list(ask_all(many, few, store, FAST))) == 90
        assert few.calls.total() == calls
    assert store.cost_usd() == 0


@pytest.mark.parametrize("wait_s", [0.0, 0.014])
def test_a_retry_after_of_zero_backs_off_as_usual(
    store: Store, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def backoff_s(_: Limits, attempt: int) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr("sft_probe.synth.asking.budget.backoff_s", backoff_s)
    writer = FakeWriter(lambda _, call: RetryLater("HTTP 429", wait_s) if call < 6 else None)
    assert [answer.status for _, answer in ask_all(prompts(1), writer, store, FAST)] == ["ok"]
    assert attempts == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [UserError("bad key"), RuntimeError("a defect")])
def test_an_error_of_the_writer_ends_the_run_and_keeps_calls_in_flight(
    store: Store, error: Exception
) -> None:
    writer = FakeWriter(lambda prompt, _: error if prompt == "p3" else None)
    with pytest.raises(type(error), match=str(error)):
        list(ask_all(prompts(100), writer, store, FAST))
    assert sum(count.num_answers for count in store.counts()) == sum(writer.calls.values()) - 1
    assert writer.num_closed == 1


def test_an_error_of_the_data_reaches_the_caller(store: Store) -> None:
    def broken() -> Iterator[Request]:
        yield make_request("p")
        raise UserError("line 7 is broken")

    with pytest.raises(UserError, match="line 7 is broken"):
        list(ask_all(broken(), FakeWriter(), store, FAST))


def test_leaving_a_run_early_loses_no_paid_answer(store: Store) -> None:
    writer = FakeWriter()
    answers = ask_all(prompts(100), writer, store, FAST)
    next(answers)
    answers.close()
    assert sum(count.num_answers for count in store.counts()) == sum(writer.calls.values()) < 100


def test_a_call_without_an_answer_times_out_and_counts_as_paid(store: Store) -> None:
    class Silent(FakeWriter):
        async def write(self, _: Request) -> Answer:
            await asyncio.sleep(60)
            raise AssertionError

    limits = Limits(timeout_s=0.01, max_attempts=2, first_backoff_s=0, price=CENT)
    [(_, answer)] = ask_all(prompts(1), Silent(), store, limits)
    assert (answer.status, answer.reason) == ("error", "no answer in 0.01 s")
    assert store.cost_usd() == pytest.approx(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_calls_in_flight_stored(
    tmp_path: Path, number: int, code: int
) -> None:
    script = (
        "import asyncio, logging, sys\nfrom pathlib import Path\n"
        "from sft_probe.synth.asking.budget import Limits\nfrom sft_probe.synth.asking.live import "
        "ask_all\n"
        "from sft_probe.synth.asking.store import Store\nfrom synth_fakes import FakeWriter, "
        "prompts\n"
        "class Slow(FakeWriter):\n"
        "    async def write(self, request):\n"
        "        print(request.prompt, flush=True)\n"
        "        await asyncio.sleep(0 if request.prompt < 'p4' else 1)\n"
        "        return await super().write(request)\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "list(ask_all(prompts(9), Slow(), Store(Path(sys.argv[1])), Limits(concurrency=2)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a.sqlite"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "p5\n":
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "waiting for calls in flight" in err
    assert "Traceback" not in err
    store = Store(tmp_path / "a.sqlite")
    assert [store.get(FakeWriter(), request) is not None for request in prompts(9)] == [
        True
    ] * 6 + [False] * 3


def test_kills_lose_no_answer_and_repay_only_calls_in_flight() -> None:
    drill = subprocess.run(
        [
            sys.executable,
            Path(__file__).parents[2] / "benchmarks/kill_drill.py",
            "--number=150",
            "--kills=3",
            "--concurrency=8",
            "--latency_s=0.02",
            "--budget_usd=0.1",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert drill.returncode == 0, drill.stdout + drill.stderr
