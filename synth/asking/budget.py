"""How fast to ask, how long to wait, and how much to spend."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Named, Request
from sft_probe.synth.asking.store import Store

PRICES_DATE = "2026-10-07"
PRICES_SOURCE = "https://ai.google.dev/gemini-api/docs/pricing"
# USD per million tokens of input and of output (thinking included), for prompts up to 200k tokens
_PRICES = {
    "gemini-3.8-flash": (
        1.50,
        7.50,
    ),  # half of it through 2026-12-31; a budget should not break on the day after
    "gemini-3.7-flash": (1.50, 7.50),  # likewise
    "gemini-3.6-flash": (1.50, 7.50),  # likewise
    "gemini-3.5-flash": (1.50, 9.00),
    "gemini-3.5-flash-lite": (0.30, 2.50),
    "gemini-3.1-pro-preview": (2.00, 12.00),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
}
_BATCH_FACTOR = 0.5
LOCAL_WRITERS = ("hf", "offline")
"""They are free, and cannot be misconfigured at a distance."""
# for the expected cost alone: English text has about four bytes and three quarters of a word per
# token
_BYTES_PER_TOKEN = 4
_TOKENS_PER_WORD = 4 / 3
_TEMPLATE_TOKENS = 128
# what no count of a working server passes
_MAX_BYTES_PER_TOKEN = 128
_MAX_OUTPUT_TOKENS = 200_000


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input_usd: float
    output_usd: float

    def cost_usd(self, num_prompt_tokens: float, num_output_tokens: float) -> float:
        """Return the cost of one or many calls with this many tokens."""
        return (num_prompt_tokens * self.input_usd + num_output_tokens * self.output_usd) / 1e6

    def answer_usd(self, request: Request, answer: Answer) -> float:
        """Return the cost of one answer: its worst case where the server's count is missing or
        cannot be."""
        prompt, output = answer.num_prompt_tokens, answer.num_output_tokens
        if answer.num_prompt_tokens == 0 and not answer.is_final:
            return 0.0  # nothing was written
        if prompt is None or output is None or _is_absurd(request, answer, prompt, output):
            return self.worst_usd(request)
        return self.cost_usd(prompt, output)

    def worst_usd(self, request: Request) -> float:
        """Return the most that one call can cost: no token is shorter than a byte, no output longer
        than allowed."""
        return self.cost_usd(max_prompt_tokens(request), request.max_output_tokens)


def parse_price(text: str) -> Price:
    """Return a `Price` from `INPUT,OUTPUT` in USD per million tokens. Raises `UserError` for
    anything else."""
    parts = text.split(",")
    try:
        input_usd, output_usd = (float(part) for part in parts)
    except ValueError:
        input_usd = output_usd = -1.0
    if not (0 <= input_usd < float("inf") and 0 <= output_usd < float("inf")):
        raise UserError(
            f"{text!r} is no price. Give USD per million tokens of input and of output, such as "
            "0.30,2.50."
        )
    return Price(input_usd, output_usd)


def price_of(writer: Named) -> Price | None:
    """Return the list price of the writer's model; None where it is not in the table. Local writers
    are free."""
    if writer.name in LOCAL_WRITERS:
        return Price(0.0, 0.0)
    prices = _PRICES.get(writer.model.removeprefix("models/"))
    if prices is None or not writer.name.startswith("gemini"):
        return None
    factor = _BATCH_FACTOR if writer.name == "gemini-batch" else 1.0
    return Price(prices[0] * factor, prices[1] * factor)


def _is_absurd(request: Request, answer: Answer, prompt: int, output: int) -> bool:
    """Whether a count is far too small for what was sent and written, or far beyond what any model
    takes."""
    return (
        prompt * _MAX_BYTES_PER_TOKEN < _num_bytes(request.prompt)
        or output * _MAX_BYTES_PER_TOKEN < _num_bytes(answer.text or "")
        or prompt == 0
        or output > _MAX_OUTPUT_TOKENS
    )


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def max_prompt_tokens(request: Request) -> int:
    """Return an upper bound: its UTF-8 bytes, and some for what a chat template adds."""
    return _num_bytes(request.prompt) + _TEMPLATE_TOKENS


def expected_prompt_tokens(request: Request) -> float:
    """Return a guess without a tokenizer."""
    return _num_bytes(request.prompt) / _BYTES_PER_TOKEN


def expected_output_tokens(request: Request) -> float:
    """Return a guess without a tokenizer: the length asked for."""
    return min(request.num_words * _TOKENS_PER_WORD, request.max_output_tokens)


_MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may ask of a server and of a purse."""

    concurrency: int = 16
    """Calls in flight at most."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts, as quotas count them; estimated, since the server counts only afterwards."""
    max_cost_usd: float | None = None
    """Of all runs on one store together; no call is made whose worst case would pass it."""
    price: Price | None = None
    """In place of the price table."""
    timeout_s: float = 120.0
    """Of one call; a call given up counts as paid."""
    max_attempts: int = 6
    """Calls for one answer in one run, after which `error` is stored."""
    max_wait_s: float | None = None
    """For batch jobs; without it there is no end to waiting."""
    first_backoff_s: float = 1.0
    """Before the second attempt, where the server does not say how long; doubled each time."""


