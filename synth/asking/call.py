"""One request through pace, budget, attempts and storage."""

import asyncio
from dataclasses import dataclass, replace

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import (
    MAX_BILLED_CALLS,
    Budget,
    Limits,
    Pace,
    backoff_s,
    expected_prompt_tokens,
    price_within,
)
from sft_probe.synth.asking.protocol import Answer, Named, Request, Wait, Writer, error_answer
from sft_probe.synth.asking.store import Store

# a longer wait is that for a quota of the day, and better told than slept through
_MAX_WAIT_S = 900.0
# a server that names a shorter wait is not heard alone: five attempts would pass before it has
# drawn breath
_MIN_WAIT_S = 1.0


@dataclass(frozen=True)
class _Reservation:
    id: int | None
    """None where the call is free or its price unknown."""
    cost_usd: float


class Caller:
    """Calls one writer under one set of limits. To be made and used in a running event loop.

    Raises:
        UserError: there is a budget and no price.
    """

    def __init__(self, writer: Writer, store: Store, limits: Limits) -> None:
        self._writer, self._store, self._limits = writer, store, limits
        self._price = price_within(limits, writer)
        self._budget = Budget(store, limits.max_cost_usd)
        clock = asyncio.get_running_loop().time
        self._requests = Pace(limits.requests_per_minute, clock)
        self._tokens = Pace(limits.tokens_per_minute, clock)
        self._stopped = asyncio.Event()
        self._version = VersionPin(writer, store)

    def stop(self) -> None:
        """End waits between attempts; calls that are made already go on."""
        self._stopped.set()

    def cost_usd(self) -> float | None:
        """Return what was spent so far by all runs on the store; None where the price is
        unknown."""
        return None if self._price is None else self._budget.spent_usd

    async def ask(self, request: Request) -> Answer | None:
        """Return the stored answer: `error` after the last attempt, None where the run was stopped
        before it.

        Raises:
            UserError: the budget is spent, the writer cannot work, or another version of the model
            answered.
        """
        held: _Reservation | None = None
        failure, num_billed, attempt = error_answer(""), 0, 0
        while attempt < self._limits.max_attempts and num_billed < MAX_BILLED_CALLS:
            attempt += 1
            held = held or await self._reserve(request)
            if not await self._take_turn(request):
                await self._release(held)
                return None
            try:
                answer = await self._call(request)
            except Wait as wait:
                failure = error_answer(str(wait), wait.raw)
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

    async def _settle_failed(self, wait: Wait, held: _Reservation) -> _Reservation | None:
        """Settle the money of a failed call; return what is still held. Raise `UserError` where a
        wait is too long."""
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
            delay_s = self._requests.book(1)  # the server has asked to wait meanwhile
        return False

    async def _sleep(self, seconds: float) -> bool:
        if seconds > 0 and not self._stopped.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                pass
        return not self._stopped.is_set()

    async def _back_off(self, wait: Wait, attempt: int) -> None:
        if wait.wait_s:
            self._requests.hold(
                wait.wait_s
            )  # the quota is everybody's, so nobody asks before it is over
        if (wait.wait_s or 0.0) < _MIN_WAIT_S:
            await self._sleep(backoff_s(self._limits, attempt))

    async def _call(self, request: Request) -> Answer:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._writer.write(request)
        except TimeoutError:
            raise Wait(f"no answer in {self._limits.timeout_s:g} s", maybe_billed=True) from None

    async def _reserve(self, request: Request) -> _Reservation:
        worst_usd = self._price.worst_usd(request) if self._price else 0.0
        return _Reservation(await self._budget.reserve(worst_usd), worst_usd)

    async def _release(self, held: _Reservation | None) -> None:
        """Free the money of a call that cost nothing."""
        if held is not None and held.id is not None:
            await self._budget.settle(held.cost_usd, 0.0)
            await self._store.release(held.id)

    async def _lose(self, held: _Reservation) -> None:
        """Spend the money of a call that may have been paid for: its reservation stays in the
        store."""
        if held.id is not None:
            await self._budget.settle(held.cost_usd, held.cost_usd)

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
                await self._budget.settle(held.cost_usd, cost_usd or 0.0)
        if kept is not answer:
            raise UserError(self._version.remedy(kept))
        return kept


class VersionPin:
    """All answers of a writer and model in one store must come from one version of the model."""

    def __init__(self, writer: Named, store: Store) -> None:
        self._writer, self._store = writer, store
        self._version = store.model_version(writer)

    def check(self, answer: Answer) -> Answer:
        """Return the answer itself, or it as an `error` where another version gave it than the
        first."""
        if answer.model_version is None or answer.status == "error":
            return answer
        self._version = self._version or answer.model_version
        if answer.model_version == self._version:
            return answer
        return replace(
            answer, status="error", text=None, reason=f"version {answer.model_version!r} answered"
        )

    def remedy(self, answer: Answer) -> str:
        """Return what to say about an answer that `check` turned down."""
        return (
            f"the answers of {self._writer.model!r} come from version {self._version!r} so far, "
            "and now from "
            f"{answer.model_version!r}: a set must come from one. Run again later if this was "
            "passing; else start in "
            f"a new directory, with a --model name that fixes the version. ({self._store.path} "
            "keeps all answers.)"
        )
