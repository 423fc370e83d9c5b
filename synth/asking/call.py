"""One request through its attempts to the store, and the money that it costs on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from sft_probe.errors import UserError
from sft_probe.synth.asking import budget
from sft_probe.synth.asking.protocol import (
    Answer,
    Request,
    RetryLater,
    Writer,
    WriterId,
    failed_answer,
)
from sft_probe.synth.asking.store import Store

_MAX_WAIT_S = 900.0
"""Longest wait that a server may ask for. A longer one is that for a daily quota."""
_MIN_WAIT_S = 1.0
"""Shortest wait that a server may name without the usual backoff in addition."""


@dataclass
class Reservation:
    """The worst case of one call, kept on disk from before the call until its answer is stored."""

    cost_usd: float
    id: int | None = None
    """None where the call is free or its price unknown, and once the money is accounted for."""


class Account:
    """The answers and the money of one writer on one store.

    The worst case of a call is reserved on disk before it is made, and the sum of what is spent and
    reserved never exceeds the budget.

    Raises:
        UserError: there is a budget and no price.
    """

    def __init__(self, writer: WriterId, store: Store, limits: budget.Limits) -> None:
        self._writer, self._store, self._max_cost_usd = writer, store, limits.max_cost_usd
        self._price = budget.price_within(limits, writer)
        self._spent_usd, self._reserved_usd, self._num_open = store.cost_usd(), 0.0, 0
        self._settled = asyncio.Condition()
        self._version = store.model_version(writer)
        self._other_version: str | None = None

    def spent_usd(self) -> float | None:
        """Return what all runs on the store have spent; None where the price is unknown."""
        return None if self._price is None else self._spent_usd

    def worst_usd(self, request: Request) -> float:
        """Return the most that one call can cost, 0 where the price is unknown."""
        return self._price.worst_usd(request) if self._price else 0.0

    @asynccontextmanager
    async def reserve(self, cost_usd: float) -> AsyncIterator[Reservation]:
        """Hold the worst case of one call while it is made; wait for other calls where needed.

        It is freed at the end, unless the answer was stored or the call may have been paid for: cut
        off, cancelled, or ended by an unknown error.

        Raises:
            BudgetSpentError: the call does not fit even when nothing else is in flight.
        """
        held, is_free = await self._hold(cost_usd), True
        try:
            yield held
        except (UserError, RetryLater) as error:
            is_free = not getattr(error, "maybe_billed", False)
            raise
        except BaseException:
            is_free = False
            raise
        finally:
            reservation = held.id
            if reservation is not None:
                await self._settle(held, 0.0 if is_free else cost_usd)
                if is_free:
                    await self._store.release(reservation)

    async def _hold(self, cost_usd: float) -> Reservation:
        held = Reservation(cost_usd)
        if cost_usd == 0:
            return held
        async with self._settled:
            while not self._fits(cost_usd):
                if self._num_open == 0:
                    raise budget.BudgetSpentError(
                        f"the budget is spent: ${self._spent_usd:.4f} of "
                        f"${self._max_cost_usd:.4f}, and the next call may cost ${cost_usd:.4f}. "
                        "All answers so far are stored; raise --max-cost-usd to continue."
                    )
                await self._settled.wait()
            self._reserved_usd += cost_usd
            self._num_open += 1
        try:
            held.id = await self._store.reserve(cost_usd)
        except BaseException:
            await self._settle(held, 0.0)  # others may wait for this money
            raise
        return held

    def _fits(self, cost_usd: float) -> bool:
        total_usd = self._spent_usd + self._reserved_usd + cost_usd
        return self._max_cost_usd is None or total_usd <= self._max_cost_usd

    async def _settle(self, held: Reservation, spent_usd: float) -> None:
        """Replace a reservation by what was spent."""
        async with self._settled:
            held.id = None
            self._num_open -= 1
            self._reserved_usd = self._reserved_usd - held.cost_usd if self._num_open else 0.0
            self._spent_usd += spent_usd
            self._settled.notify_all()

    def checked(self, answer: Answer) -> Answer:
        """Return the answer, as an `error` where its model version differs from that of the first
        answer in the store."""
        version = answer.model_version
        if version is None or answer.status == "error":
            return answer
        self._version = self._version or version
        if version == self._version:
            return answer
        self._other_version = version
        return replace(answer, status="error", text=None, reason=f"version {version!r} answered")

    async def save(
        self, request: Request, answer: Answer, attempts: int = 1, held: Reservation | None = None
    ) -> Answer:
        """Store an answer with its cost, in place of its reservation; return it as stored."""
        kept = self.checked(answer)
        cost_usd = self._price.answer_usd(request, answer) if self._price else None
        reservation = held.id if held else None
        try:
            await self._store.save(
                self._writer,
                request,
                kept,
                cost_usd=cost_usd,
                attempts=attempts,
                reservation=reservation,
            )
        finally:
            if held is not None and reservation is not None:
                await self._settle(held, cost_usd or 0.0)
        return kept

    def check_version(self) -> None:
        """Raise `UserError` where an answer came from another version of the model."""
        if self._other_version is not None:
            raise UserError(
                f"the answers of {self._writer.model!r} come from version {self._version!r} so "
                f"far, and now from {self._other_version!r}, but a set must come from one. Run the "
                "same command later; if the version stays, start in a new directory, with a "
                f"--model name that fixes it. ({self._store.path} keeps all answers.)"
            )


class Caller:
    """Calls one writer under one set of limits.

    Raises:
        UserError: there is a budget and no price.
    """

    def __init__(self, writer: Writer, store: Store, limits: budget.Limits) -> None:
        self.account = Account(writer, store, limits)
        self._writer, self._limits = writer, limits
        self._requests = budget.Pace(limits.requests_per_minute, time.monotonic)
        self._tokens = budget.Pace(limits.tokens_per_minute, time.monotonic)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End waits between attempts; calls in flight continue."""
        self._stopped.set()

    async def ask(self, request: Request) -> Answer | None:
        """Return the stored answer: `error` after the last attempt, None where the run was stopped.

        Raises:
            UserError: the budget is spent, the writer cannot work, the server asks for too long a
                wait, or another version of the model answered.
        """
        num_billed = attempt = 0
        while True:
            attempt += 1
            try:
                async with self.account.reserve(self.account.worst_usd(request)) as held:
                    if not await self._take_turn(request):
                        return None
                    answer = await self._call(request)
                    answer = await self.account.save(request, answer, attempt, held)
                self.account.check_version()
                return answer
            except RetryLater as wait:
                seconds = pause_s(self._limits, attempt, wait)
                num_billed += wait.maybe_billed
                if attempt == self._limits.max_attempts or num_billed == budget.MAX_BILLED_CALLS:
                    failure = failed_answer(str(wait), wait.raw)
                    return await self.account.save(request, failure, attempt)
                if wait.wait_s:
                    self._requests.hold(wait.wait_s)  # the quota is shared, so all calls wait
                await self._sleep(seconds)

    async def _call(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._writer.write(request)
        except TimeoutError:
            seconds = f"{self._limits.timeout_s:g}"
            raise RetryLater(f"no answer in {seconds} s", maybe_billed=True) from None

    async def _take_turn(self, request: Request) -> bool:
        """Wait for a place; return False where the run is stopped."""
        delay_s = max(
            self._requests.book(1), self._tokens.book(budget.expected_prompt_tokens(request))
        )
        while await self._sleep(delay_s):
            if not self._requests.is_held():
                return True
            delay_s = self._requests.book(1)  # the server has asked for a wait meanwhile
        return False

    async def _sleep(self, seconds: float) -> bool:
        """Wait; return False, at once, where the run is stopped."""
        if seconds > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
        return not self._stopped.is_set()


def pause_s(limits: budget.Limits, attempt: int, wait: RetryLater) -> float:
    """Return the seconds to wait after a failed attempt: those that the server names, or the usual
    backoff where it names none or less than a second.

    Raises:
        UserError: the server asks for too long a wait.
    """
    named_s = wait.wait_s or 0.0
    if named_s > _MAX_WAIT_S:
        raise UserError(
            f"the server asks to wait {named_s:.0f} s ({wait}). All answers so far are stored; run "
            "the same command then."
        ) from None
    return named_s if named_s >= _MIN_WAIT_S else named_s + budget.backoff_s(limits, attempt)
