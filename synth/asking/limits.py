"""How fast to ask, how long to wait, and how much to spend."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from sft_probe.errors import UserError
from sft_probe.synth.asking.prices import PRICES_DATE, Price, price_of
from sft_probe.synth.asking.protocol import Named
from sft_probe.synth.asking.store import Store

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
