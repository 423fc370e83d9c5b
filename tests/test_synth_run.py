import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gemini_server import make_request, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.synth.limits import Limits, Pace, backoff_s
from sft_probe.synth.prices import Price, parse_price, price_of
from sft_probe.synth.requests import Answer, Request, Wait
from sft_probe.synth.run import estimate, obtain
from sft_probe.synth.store import Store

FAST = Limits(concurrency=8, first_backoff_s=0.001)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
CENT = Price(0.0, 100.0)  # 100 tokens of output cost a cent


class FakeWriter:
    """A writer whose n-th call for a prompt does what `plan` says: raises, or changes the answer."""

    name, model, api_version = "fake", "fake-1", "v1"

    def __init__(self, plan: Callable[[str, int], Exception | dict[str, Any] | None] = lambda *_: None) -> None:
        self.calls: Counter[str] = Counter()
        self.most_in_flight = self._in_flight = 0
        self.times: list[float] = []
        self.num_closed = 0
        self._plan = plan

    async def write(self, request: Request) -> Answer:
        self.calls[request.prompt] += 1
        self.times.append(time.monotonic())
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await asyncio.sleep(hash(request.prompt) % 5 / 1000)
        self._in_flight -= 1
        planned = self._plan(request.prompt, self.calls[request.prompt])
        if isinstance(planned, Exception):
            raise planned
        fields = {"status": "ok", "raw": "{}", "text": text_of(request.prompt), "model_version": "1"}
        return Answer(**(fields | {"num_prompt_tokens": 10, "num_output_tokens": 100} | (planned or {})))

    async def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "answers.sqlite")
    yield store
    store.close()


def prompts(number: int) -> list[Request]:
    return [make_request(f"p{i}") for i in range(number)]


def texts(answers: Iterator[tuple[Request, Answer]]) -> list[tuple[str, str | None]]:
    return [(request.prompt, answer.text) for request, answer in answers]


def test_all_answers_come_in_order_and_are_asked_for_once(store: Store) -> None:
    writer, requests = FakeWriter(), prompts(300)
    expected = [(request.prompt, text_of(request.prompt)) for request in requests]
    assert texts(obtain(requests, writer, store, FAST)) == expected
    assert writer.most_in_flight == 8
    assert set(writer.calls.values()) == {1}
    assert texts(obtain(requests, FakeWriter(lambda *_: ValueError("called again")), store, FAST)) == expected
    assert writer.num_closed == 1


def test_requests_are_drawn_only_as_far_as_needed(store: Store) -> None:
    drawn = itertools.count()
    answers = obtain((make_request(f"p{next(drawn)}") for _ in range(10**9)), FakeWriter(), store, FAST)
    assert next(answers)[0].prompt == "p0"
    answers.close()
    assert next(drawn) < 5000


def test_the_same_prompt_is_asked_for_once_though_both_are_in_flight(store: Store) -> None:
    writer = FakeWriter()
    requests = [make_request("p", doc_id="a"), make_request("p", doc_id="b"), make_request("q")]
    assert [answer.text for _, answer in obtain(requests, writer, store, FAST)] == [text_of(p) for p in "ppq"]
    assert writer.calls == {"p": 1, "q": 1}


def test_what_fails_in_passing_is_asked_again(store: Store) -> None:
    writer = FakeWriter(lambda _, call: Wait("HTTP 503") if call < 3 else None)
    assert all(answer.status == "ok" for _, answer in obtain(prompts(5), writer, store, FAST))
    assert set(writer.calls.values()) == {3}


def test_what_keeps_failing_is_an_error_with_its_reason_and_asked_again_by_the_next_run(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = FakeWriter(lambda prompt, call: Wait("HTTP 503: busy") if prompt == "p1" and call <= 6 else None)
    answers = [answer for _, answer in obtain(prompts(3), writer, store, FAST, total=3)]
    assert [answer.status for answer in answers] == ["ok", "error", "ok"]
    assert (answers[1].text, answers[1].reason) == (None, "HTTP 503: busy")
    assert writer.calls["p1"] == 6
    assert "3 texts done (0 from the store); 0 left" in caplog.text
    assert "1 error" in caplog.text
    assert [answer.status for _, answer in obtain(prompts(3), writer, store, FAST)] == ["ok"] * 3
    assert writer.calls == {"p0": 1, "p1": 7, "p2": 1}


@pytest.mark.parametrize("status", ["blocked", "truncated", "refused", "invalid"])
def test_what_would_fail_again_is_not_asked_again(store: Store, status: str) -> None:
    writer = FakeWriter(lambda *_: {"status": status, "text": None, "reason": "why"})
    for _ in range(2):
        assert [(a.status, a.reason) for _, a in obtain(prompts(2), writer, store, FAST)] == [(status, "why")] * 2
    assert set(writer.calls.values()) == {1}


def test_nobody_asks_before_the_server_said_so(store: Store) -> None:
    writer = FakeWriter(lambda prompt, call: Wait("HTTP 429", 0.4) if prompt == "p0" and call == 1 else None)
    assert len(list(obtain(prompts(100), writer, store, FAST))) == 100
    gaps = [after - before for before, after in itertools.pairwise(writer.times)]
    assert sum(gap > 0.35 for gap in gaps) == 1


def test_a_wait_for_the_quota_of_the_day_is_told_not_slept_through(store: Store) -> None:
    writer = FakeWriter(lambda *_: Wait("HTTP 429: quota of the day", 40_000))
    with pytest.raises(UserError, match=r"asks to wait 40000 s \(HTTP 429: quota of the day\)"):
        list(obtain(prompts(100), writer, store, Limits(price=CENT)))
    assert store.cost_usd() == 0


def test_requests_per_minute_hold(store: Store) -> None:
    writer = FakeWriter()
    list(obtain(prompts(11), writer, store, Limits(concurrency=8, requests_per_minute=1200)))
    assert 0.5 <= writer.times[-1] - writer.times[0] < 5


@given(st.floats(1, 1e6), st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 100)), min_size=1))
def test_a_pace_never_gives_more_than_its_rate(per_minute: float, steps: list[tuple[float, float]]) -> None:
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
    assert 0 <= backoff_s(Limits(), attempt) <= min(60, 2 ** (attempt - 1))