def price_within(limits: Limits, writer: Named) -> Price | None:
    """The price that a run goes by. Raises `UserError` where a budget is set and no price is
    known."""
    price = limits.price or price_of(writer)
    if price is None and limits.max_cost_usd is not None:
        raise UserError(
            f"--max-cost-usd cannot be kept: the price of {writer.model!r} is not in the table of "
            f"{PRICES_DATE}. "
            "Give it with --price INPUT,OUTPUT (USD per million tokens; 0,0 for a server of your "
            "own)."
        )
    return price


def backoff_s(limits: Limits, attempt: int) -> float:
    """Seconds to wait after the given failed attempt (1 for the first).

    Exponential with full jitter: uniform between 0 and the doubled-up ceiling, so that callers
    which failed together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    ceiling = min(_MAX_BACKOFF_S, limits.first_backoff_s * 2 ** (attempt - 1))
    return random.uniform(0, ceiling)  # noqa: S311 - not secret


class Pace:
    """Spreads units (requests, tokens) evenly over time, and stands still while the server says
    so."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._s_per_unit = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._free_at_s = self._held_until_s = 0.0

    def book(self, units: float) -> float:
        """Takes the next free place; returns the seconds until then."""
        now_s = self._clock()
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + units * self._s_per_unit
        return start_s - now_s

    def hold(self, seconds: float) -> None:
        """Gives no place for so long."""
        self._held_until_s = max(self._held_until_s, self._clock() + seconds)
        self._free_at_s = max(self._free_at_s, self._held_until_s)

    def is_held(self) -> bool:
        """Whether it stands still, so that places booked before are void."""
        return self._clock() < self._held_until_s


class BudgetSpentError(UserError):
    """The next call could pass the budget."""


class Budget:
    """Reserves the worst case of each call, on disk before the call, and never passes
    `max_cost_usd`."""

    def __init__(self, store: Store, max_cost_usd: float | None) -> None:
        self._store = store
        self._max_cost_usd = max_cost_usd
        self.spent_usd = store.cost_usd()
        self._reserved_usd = 0.0
        self._num_open = 0
        self._settled = asyncio.Condition()

    async def reserve(self, cost_usd: float) -> int | None:
        """Waits for calls in flight to settle where need be; the reservation, or None where the
        call is free.

        Raises:
            BudgetSpentError: the call does not fit even when nothing else is in flight.
        """
        if cost_usd == 0:
            return None
        async with self._settled:
            while not self._fits(cost_usd):
                if self._num_open == 0:
                    raise BudgetSpentError(
                        f"the budget is spent: ${self.spent_usd:.4f} of "
                        f"${self._max_cost_usd:.4f}, and the next call "
                        f"may cost ${cost_usd:.4f}. All answers so far are stored; raise "
                        "--max-cost-usd to go on."
                    )
                await self._settled.wait()
            self._reserved_usd += cost_usd
            self._num_open += 1
        try:
            return await self._store.reserve(cost_usd)
        except BaseException:
            await self.settle(cost_usd, 0.0)  # whoever waits for money must not wait for this one
            raise

    def _fits(self, cost_usd: float) -> bool:
        if self._max_cost_usd is None:
            return True
        return self.spent_usd + self._reserved_usd + cost_usd <= self._max_cost_usd

    async def settle(self, reserved_usd: float, spent_usd: float) -> None:
        """Turns a reservation into what was spent."""
        async with self._settled:
            self._num_open -= 1
            self._reserved_usd = self._reserved_usd - reserved_usd if self._num_open else 0.0
            self.spent_usd += spent_usd
            self._settled.notify_all()


MAX_BILLED_CALLS = 2
"""For one answer in one run: a call that was cut or cannot be read may be paid for, so it is made
again only once."""


@dataclass(frozen=True)
class Estimate:
    """What a run would ask for, by a guess without a tokenizer; costs in USD, None where the price
    is unknown."""

    num_stored: int
    calls: int
    prompt_tokens: int
    output_tokens: int
    cost_usd: float | None
    max_cost_usd: float | None
    """No run pays more: every prompt with a token per byte, every output of its full length, every
    call made as often as it may be paid for, every text that may fail a check written a second
    time."""


