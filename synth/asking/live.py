"""Asks a writer, one call for each request that the store lacks, and returns answers in order."""

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
from typing import Any

from tqdm import tqdm

from sft_probe.errors import UserError
from sft_probe.synth.asking.batch import BatchWriter, ask_batch
from sft_probe.synth.asking.budget import LOCAL_WRITERS, Limits
from sft_probe.synth.asking.call import Caller
from sft_probe.synth.asking.protocol import Answer, Request, Writer
from sft_probe.synth.asking.store import Store, request_key

_LOG = logging.getLogger(__name__)
_WINDOW = 1000
"""Requests held at once. One that waits for its server delays the order, not the others."""
_MANY_FAILURES = 20
_PATIENCE_S = 5.0
"""Longest wait for a writer to end."""
_LOG_INTERVAL_S = 60.0


class Progress:
    """The live line on a terminal; elsewhere a line of the log each minute and one at the end."""

    def __init__(self, total: int | None = None) -> None:
        self._bar = tqdm(
            total=total, unit="text", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
        )
        self._total = total
        self._started_s = self._logged_s = time.monotonic()
        self._num_stored = 0
        self._statuses: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def stored(self) -> None:
        """Count one text from the store."""
        self._num_stored += 1
        self._bar.update()

    def answered(self, status: str, cost_usd: float | None) -> None:
        """Count one answer; `cost_usd` is what all runs cost so far."""
        self._statuses[status] += 1
        self._bar.set_postfix_str(self._postfix(cost_usd), refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged_s > _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            _LOG.info("%s", self._line(cost_usd))

    def failed(self, fault: str) -> None:
        """Count one text that did not pass a check."""
        self._faults[fault] += 1

    def _postfix(self, cost_usd: float | None) -> str:
        """Return the cost, and what fails: answers without a text by status, texts by fault."""
        faults = self._faults + self._statuses
        del faults["ok"]
        cost = "cost unknown" if cost_usd is None else f"${cost_usd:.4f} so far"
        return "; ".join([cost, *(f"{count} {fault}" for fault, count in faults.most_common())])

    def _line(self, cost_usd: float | None) -> str:
        of = f" of {self._total}" if self._total is not None else ""
        return tqdm.format_meter(
            self._num_stored + self._statuses.total(),
            self._total or 0,
            time.monotonic() - self._started_s,
            initial=self._num_stored,
            unit=" texts",
            bar_format=f"{{n}}{of} texts done{{postfix}}; {{rate_fmt}}, {{remaining}} to go",
            postfix=f"{self._num_stored} from the store; {self._postfix(cost_usd)}",
        )

    def close(self, cost_usd: float | None) -> None:
        """End the line."""
        self._bar.close()
        if self._statuses:
            _LOG.info("%s", self._line(cost_usd))


def ask_all(
    requests: Iterable[Request],
    writer: Writer | BatchWriter,
    store: Store,
    limits: Limits,
    *,
    progress: Progress | None = None,
) -> Generator[tuple[Request, Answer], None, None]:
    """Yield all requests with their answers, in order; request what the store lacks.

    Every answer is on disk before it is yielded. An answer that is not final (out of attempts,
    not accepted by the server) is yielded like any other, and requested again by the next run.
    SIGINT and SIGTERM stop new calls; calls in flight are completed and stored, then `SystemExit`
    is raised. A second signal does not wait for them.

    Args:
        requests: may be a generator of any length; a thousand are held at a time. (Batch writers
            hold all.)
        writer: the writer.
        store: holds the answers; locked meanwhile.
        limits: rates, retries and money.
        progress: the live line, where the caller also counts in it.

    Raises:
        UserError: the budget is spent or cannot be kept, the model's version changed, the writer
            cannot work, many requests failed in a row, the disk is full, or another run holds the
            store. Answers so far are stored.
    """
    with store.exclusive():
        _warn_of_earlier_runs(store, limits)
        if isinstance(writer, BatchWriter):
            yield from ask_batch(requests, writer, store, limits)
            return
        with asyncio.Runner() as runner:
            run = _LiveRun(requests, writer, store, limits, progress or Progress())
            try:
                with _stopped_by_signals(run, runner.get_loop()):
                    while answers := runner.run(run.next_answers()):
                        yield from answers
            finally:
                runner.run(run.close())


def _warn_of_earlier_runs(store: Store, limits: Limits) -> None:
    if limits.max_cost_usd is not None and (number := store.num_unpriced()):
        _LOG.warning(
            "%d answers of earlier runs were requested without --price: the budget counts them as "
            "free",
            number,
        )
    count, cost_usd = store.lost_calls()
    if count:
        _LOG.warning(
            "%d calls of earlier runs were made and never answered (killed, cut or timed out). "
            "They may have been paid for: $%.4f is counted as spent.",
            count,
            cost_usd,
        )


@contextmanager
def _stopped_by_signals(run: "_LiveRun", loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """End the run cleanly at the first SIGINT or SIGTERM and at once at the second. A third reaches
    the previous handlers."""
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
            "stopping; waiting for calls in flight, which are paid for (Ctrl-C: do not wait)"
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


class _LiveRun:
    """A window of requests in order, with one task for each that the store lacks."""

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
        self._caller = Caller(writer, store, limits)
        self._window: deque[tuple[Request, asyncio.Future[Answer | None]]] = deque()
        self._tasks: dict[str, asyncio.Task[Answer | None]] = {}
        # An unknown server gets one call at first, and one more for each that ends well or is free
        self._num_places = limits.concurrency if writer.name in LOCAL_WRITERS else 1
        self._places = asyncio.Semaphore(self._num_places)
        self._num_failed = 0
        self._abandoned = asyncio.Event()
        self._failure: BaseException | None = None

    async def next_answers(self) -> list[tuple[Request, Answer]]:
        """Return at least one answer, in order; none at the end. Raise what ended the run early."""
        self._fill()
        if self._window:
            abandoned = asyncio.ensure_future(self._abandoned.wait())
            first: list[asyncio.Future[Any]] = [self._window[0][1], abandoned]
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            abandoned.cancel()
        answers = []
        while self._window and self._window[0][1].done():
            answer = self._window[0][1].result()
            if answer is None:
                break
            answers.append((self._window.popleft()[0], answer))
        if not answers and self._failure is not None:
            raise self._failure
        return answers

    def stop(self, reason: BaseException) -> None:
        """Make no more calls; `next_answers` raises `reason` once it has no more answers."""
        self._failure = self._failure or reason
        self._caller.stop()

    def abandon(self) -> None:
        """Give up calls in flight."""
        self._abandoned.set()
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """Complete and store calls in flight, then close the writer's connections."""
        self.stop(GeneratorExit())
        try:
            async with asyncio.timeout(_PATIENCE_S if self._abandoned.is_set() else None):
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            async with asyncio.timeout(_PATIENCE_S):
                await self._writer.close()
        except TimeoutError:
            _LOG.warning("the writer does not end; it is left running")
        finally:
            await self._store.drain()
            self._progress.close(self._caller.cost_usd())

    def _fill(self) -> None:
        """Fill the window: answers of the store as they are, a task for each other request."""
        try:
            while self._failure is None and len(self._window) < _WINDOW:
                request = next(self._requests, None)
                if request is None:
                    return
                self._window.append((request, self._answer_of(request)))
        except Exception as error:  # of the caller's generator, or a damaged store
            self.stop(error)

    def _answer_of(self, request: Request) -> "asyncio.Future[Answer | None]":
        key = request_key(self._writer, request)
        if key in self._tasks:
            self._progress.stored()
            return self._tasks[key]
        stored = self._store.get_key(key)
        if stored is not None and stored.is_final:
            self._progress.stored()
            done: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
            done.set_result(stored)
            return done
        is_known_bad = stored is not None and stored.is_turned_down
        self._tasks[key] = asyncio.create_task(self._ask(key, request, is_known_bad))
        return self._tasks[key]

    async def _ask(self, key: str, request: Request, is_known_bad: bool) -> Answer | None:
        """Return the answer to a request, None where the run has ended before."""
        try:
            async with self._places:
                answer = None if self._failure else await self._caller.ask(request)
            if answer is not None:
                self._note(answer, is_known_bad)
            return answer
        except BaseException as error:  # raised by `next_answers`: no task ends silently
            self.stop(error)
            return None
        finally:
            del self._tasks[key]

    def _note(self, answer: Answer, is_known_bad: bool) -> None:
        """Count an answer: for the live line, the number of calls in flight, and failures."""
        self._progress.answered(answer.status, self._caller.cost_usd())
        if answer.status in ("ok", "error") and self._num_places < self._limits.concurrency:
            self._num_places += 1
            self._places.release()
        if answer.is_turned_down and is_known_bad:
            return  # by an earlier run too: it says nothing new about the server
        self._num_failed = 0 if answer.is_final else self._num_failed + 1
        if self._num_failed == _MANY_FAILURES:
            self.stop(
                UserError(
                    f"{_MANY_FAILURES} requests in a row failed, the last with: {answer.reason}. "
                    "Answers so far are stored, and the failed requests will be asked again: fix "
                    "the cause, then run the same command."
                )
            )