@settings(deadline=None, max_examples=15)
@given(
    budget_cents=st.integers(0, 30),
    outcomes=st.lists(st.sampled_from(["ok", "short", "unknown", "busy", "cut"]), min_size=1, max_size=40),
)
def test_a_budget_is_never_passed(
    tmp_path_factory: pytest.TempPathFactory, budget_cents: int, outcomes: list[str]
) -> None:
    store = Store(tmp_path_factory.mktemp("s") / "a.sqlite")
    billed_cents = 0.0

    def plan(prompt: str, call: int) -> Exception | dict[str, Any] | None:
        nonlocal billed_cents
        outcome = outcomes[(int(prompt[1:]) + call) % len(outcomes)]
        billed_cents += {"ok": 1.0, "short": 0.1, "unknown": 1.0, "busy": 0.0, "cut": 1.0}[outcome]
        counts: dict[str, dict[str, Any]] = {"short": {"num_output_tokens": 10}, "unknown": {"num_output_tokens": None}}
        waits = {"busy": Wait("HTTP 503"), "cut": Wait("cut", maybe_billed=True)}
        return waits.get(outcome) or counts.get(outcome)

    limits = Limits(
        concurrency=8, first_backoff_s=0.0, max_attempts=2, max_cost_usd=budget_cents / 100 + 1e-9, price=CENT
    )
    for _ in range(2):
        with contextlib.suppress(UserError):
            list(obtain(prompts(30), FakeWriter(plan), store, limits))
        assert billed_cents <= budget_cents + 1e-6
        assert store.cost_usd() == pytest.approx(billed_cents / 100)
    store.close()


def test_a_spent_budget_stops_with_what_was_paid_stored(store: Store) -> None:
    writer = FakeWriter()
    limits = Limits(concurrency=8, max_cost_usd=0.055, price=CENT)
    got: list[Answer] = []
    with pytest.raises(UserError, match=r"\$0\.0500 of \$0\.0550.*\$0\.0100.*raise --max-cost-usd"):
        got.extend(answer for _, answer in obtain(prompts(10), writer, store, limits))
    assert sum(writer.calls.values()) == 5
    assert len(list(obtain(prompts(10), writer, store, Limits(max_cost_usd=0.10001, price=CENT)))) == 10
    assert sum(writer.calls.values()) == 10


