"""Prices, rates and limits of a run, and when a run of no use ends."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Request, WriterId

MAX_BILLED_CALLS = 2
"""Most calls for one answer in one run that may be billed. A call that was cut off, or cannot be
read, may be paid for, so it is repeated only once."""
PRICES_DATE = "2026-10-07"
# USD per million tokens of input and of output (thinking included), for prompts up to 200k tokens:
# https://ai.google.dev/gemini-api/docs/pricing
_PRICES = {
    # half until 2026-12-31; a budget should hold on the day after, too
    "gemini-3.8-flash": (1.50, 7.50),
    "gemini-3.7-flash": (1.50, 7.50),
    "gemini-3.6-flash": (1.50, 7.50),
    "gemini-3.5-flash": (1.50, 9.00),
    "gemini-3.5-flash-lite": (0.30, 2.50),
    "gemini-3.1-pro-preview": (2.00, 12.00),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
}
LOCAL_WRITERS = ("hf", "offline")
"""Writers that are free and make full use of their concurrency from the start."""
# English, for the expected cost: about four bytes and three quarters of a word per token
_BYTES_PER_TOKEN, _TOKENS_PER_WORD = 4, 4 / 3
_TEMPLATE_TOKENS = 128
# no count of a working server exceeds these
_MAX_BYTES_PER_TOKEN, _MAX_OUTPUT_TOKENS = 128, 200_000
_MAX_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input_usd: float
    output_usd: float

    def cost_usd(self, num_prompt_tokens: float, num_output_tokens: float) -> float:
        """Return the cost of one or many calls with this many tokens."""
        return (num_prompt_tokens * self.input_usd + num_output_tokens * self.output_usd) / 1e6

    def answer_usd(self, request: Request, answer: Answer) -> float:
        """Return the cost of one answer; the worst case where the server's count is missing, far
        too small for the texts, or far beyond any model's limit."""
        prompt, output = answer.num_prompt_tokens, answer.num_output_tokens
        if prompt == 0 and not answer.is_final:
            return 0.0
        if (
            not prompt
            or output is None
            or output > _MAX_OUTPUT_TOKENS
            or prompt * _MAX_BYTES_PER_TOKEN < _num_bytes(request.prompt)
            or output * _MAX_BYTES_PER_TOKEN < _num_bytes(answer.text or "")
        ):
            return self.worst_usd(request)
        return self.cost_usd(prompt, output)

    def worst_usd(self, request: Request) -> float:
        """Return the most that one call can cost: a token per byte, and the whole output limit."""
        return self.cost_usd(max_prompt_tokens(request), request.max_output_tokens)


def parse_price(text: str) -> Price:
    """Return the price in `INPUT,OUTPUT`, USD per million tokens. Raise `UserError` for other
    text."""
    try:
        input_usd, output_usd = map(float, text.split(","))
    except ValueError:
        input_usd = output_usd = -1.0
    if not (0 <= input_usd < float("inf") and 0 <= output_usd < float("inf")):
        raise UserError(
            f"{text!r} is not a price. Give USD per million tokens of input and of output, such as "
            "0.30,2.50."
        )
    return Price(input_usd, output_usd)


def price_of(writer: WriterId) -> Price | None:
    """Return the list price of a model, 0 for local writers; None where it is not in the table."""
    if writer.name in LOCAL_WRITERS:
        return Price(0.0, 0.0)
    prices = _PRICES.get(writer.model.removeprefix("models/"))
    if prices is None or not writer.name.startswith("gemini"):
        return None
    factor = 0.5 if writer.name == "gemini-batch" else 1.0
    return Price(prices[0] * factor, prices[1] * factor)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def max_prompt_tokens(request: Request) -> int:
    """Return an upper bound: the prompt's UTF-8 bytes, and some for a chat template."""
    return _num_bytes(request.prompt) + _TEMPLATE_TOKENS


def expected_prompt_tokens(request: Request) -> float:
    """Return an estimate without a tokenizer."""
    return _num_bytes(request.prompt) / _BYTES_PER_TOKEN


def expected_output_tokens(request: Request) -> float:
    """Return an estimate without a tokenizer, from the requested length."""
    return min(request.num_words * _TOKENS_PER_WORD, request.max_output_tokens)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the rate, time and money of a run."""

    concurrency: int = 16
    """Largest number of calls in flight."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt tokens, as quotas count them; estimated, since the server counts only afterwards."""
    max_cost_usd: float | None = None
    """Largest cost of all runs on one store. No call is made whose worst case would exceed it."""
    price: Price | None = None
    """Replaces the price table."""
    timeout_s: float = 120.0
    """Time-out of one call, which then counts as paid."""
    max_attempts: int = 6
    """Largest number of calls for one answer in one run, after which `error` is stored."""
    max_wait_s: float | None = None
    """Longest wait for batch jobs; None waits without end."""
    first_backoff_s: float = 1.0
    """Upper bound of the wait before the second attempt, where the server names none. It doubles
    each time."""


