import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synth_fakes import CENT, FAST, FakeWriter, prompts

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, Price, parse_price, price_of
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Answer, RetryLater
from sft_probe.synth.asking.store import Store
from sft_probe.synth.estimate import estimate_cost


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "answers.sqlite")
    yield store
    store.close()


@settings(deadline=None, max_examples=15)
@given(
    budget_cents=st.integers(0, 30),
    outcomes=st.lists(
        st.sampled_from(["ok", "short", "unknown", "busy", "cut"]), min_size=1, max_size=40
    ),
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
        counts: dict[str, dict[str, Any]] = {
            "short": {"num_output_tokens": 10},
            "unknown": {"num_output_tokens": None},
        }
        waits = {"busy": RetryLater("HTTP 503"), "cut": RetryLater("cut", maybe_billed=True)}
        return waits.get(outcome) or counts.get(outcome)

    limits = Limits(
        concurrency=8,
        first_backoff_s=0.0,
        max_attempts=2,
        max_cost_usd=budget_cents / 100 + 1e-9,
        price=CENT,
    )
    for _ in range(2):
        with contextlib.suppress(UserError):
            list(ask_all(prompts(30), FakeWriter(plan), store, limits))
        assert billed_cents <= budget_cents + 1e-6
        assert store.cost_usd() == pytest.approx(billed_cents / 100)
    store.close()


# what a call may do: tokens of output that are paid for, and what comes back
OUTCOMES: dict[str, tuple[int, Exception | dict[str, Any]]] = {
    "ok": (100, {}),
    "short": (10, {"num_output_tokens": 10}),
    "silent": (60, {"num_output_tokens": None, "num_prompt_tokens": None}),
    "partial": (60, {"num_output_tokens": None}),
    "zero": (60, {"num_output_tokens": 0, "num_prompt_tokens": 0}),
    "absurd": (60, {"num_output_tokens": 10**9}),
    "error with 200": (
        60,
        {"status": "error", "text": None, "num_output_tokens": None, "num_prompt_tokens": None},
    ),
    "truncated": (100, {"status": "truncated", "text": None}),
    "turned down": (
        0,
        {"status": "invalid", "text": None, "num_output_tokens": 0, "num_prompt_tokens": 0},
    ),
    "busy": (0, RetryLater("HTTP 503")),
    "cut": (100, RetryLater("cut", maybe_billed=True)),
    "unreadable": (80, RetryLater("no JSON", maybe_billed=True, raw="<")),
}


@settings(deadline=None, max_examples=25)
@given(data=st.data(), budget_cents=st.none() | st.integers(0, 60), runs=st.integers(1, 2))
def test_no_server_makes_a_run_pay_more_than_the_estimate_or_count_less_than_it_pays(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    budget_cents: int | None,
    runs: int,
) -> None:
    names = data.draw(st.lists(st.sampled_from(list(OUTCOMES)), min_size=1, max_size=60))
    billed, drawn = 0, itertools.cycle(names)

    def plan(*_: object) -> Exception | dict[str, Any]:
        nonlocal billed
        tokens, result = OUTCOMES[next(drawn)]
        billed += tokens
        return result

    first = prompts(20)
    second = [replace(request, sample_index=1) for request in first]
    limits = Limits(
        concurrency=4,
        first_backoff_s=0.0,
        price=CENT,
        max_cost_usd=None if budget_cents is None else budget_cents / 100,
    )
    with Store(tmp_path_factory.mktemp("s") / "a.sqlite") as store:
        for _ in range(runs):
            before, spent = billed, store.cost_usd()
            bound = estimate_cost(
                first, FakeWriter(), store, CENT, maybe_requests=second
            ).max_cost_usd
            with contextlib.suppress(UserError):
                answers = list(ask_all(first, FakeWriter(plan), store, limits))
                again = [
                    replace(request, sample_index=1)
                    for request, answer in answers
                    if answer.status != "ok"
                ]
                list(ask_all(again, FakeWriter(plan), store, limits))
            assert (billed - before) / 1e4 <= store.cost_usd() - spent + 1e-9
            assert bound is not None
            assert store.cost_usd() - spent <= bound + 1e-9
            if budget_cents is not None:
                assert store.cost_usd() <= budget_cents / 100 + 1e-9


@pytest.mark.parametrize("num_tokens", [500, 5000])
def test_an_answer_that_costs_more_than_it_may_stops_the_next_call(
    store: Store, num_tokens: int
) -> None:
    writer = FakeWriter(lambda *_: {"num_output_tokens": num_tokens})
    with pytest.raises(UserError, match="budget is spent"):
        list(
            ask_all(
                prompts(100), writer, store, Limits(concurrency=4, price=CENT, max_cost_usd=0.045)
            )
        )
    per_call = num_tokens / 1e4
    assert store.cost_usd() == pytest.approx(
        per_call * writer.calls.total()
    )  # it is counted as the server says
    assert store.cost_usd() <= 0.045 + 4 * per_call


def test_a_spent_budget_stops_with_what_was_paid_stored(store: Store) -> None:
    writer = FakeWriter()
    limits = Limits(concurrency=8, max_cost_usd=0.055, price=CENT)
    got: list[Answer] = []
    with pytest.raises(UserError, match=r"\$0\.0500 of \$0\.0550.*\$0\.0100.*raise --max-cost-usd"):
        got.extend(answer for _, answer in ask_all(prompts(10), writer, store, limits))
    assert sum(writer.calls.values()) == 5
    assert (
        len(list(ask_all(prompts(10), writer, store, Limits(max_cost_usd=0.10001, price=CENT))))
        == 10
    )
    assert sum(writer.calls.values()) == 10


def test_the_cost_of_a_call_without_an_answer_counts_in_later_runs(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    writer = FakeWriter(lambda prompt, _: ConnectionResetError() if prompt == "p1" else None)
    with pytest.raises(ConnectionResetError):
        list(ask_all(prompts(2), writer, store, Limits(price=CENT)))
    assert store.cost_usd() == pytest.approx(0.02)
    with pytest.raises(UserError, match="budget is spent"):
        list(ask_all(prompts(2), FakeWriter(), store, Limits(price=CENT, max_cost_usd=0.025)))
    assert "1 calls of earlier runs were made and never answered" in caplog.text
    assert "$0.0100 is counted as spent" in caplog.text


@pytest.mark.parametrize("error", [UserError("bad key"), RuntimeError("a defect")])
def test_a_call_that_waits_for_budget_ends_when_the_run_fails(
    store: Store, error: Exception
) -> None:
    with pytest.raises(type(error), match=str(error)):
        list(
            ask_all(
                prompts(8),
                FakeWriter(lambda *_: error),
                store,
                Limits(price=CENT, max_cost_usd=0.015),
            )
        )
    assert store.cost_usd() == pytest.approx(0 if isinstance(error, UserError) else 0.01)


def test_a_budget_without_a_price_is_refused_before_any_call(store: Store) -> None:
    writer = FakeWriter()
    with pytest.raises(
        UserError, match=r"price of 'fake-1' is not in the table of .* Give it with --price"
    ):
        list(ask_all(prompts(1), writer, store, Limits(max_cost_usd=1)))
    assert not writer.calls


def test_spent_money_counts_also_where_only_one_run_knew_the_price(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    error = {"status": "error", "text": None}
    writer = FakeWriter(lambda _, call: error if call < 3 else None)
    for price in (None, CENT, None):
        list(ask_all(prompts(1), writer, store, Limits(price=price)))
    assert store.cost_usd() == pytest.approx(0.01)
    list(ask_all(prompts(2), FakeWriter(), store, Limits()))
    list(ask_all(prompts(2), FakeWriter(), store, Limits(price=CENT, max_cost_usd=0.05)))
    assert "1 answers of earlier runs were requested without --price" in caplog.text


def test_a_full_disk_ends_calls_that_wait_for_budget(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> int:
        await asyncio.sleep(0.01)
        raise UserError("the disk is full")

    monkeypatch.setattr(Store, "reserve", full)
    with pytest.raises(UserError, match="disk is full"):
        list(ask_all(prompts(8), FakeWriter(), store, Limits(price=CENT, max_cost_usd=0.015)))


def test_an_estimate_counts_what_the_store_lacks(store: Store) -> None:
    list(ask_all(prompts(2), FakeWriter(), store, FAST))
    guess = estimate_cost(prompts(12), FakeWriter(), store, Price(1.0, 10.0))
    assert guess.calls == 10  # two are stored
    assert guess.output_tokens == 10 * 40  # 30 words each
    assert guess.cost_usd == pytest.approx(
        (guess.prompt_tokens + 10 * guess.output_tokens) / 1e6, rel=0.01
    )
    assert guess.max_cost_usd == pytest.approx(
        2 * 10 * (2 + 128 + 1000) / 1e6, rel=0.01
    )  # each call may be cut once
    assert guess.max_cost_usd is not None
    more = estimate_cost(
        prompts(12), FakeWriter(), store, Price(1.0, 10.0), maybe_requests=prompts(14)
    )
    assert more.max_cost_usd == pytest.approx(
        guess.max_cost_usd * 2.2, rel=0.01
    )  # 12 of them are missing
    assert (more.calls, more.cost_usd) == (guess.calls, guess.cost_usd)
    unknown = estimate_cost(prompts(1), FakeWriter())
    assert (unknown.calls, unknown.cost_usd, unknown.max_cost_usd) == (1, None, None)


def test_prices_are_known_by_model_and_halved_for_batches() -> None:
    batch, full = FakeWriter(), FakeWriter()
    batch.name, batch.model = "gemini-batch", "models/gemini-2.5-flash"
    full.name, full.model = "gemini", "gemini-2.5-flash"
    assert price_of(full) == Price(0.30, 2.50)
    assert price_of(batch) == Price(0.15, 1.25)
    assert price_of(FakeWriter()) is None
    assert parse_price("0.1,0.4") == Price(0.1, 0.4)
    for text in ("1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ""):
        with pytest.raises(UserError, match="is not a price"):
            parse_price(text)