def test_money_of_a_call_that_never_came_back_counts_in_later_runs(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    writer = FakeWriter(lambda prompt, _: ConnectionResetError() if prompt == "p1" else None)
    with pytest.raises(ConnectionResetError):
        list(obtain(prompts(2), writer, store, Limits(price=CENT)))
    assert store.cost_usd() == pytest.approx(0.02)
    with pytest.raises(UserError, match="budget is spent"):
        list(obtain(prompts(2), FakeWriter(), store, Limits(price=CENT, max_cost_usd=0.025)))
    assert "1 calls of earlier runs were made and never answered" in caplog.text
    assert "$0.0100 is counted as spent" in caplog.text


@pytest.mark.parametrize("error", [UserError("bad key"), RuntimeError("a defect")])
def test_who_waits_for_money_does_not_wait_for_a_run_that_failed(store: Store, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        list(obtain(prompts(8), FakeWriter(lambda *_: error), store, Limits(price=CENT, max_cost_usd=0.015)))
    assert store.cost_usd() == pytest.approx(0 if isinstance(error, UserError) else 0.01)


def test_a_budget_without_a_price_is_refused_before_any_call(store: Store) -> None:
    writer = FakeWriter()
    with pytest.raises(UserError, match=r"price of 'fake-1' is not in the table of .* Give it with --price"):
        list(obtain(prompts(1), writer, store, Limits(max_cost_usd=1)))
    assert not writer.calls


def test_another_version_of_the_model_stops_the_run(store: Store) -> None:
    writer = FakeWriter(lambda prompt, call: {"model_version": "2"} if prompt == "p5" and call == 1 else None)
    with pytest.raises(UserError, match=r"from version '1' so far, and now from '2'.*start in a new directory"):
        list(obtain(prompts(100), writer, store, Limits(concurrency=1)))
    bad = store.get(writer, make_request("p5"))
    assert bad is not None
    assert (bad.status, bad.text) == ("error", None)
    assert [answer.status for _, answer in obtain(prompts(10), writer, store, FAST)] == ["ok"] * 10


def test_a_server_that_fails_at_everything_is_not_asked_for_everything(store: Store) -> None:
    writer = FakeWriter(lambda *_: Wait("connection failed"))
    with pytest.raises(UserError, match="20 requests in a row failed, the last with: connection failed"):
        list(obtain(prompts(1000), writer, store, FAST))
    assert len(writer.calls) < 40


@pytest.mark.parametrize("error", [UserError("bad key"), RuntimeError("a defect")])
def test_an_error_of_the_writer_ends_the_run_and_keeps_calls_in_flight(store: Store, error: Exception) -> None:
    writer = FakeWriter(lambda prompt, _: error if prompt == "p3" else None)
    with pytest.raises(type(error), match=str(error)):
        list(obtain(prompts(100), writer, store, FAST))
    assert sum(count.num_answers for count in store.counts()) == sum(writer.calls.values()) - 1
    assert writer.num_closed == 1


def test_an_error_of_the_data_reaches_the_caller(store: Store) -> None:
    def broken() -> Iterator[Request]:
        yield make_request("p")
        raise UserError("line 7 is broken")

    with pytest.raises(UserError, match="line 7 is broken"):
        list(obtain(broken(), FakeWriter(), store, FAST))


def test_a_caller_that_leaves_early_loses_no_paid_answer(store: Store) -> None:
    writer = FakeWriter()
    answers = obtain(prompts(100), writer, store, FAST)
    next(answers)
    answers.close()
    assert sum(count.num_answers for count in store.counts()) == sum(writer.calls.values()) < 100


def test_a_call_without_an_answer_is_given_up_and_counts_as_paid(store: Store) -> None:
    class Silent(FakeWriter):
        async def write(self, _: Request) -> Answer:
            await asyncio.sleep(60)
            raise AssertionError

    limits = Limits(timeout_s=0.01, max_attempts=2, first_backoff_s=0, price=CENT)
    [(_, answer)] = obtain(prompts(1), Silent(), store, limits)
    assert (answer.status, answer.reason) == ("error", "no answer in 0.01 s")
    assert store.cost_usd() == pytest.approx(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_calls_in_flight_stored(tmp_path: Path, number: int, code: int) -> None:
    script = (
        "import asyncio, logging, sys\nfrom pathlib import Path\n"
        "from test_synth_run import FakeWriter, Store, obtain, prompts, Limits\n"
        "class Slow(FakeWriter):\n"
        "    async def write(self, request):\n"
        "        print(request.prompt, flush=True)\n"
        "        await asyncio.sleep(0 if request.prompt < 'p4' else 1)\n"
        "        return await super().write(request)\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "list(obtain(prompts(9), Slow(), Store(Path(sys.argv[1])), Limits(concurrency=2)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a.sqlite"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    ) as process:  # fmt: skip
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
    assert [store.get(FakeWriter(), request) is not None for request in prompts(9)] == [True] * 6 + [False] * 3


def test_an_estimate_counts_what_the_store_lacks(store: Store) -> None:
    list(obtain(prompts(2), FakeWriter(), store, FAST))
    guess = estimate(prompts(12), FakeWriter(), store, Price(1.0, 10.0))
    assert (guess.num_stored, guess.calls) == (2, 10)
    assert guess.output_tokens == 10 * 40  # 30 words each
    assert guess.cost_usd == pytest.approx((guess.prompt_tokens + 10 * guess.output_tokens) / 1e6, rel=0.01)
    assert guess.max_cost_usd == pytest.approx(10 * (18 + 100 * 10) / 1e6, rel=0.01)
    unknown = estimate(prompts(1), FakeWriter())
    assert (unknown.calls, unknown.cost_usd, unknown.max_cost_usd) == (1, None, None)


def test_prices() -> None:
    batch, full = FakeWriter(), FakeWriter()
    batch.name, batch.model = "gemini-batch", "models/gemini-2.5-flash"
    full.name, full.model = "gemini", "gemini-2.5-flash"
    assert price_of(full) == Price(0.30, 2.50)
    assert price_of(batch) == Price(0.15, 1.25)
    assert price_of(FakeWriter()) is None
    assert parse_price("0.1,0.4") == Price(0.1, 0.4)
    for text in ("1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ""):
        with pytest.raises(UserError, match="is no price"):
            parse_price(text)


def test_kills_lose_no_answer_and_repay_only_calls_in_flight() -> None:
    drill = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "benchmarks/kill_drill.py", "--number=150", "--kills=3",
         "--concurrency=8", "--latency_s=0.02", "--budget_usd=0.1"],
        capture_output=True, text=True, check=False, timeout=240, env=ENVIRONMENT,
    )  # fmt: skip
    assert drill.returncode == 0, drill.stdout + drill.stderr