def price_within(limits: Limits, writer: WriterId) -> Price | None:
    """Return the price for a run. Raise `UserError` where a budget is set but no price is known."""
    price = limits.price or price_of(writer)
    if price is None and limits.max_cost_usd is not None:
        raise UserError(
            f"--max-cost-usd cannot be kept: the price of {writer.model!r} is not in the table of "
            f"{PRICES_DATE}. Give it with --price INPUT,OUTPUT (USD per million tokens; 0,0 for a "
            "server of your own)."
        )
    return price


def backoff_s(limits: Limits, attempt: int) -> float:
    """Return the seconds to wait after the given failed attempt (1 for the first).

    Exponential backoff with full jitter: uniform between 0 and a ceiling that doubles, so that
    calls which failed together are not repeated together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    """
    ceiling = min(_MAX_BACKOFF_S, limits.first_backoff_s * 2 ** (attempt - 1))
    return random.uniform(0, ceiling)  # noqa: S311 - not secret


class Pace:
    """Spreads units (requests, tokens) evenly over time, and pauses where the server says so."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._s_per_unit = 60 / per_minute if per_minute else 0.0
        self._clock = clock
        self._free_at_s = self._held_until_s = 0.0

    def book(self, units: float) -> float:
        """Take the next free place; return the seconds until then."""
        now_s = self._clock()
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + units * self._s_per_unit
        return start_s - now_s

    def hold(self, seconds: float) -> None:
        """Give no place for so many seconds."""
        self._held_until_s = max(self._held_until_s, self._clock() + seconds)
        self._free_at_s = max(self._free_at_s, self._held_until_s)

    def is_held(self) -> bool:
        """Return whether it pauses, so that places booked before are void."""
        return self._clock() < self._held_until_s


class BudgetSpentError(UserError):
    """The next call could exceed the budget."""


_NUM_WITHOUT_TEXT, _NUM_WITHOUT_USE = 20, 50
"""Number of answers of any category, none with a text, and of one category, none of which passes
the checks, after which a run ends."""
_CURES = {
    "truncated": "The output limit is too low for the text: shorten what the template asks for.",
    "blocked": "The server blocks these prompts or answers: try another model or source.",
    "judged": "The writer judges its own texts to be bad (--judge): look at them in the store and "
    "change the template.",
    "no verdict": "The model says neither yes nor no: take a larger one, or leave --judge out.",
    "refused": "The model refuses: change the template (--templates) or the model.",
    "invalid": "The server sends no text: check the model and the address, and the request that it "
    "complains about.",
}
_THOUGHTS_CURE = (
    "The model spends its output on thoughts: take one that does not think, turn its thinking off "
    "at the server, or leave room with --thinking-tokens N, which raises the output limit of every "
    "text (and what it may cost)."
)
_CHECK_CURE = (
    "Look at these texts in the store, then change the template (--templates) or take a larger "
    "model."
)


class UselessRunError(UserError):
    """None of the answers can be used: of a category, or of any."""

    def __init__(self, what: str, faults: Counter[str], category: str | None = None) -> None:
        reasons = "; ".join(f"{fault} ({count})" for fault, count in faults.most_common(3))
        worst = faults.most_common(1)[0][0]
        cure = _CURES.get(worst.partition(":")[0], _CHECK_CURE)
        super().__init__(
            f"{what}: {reasons}. The run ends here; the next one requests texts that are missing "
            f"again. {_THOUGHTS_CURE if 'thoughts' in worst else cure}"
        )
        self.category = category


class Trial:
    """Counts the faults of the first answers of each category, and ends a run of no use."""

    def __init__(self) -> None:
        self._faults: dict[str, Counter[str]] = {}
        self._proven: set[str] = set()
        self._without_text: Counter[str] = Counter()
        self._has_text = False

    def note(self, category: str, answer: Answer, fault: str | None) -> None:
        """Count one answer and its fault.

        Raises:
            UselessRunError: no answer so far has a text, or none of this category passes.
        """
        self._has_text = self._has_text or answer.status == "ok"
        if fault is None:
            self._proven.add(category)
        if category in self._proven:
            return
        shown = f"{fault}: {answer.reason}" if answer.reason else str(fault)
        faults = self._faults.setdefault(category, Counter())
        faults[shown] += 1
        if not answer.is_turned_down:  # rejected requests are counted elsewhere
            self._without_text[shown] += 1
        if not self._has_text and self._without_text.total() >= _NUM_WITHOUT_TEXT:
            what = f"of the first {_NUM_WITHOUT_TEXT} answers none has a text"
            raise UselessRunError(what, self._without_text)
        if faults.total() >= _NUM_WITHOUT_USE:
            what = f"none of the first {faults.total()} answers for `{category}` can be used"
            raise UselessRunError(what, faults, category)
