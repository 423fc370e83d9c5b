"""Asks a writer for what the store lacks, and gives back everything in order."""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

from sft_probe.errors import UserError
from sft_probe.synth.asking.batch import BatchWriter, obtain_batch
from sft_probe.synth.asking.budget import (
    LOCAL_WRITERS,
    Limits,
)
from sft_probe.synth.asking.call import Caller
from sft_probe.synth.asking.protocol import Answer, Request, Writer
from sft_probe.synth.asking.store import Store, request_key

_LOG = logging.getLogger(__name__)
# Requests held at once. One that waits for its server holds up the order, not the asking, until so
# many are done.
_WINDOW = 4096
_MANY_FAILURES = 20
_PATIENCE_S = 5.0
"""With a writer that was told to end."""


_LOG_INTERVAL_S = 60.0


class Progress:
    """One line on a terminal; elsewhere a line of the log each minute and one at the end."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._bar = tqdm(
            total=total, unit="text", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
        )
        self._started_s = self._logged_s = time.monotonic()
        self._num_stored = 0
        self._statuses: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def stored(self) -> None:
        """Count one text that the store had already."""
        self._num_stored += 1
        self._bar.update()

    def answered(self, status: str, cost_usd: float | None) -> None:
        """Count one text that was asked for; `cost_usd` is what all runs cost so far."""
        self._statuses[status] += 1
        self._bar.set_postfix_str("; ".join([_cost(cost_usd), *self._failures()]), refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged_s > _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            _LOG.info("%s", self.line(cost_usd))

    def failed(self, fault: str) -> None:
        """Count one text that did not pass a check."""
        self._faults[fault] += 1

    def _failures(self) -> list[str]:
        """Return what fails, most often first: answers without a text by status, texts by fault."""
        without_text = Counter(
            {status: count for status, count in self._statuses.items() if status != "ok"}
        )
        return [f"{count} {name}" for name, count in (without_text + self._faults).most_common()]

    def line(self, cost_usd: float | None) -> str:
        """Return the same in words, with what fails."""
        asked = self._statuses.total()
        rate = asked / max(time.monotonic() - self._started_s, 1e-9)
        done = self._num_stored + asked
        parts = [f"{done} texts done ({self._num_stored} from the store)"]
        if self._total is not None:
            left = self._total - done
            parts.append(
                f"{left} left"
                + (f", {tqdm.format_interval(left / rate)} to go" if left and asked else "")
            )
        parts.append(f"{rate:.1f} a second")
        parts.append(_cost(cost_usd))
        return "; ".join(parts + self._failures())

    def close(self, cost_usd: float | None) -> None:
        """End the line."""
        self._bar.close()
        if self._statuses:
            _LOG.info("%s", self.line(cost_usd))


def _cost(cost_usd: float | None) -> str:
    return "cost unknown" if cost_usd is None else f"${cost_usd:.4f} so far"


def obtain(
    requests: Iterable[Request],
    writer: Writer | BatchWriter,
    store: Store,
    limits: Limits,
    *,
    total: int | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[Request, Answer], None, None]:
    """Yield all requests with their answers, in order; ask for what the store lacks.

    Every answer is on disk before it is given back. An answer that is not final (out of attempts,
    not taken by the server) is given back like any other, and asked for again by the next call.
    SIGINT and SIGTERM end the asking; calls in flight are waited for and stored, then `SystemExit`
    is raised. A second one does not wait.

    Args:
        requests: may be a generator of any length; a few thousand are held at a time. (Batch
        writers hold all.) writer: whom to ask.
        store: where answers are kept; held exclusively meanwhile.
        limits: rates, retries and money.
        total: number of requests, for the live line.
        progress: the live line, where somebody else has a word in it.

    Raises:
        UserError: the budget is spent or cannot be kept, the model's version changed, the writer
        cannot work, many
            requests failed in a row, the disk is full, or another run holds the store. Answers so
            far are stored.
    """
    with store.exclusive():
        _warn_of_earlier_runs(store, limits)
        if isinstance(writer, BatchWriter):
            yield from obtain_batch(requests, writer, store, limits)
            return
        with asyncio.Runner() as runner:
            run = _Run(requests, writer, store, limits, progress or Progress(total))
            runner.run(run.start())
            try:
                with _stopped_by_signals(run, runner.get_loop()):
                    while answers := runner.run(run.next_answers()):
                        yield from answers
            finally:
                runner.run(run.close())


def _warn_of_earlier_runs(store: Store, limits: Limits) -> None:
    if limits.max_cost_usd is not None and (number := store.num_unpriced()):
        _LOG.warning(
            "%d answers of earlier runs were asked for without --price: the budget counts them as "
            "free",
            number,
        )
    count, cost_usd = store.lost_calls()
    if count:
        _LOG.warning(
            "%d calls of earlier runs were made and never answered (killed, cut or timed out). "
            "They may have been "
            "paid for: $%.4f is counted as spent.",
            count,
            cost_usd,
        )


@contextmanager
def _stopped_by_signals(run: "_Run", loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run cleanly, the second at once; a third meets the
    handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: FrameType | None) -> None:
        for one in signals:
            signal.signal(one, abandon)
        _LOG.warning(
            "stopping; waiting for calls in flight, so that they need not be paid again (Ctrl-C: "
            "do not wait)"
        )
        loop.call_soon_threadsafe(run.stop, SystemExit(128 + number))

    def abandon(_number: int, _frame: FrameType | None) -> None:
        restore()
        _LOG.warning("stopped at once; calls in flight are lost and count as paid")
        loop.call_soon_threadsafe(run.abandon)

    for number in signals:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


class _Slot:
    """Where an answer will be; shared by requests with the same key."""

    __slots__ = ("answer", "is_known_bad")

    def __init__(self, stored: Answer | None) -> None:
        self.answer = stored if stored is not None and stored.is_final else None
        self.is_known_bad = stored is not None and stored.is_turned_down


class _Run:
    """The asking side of `obtain`: one task for each call that may be in flight, one window of
    requests in order."""

    def __init__(
        self,
        requests: Iterable[Request],
        writer: Writer,
        store: Store,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._requests = iter(requests)
        self._writer, self._store, self._limits, self._progress = writer, store, limits, progress
        self._window: deque[tuple[Request, _Slot]] = deque()
        self._in_flight: dict[str, _Slot] = {}
        self._num_failed = 0
        # Nothing is known of a server yet: one call at first, and one more for each that ends well
        # or costs nothing.
        self._allowed = limits.concurrency if writer.name in LOCAL_WRITERS else 1
        self._is_abandoned = False
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Makes the tasks that ask."""
        self._changed, self._room = asyncio.Event(), asyncio.Event()
        self._caller = Caller(self._writer, self._store, self._limits)
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._limits.concurrency)]

    async def next_answers(self) -> list[tuple[Request, Answer]]:
        """At least one answer, in order; none at the end. Raises what ended the run early."""
        while True:
            answers = []
            while self._window and (answer := self._window[0][1].answer) is not None:
                answers.append((self._window.popleft()[0], answer))
            if answers:
                self._room.set()
                return answers
            if self._is_abandoned or all(task.done() for task in self._tasks):
                if self._failure is not None:
                    raise self._failure
                return []
            self._changed.clear()
            await self._changed.wait()

    def stop(self, reason: BaseException) -> None:
        """Asks nothing more; `next_answers` raises `reason` when the calls in flight have ended."""
        self._failure = self._failure or reason
        self._caller.stop()
        self._room.set()

    def abandon(self) -> None:
        """Give calls in flight up."""
        self._is_abandoned = True
        for task in self._tasks:
            task.cancel()
        self._changed.set()

    async def close(self) -> None:
        """Wait for calls in flight and store them, then close the writer's connections."""
        self.stop(GeneratorExit())
        try:
            async with asyncio.timeout(_PATIENCE_S if self._is_abandoned else None):
                await asyncio.gather(*self._tasks, return_exceptions=True)
            async with asyncio.timeout(_PATIENCE_S):
                await self._writer.close()
        except TimeoutError:
            _LOG.warning("the writer does not end; it is left behind")
        finally:
            await self._store.drain()
            self._progress.close(self.cost_usd())

    def cost_usd(self) -> float | None:
        """Spent so far by all runs on the store; None where the price is unknown."""
        return self._caller.cost_usd()

    async def _work(self) -> None:
        try:
            while (taken := await self._take()) is not None:
                key, request = taken
                answer = await self._caller.ask(request)
                if answer is None:
                    return
                slot = self._in_flight.pop(key)
                slot.answer = answer
                self._allowed += answer.status in ("ok", "error")
                self._progress.answered(answer.status, self.cost_usd())
                self._changed.set()
                self._room.set()
                self._count_failure(answer, slot)
        except BaseException as error:
            self.stop(error)  # raised by `next_answers`: no task ends in silence
        finally:
            self._changed.set()

    async def _take(self) -> tuple[str, Request] | None:
        """The next request that must be asked; those that the store has are passed on."""
        while self._failure is None:
            if len(self._window) >= _WINDOW or len(self._in_flight) >= self._allowed:
                self._room.clear()
                await self._room.wait()
                continue
            request = next(self._requests, None)
            if request is None:
                return None
            key = request_key(self._writer, request)
            slot = self._in_flight.get(key)
            if slot is None:
                slot = _Slot(self._store.get_key(key))
                self._window.append((request, slot))
                if slot.answer is None:
                    self._in_flight[key] = slot
                    return key, request
            else:
                self._window.append((request, slot))
            self._progress.stored()
            self._changed.set()
        return None

    def _count_failure(self, answer: Answer, slot: _Slot) -> None:
        if answer.is_turned_down and slot.is_known_bad:
            return  # of an earlier run: it says nothing new about the server
        self._num_failed = 0 if answer.is_final else self._num_failed + 1
        if self._num_failed == _MANY_FAILURES:
            raise UserError(
                f"{_MANY_FAILURES} requests in a row failed, the last with: {answer.reason}. "
                "Nothing that was answered "
                "is lost, and the others are asked again: fix the cause, then run the same command."
            )


_LOG = logging.getLogger(__name__)