def estimate(
    requests: Iterable[Request],
    writer: Named,
    store: Store | None = None,
    price: Price | None = None,
    *,
    maybe_requests: Iterable[Request] = (),
) -> Estimate:
    """Return calls, tokens and cost of what the store lacks; ask nothing.

    Args:
        requests: what will be asked.
        writer: who is asked.
        store: answers so far.
        price: replaces the price table.
        maybe_requests: what may be asked on top; it counts in the upper bound alone.
    """
    price = price or price_of(writer)
    num_requests = calls = 0
    prompt_tokens = output_tokens = max_cost_usd = 0.0
    for request in requests:
        num_requests += 1
        if _is_missing(request, writer, store):
            calls += 1
            prompt_tokens += expected_prompt_tokens(request)
            output_tokens += expected_output_tokens(request)
            max_cost_usd += MAX_BILLED_CALLS * price.worst_usd(request) if price else 0.0
    if price:
        maybe_missing = (one for one in maybe_requests if _is_missing(one, writer, store))
        max_cost_usd += sum(MAX_BILLED_CALLS * price.worst_usd(one) for one in maybe_missing)
    return Estimate(
        num_stored=num_requests - calls,
        calls=calls,
        prompt_tokens=round(prompt_tokens),
        output_tokens=round(output_tokens),
        cost_usd=price.cost_usd(prompt_tokens, output_tokens) if price else None,
        max_cost_usd=max_cost_usd if price else None,
    )


def _is_missing(request: Request, writer: Named, store: Store | None) -> bool:
    answer = store.get(writer, request) if store is not None else None
    return answer is None or not answer.is_final


NUM_WITHOUT_TEXT = 20
"""Answers without any text, whatever their category, after which a run ends if there never was
one."""
NUM_WITHOUT_USE = 50
"""Answers of one category, none of which passes the checks, after which a run ends."""
_CURES = {
    "truncated": "The output limit is too low for the text: shorten what the template asks for.",
    "blocked": "The server blocks these prompts or answers: try another model or another source.",
    "judged": "The writer turns its own texts down (--judge): look at them in the store, then "
    "change the template.",
    "no verdict": "The model says neither yes nor no: take a larger one, or leave --judge out.",
    "refused": "The model refuses: change the template (--templates) or the model.",
    "invalid": "The server sends no text: check the model and the address, and the request that it "
    "complains about.",
}
_THOUGHTS_CURE = (
    "The model spends its output on thoughts: take one that does not think or turn its thinking "
    "off at the server, or "
    "leave room with --thinking-tokens N, which raises the output limit of every text (and what it "
    "may cost)."
)
_CHECK_CURE = (
    "Look at these texts in the store, then change the template (--templates) or take a larger "
    "model."
)


class UselessRunError(UserError):
    """Nothing that comes back can be used: of any category, or of one."""

    def __init__(self, message: str, category: str | None = None) -> None:
        super().__init__(message)
        self.category = category


class Trial:
    """Counts what can be used of the first answers of each category."""

    def __init__(self) -> None:
        self._faults: dict[str, Counter[str]] = {}
        self._proven: set[str] = set()
        self._without_text: Counter[str] = Counter()
        self._has_text = False

    def note(self, category: str, answer: Answer, fault: str | None) -> None:
        """Count one answer, with what is wrong with it.

        Raises:
            UselessRunError: no answer so far has a text, or none of this category passes.
        """
        self._has_text = self._has_text or answer.status == "ok"
        if fault is None:
            self._proven.add(category)
        if category in self._proven:
            return
        faults = self._faults.setdefault(category, Counter())
        faults[_shown(answer, fault)] += 1
        if not answer.is_turned_down:  # those are counted where they are asked for
            self._without_text[_shown(answer, fault)] += 1
        if not self._has_text and self._without_text.total() >= NUM_WITHOUT_TEXT:
            raise useless(
                f"of the first {NUM_WITHOUT_TEXT} answers none has a text", self._without_text
            )
        if faults.total() >= NUM_WITHOUT_USE:
            raise useless(
                f"none of the first {faults.total()} answers for `{category}` can be used",
                faults,
                category,
            )


def _shown(answer: Answer, fault: str | None) -> str:
    return f"{fault}: {answer.reason}" if answer.reason else str(fault)


def useless(what: str, faults: Counter[str], category: str | None = None) -> UselessRunError:
    """Return the error that ends a useless run, with the most common faults and what to do."""
    reasons = "; ".join(f"{fault} ({count})" for fault, count in faults.most_common(3))
    worst = faults.most_common(1)[0][0]
    cure = (
        _THOUGHTS_CURE if "thoughts" in worst else _CURES.get(worst.partition(":")[0], _CHECK_CURE)
    )
    return UselessRunError(
        f"{what}: {reasons}. So the run ends here; the next one asks for what has no text again. "
        f"{cure}",
        category,
    )
