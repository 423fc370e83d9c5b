"""One request from the rate limit and the budget through its attempts to the store."""

import asyncio
import time
from dataclasses import dataclass, replace

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import (
    MAX_BILLED_CALLS,
    CostLedger,
    Limits,
    Pace,
    backoff_s,
    expected_prompt_tokens,
    price_within,
)
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


@dataclass(frozen=True)
class _Reservation:
    id: int | None
    """None where the call is free or its price unknown."""
    cost_usd: float


class Caller:
    """Calls one writer under one set of limits.

    Raises:
        UserError: there is a budget and no price.
    """

    def __init__(self, writer: Writer, store: Store, limits: Limits) -> None:
        self._writer, self._store, self._limits = writer, store, limits
        self._price = price_within(limits, writer)
        self._ledger = CostLedger(store, limits.max_cost_usd)
        clock = time.monotonic
        self._requests = Pace(limits.requests_per_minute, clock)
        self._tokens = Pace(limits.tokens_per_minute, clock)
        self._stopped = asyncio.Event()
        self._version = VersionPin(writer, store)

    def stop(self) -> None:
        """End waits between attempts; calls in flight continue."""
        self._stopped.set()

    def cost_usd(self) -> float | None:
        """Return what all runs on the store have spent; None where the price is unknown."""
        return None if self._price is None else self._ledger.spent_usd

    async def ask(self, request: Request) -> Answer | None:
        """Return the stored answer: `error` after the last attempt, None where the run was stopped.

        Raises:
            UserError: the budget is spent, the writer cannot work, or another version of the model
                answered.
        """
        held: _Reservation | None = None
        failure, num_billed, attempt = failed_answer(""), 0, 0
        while attempt < self._limits.max_attempts and num_billed < MAX_BILLED_CALLS:
            attempt += 1
            held = held or await self._reserve(request)
            if not await self._take_turn(request):
                await self._release(held)
                return None
            try:
                answer = await self._call(request)
            except RetryLater as wait:
                failure = failed_answer(str(wait), wait.raw)
                num_billed += wait.maybe_billed
                held = await self._settle_failed(wait, held)
                if attempt < self._limits.max_attempts and num_billed < MAX_BILLED_CALLS:
                    await self._back_off(wait, attempt)
                continue
            except UserError:
                await self._release(held)
                raise
            except BaseException:
                await self._lose(held)
                raise
            return await self._save(request, answer, attempt, held)
        await self._release(held)
        return await self._save(request, failure, attempt, None)

    async def _settle_failed(self, wait: RetryLater, held: _Reservation) -> _Reservation | None:
        """Settle the money of a failed call; return the reservation that is left.

        Raises:
            UserError: the server asks for too long a wait.
        """
        left: _Reservation | None = held
        if wait.maybe_billed:
            await self._lose(held)
            left = None
        if (wait.wait_s or 0.0) > _MAX_WAIT_S:
            await self._release(left)
            raise UserError(
                f"the server asks to wait {wait.wait_s:.0f} s ({wait}). All answers so far are "
                "stored; run the same command then."
            ) from None
        return left

    async def _take_turn(self, request: Request) -> bool:
        """Wait for a place; return False where the run is stopped."""
        delay_s = max(self._requests.book(1), self._tokens.book(expected_prompt_tokens(request)))
        while await self._sleep(delay_s):
            if not self._requests.is_held():
                return True
            delay_s = self._requests.book(1)  # the server has asked for a wait meanwhile
        return False

    async def _sleep(self, seconds: float) -> bool:
        if seconds > 0 and not self._stopped.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                pass
        return not self._stopped.is_set()

    async def _back_off(self, wait: RetryLater, attempt: int) -> None:
        if wait.wait_s:
            self._requests.hold(wait.wait_s)  # the quota is shared, so all calls wait
        if (wait.wait_s or 0.0) < _MIN_WAIT_S:
            await self._sleep(backoff_s(self._limits, attempt))

    async def _call(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._writer.write(request)
        except TimeoutError:
            raise RetryLater(
                f"no answer in {self._limits.timeout_s:g} s", maybe_billed=True
            ) from None

    async def _reserve(self, request: Request) -> _Reservation:
        worst_usd = self._price.worst_usd(request) if self._price else 0.0
        return _Reservation(await self._ledger.reserve(worst_usd), worst_usd)

    async def _release(self, held: _Reservation | None) -> None:
        """Free the money of a call that cost nothing."""
        if held is not None and held.id is not None:
            await self._ledger.settle(held.cost_usd, 0.0)
            await self._store.release(held.id)

    async def _lose(self, held: _Reservation) -> None:
        """Count a call that may have been paid for: its reservation stays in the store."""
        if held.id is not None:
            await self._ledger.settle(held.cost_usd, held.cost_usd)

    async def _save(
        self, request: Request, answer: Answer, attempts: int, held: _Reservation | None
    ) -> Answer:
        kept = self._version.check(answer)
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
                await self._ledger.settle(held.cost_usd, cost_usd or 0.0)
        if kept is not answer:
            raise UserError(self._version.remedy(kept))
        return kept


class VersionPin:
    """Checks that all answers of a writer and model in one store come from one model version."""

    def __init__(self, writer: WriterId, store: Store) -> None:
        self._writer, self._store = writer, store
        self._version = store.model_version(writer)

    def check(self, answer: Answer) -> Answer:
        """Return the answer, as an `error` where its version differs from that of the first."""
        if answer.model_version is None or answer.status == "error":
            return answer
        self._version = self._version or answer.model_version
        if answer.model_version == self._version:
            return answer
        return replace(
            answer, status="error", text=None, reason=f"version {answer.model_version!r} answered"
        )

    def remedy(self, answer: Answer) -> str:
        """Return the message about an answer that `check` made an error."""
        return (
            f"the answers of {self._writer.model!r} come from version {self._version!r} so far, "
            f"and now from {answer.model_version!r}, but a set must come from one. Run the same "
            "command later; if the version stays, start in a new directory, with a --model name "
            f"that fixes it. ({self._store.path} keeps all answers.)"
        )
