"""Asks a writer, one call for each request that the store lacks, and returns answers in order."""

import asyncio
import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType

from tqdm import tqdm

from sft_probe.errors import UserError
from sft_probe.synth.asking.batch import BatchWriter, ask_batch
from sft_probe.synth.asking.budget import LOCAL_WRITERS, Limits
from sft_probe.synth.asking.call import Caller
from sft_probe.synth.asking.protocol import Answer, Request, Writer
from sft_probe.synth.asking.store import Store, request_key

_LOG = logging.getLogger(__name__)
_SLICE = 1000
"""Requests held at once."""
_MANY_FAILURES = 20
_PATIENCE_S = 5.0
"""Longest wait for a writer to end."""
_LOG_INTERVAL_S = 60.0


class Progress:
    """The live line on a terminal; elsewhere a line of the log each minute and one at the end."""

    def __init__(self, total: int | None = None) -> None:
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, bar_format="{desc}", file=sys.stderr, disable=not is_terminal, leave=False
        )
        self._total = total
        self._started_s = self._logged_s = time.monotonic()
        self._num_stored = 0
        self._statuses: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._cost_usd: float | None = None

    def stored(self) -> None:
        """Count one text from the store."""
        self._num_stored += 1
        self._show()

    def answered(self, status: str, cost_usd: float | None) -> None:
        """Count one answer; `cost_usd` is what all runs cost so far."""
        self._statuses[status] += 1
        self._cost_usd = cost_usd
        self._show()
        if self._bar.disable and time.monotonic() - self._logged_s > _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            _LOG.info("%s", self._line())

    def _show(self) -> None:
        if not self._bar.disable:
            self._bar.set_description_str(self._line(), refresh=False)
            self._bar.update()

    def failed(self, fault: str) -> None:
        """Count one text that did not pass a check."""
        self._faults[fault] += 1

    def _line(self) -> str:
        """Return the number of texts, the cost, what fails (answers without a text by status, texts
        by fault), the rate and the time that is left."""
        num_new = self._statuses.total()
        number = self._num_stored + num_new
        rate = num_new / max(1e-9, time.monotonic() - self._started_s)
        faults = self._faults + self._statuses
        del faults["ok"]
        cost = self._cost_usd
        parts = ["cost unknown" if cost is None else f"${cost:.4f} so far"] if num_new else []
        of, to_go = "", ""
        if self._total is not None:
            left = tqdm.format_interval(max(0, self._total - number) / rate) if rate else "?"
            of, to_go = f" of {self._total}", f", {left} to go"
        parts += [f"{count} {fault}" for fault, count in faults.most_common()]
        parts += [f"{rate:.2f} texts/s{to_go}"] if num_new else []
        done = f"{number}{of} texts done, {self._num_stored} from the store"
        return "; ".join([done, *parts])

    def close(self) -> None:
        """End the line."""
        self._bar.close()
        if self._statuses:
            _LOG.info("%s", self._line())


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
        writer: is asked.
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
            run = _LiveRun(writer, store, limits, progress or Progress(), runner)
            with _stopped_by_signals(run, runner.get_loop()):
                try:
                    yield from run.answers(requests)
                finally:
                    runner.run(run.close())


def _warn_of_earlier_runs(store: Store, limits: Limits) -> None:
    if limits.max_cost_usd is not None and (number := store.num_unpriced()):
        _LOG.warning(
            "%d answers of earlier runs were requested without --price: the budget counts them as "
            "free",
            number,
        )
    if (lost := store.lost_calls())[0]:
        _LOG.warning(
            "%d calls of earlier runs were made and never answered (killed, cut or timed out). "
            "They may have been paid for: $%.4f is counted as spent.",
            *lost,
        )


@contextmanager
def _stopped_by_signals(run: "_LiveRun", loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """End the run cleanly at the first SIGINT or SIGTERM and at once at the second. A third reaches
    the previous handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_stopping = False

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            restore()
            _LOG.warning("stopped at once; calls in flight are lost and count as paid")
            loop.call_soon_threadsafe(run.abandon)
            return
        is_stopping = True
        _LOG.warning(
            "stopping; waiting for calls in flight, which are paid for (Ctrl-C: do not wait)"
        )
        run.failure = run.failure or SystemExit(128 + number)  # the loop may not run any more
        loop.call_soon_threadsafe(run.stop, run.failure)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


class _LiveRun:
    """Slices of requests, with one task for each request that the store lacks."""

    def __init__(
        self,
        writer: Writer,
        store: Store,
        limits: Limits,
        progress: Progress,
        runner: asyncio.Runner,
    ) -> None:
        self._writer, self._store, self._limits, self._progress = writer, store, limits, progress
        self._runner = runner
        self._caller = Caller(writer, store, limits)
        self._tasks: dict[str, asyncio.Task[Answer | None]] = {}
        # An unknown server gets one call at first, and one more for each that ends well or is free
        self._num_places = limits.concurrency if writer.name in LOCAL_WRITERS else 1
        self._places = asyncio.Semaphore(self._num_places)
        self._num_failed = 0
        self.failure: BaseException | None = None
        """What ends the run early."""

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yield requests with their answers, in order. Raise what ended the run early."""
        requests = iter(requests)
        while self.failure is None and (some := list(islice(requests, _SLICE))):
            self._tasks.clear()
            for request, begun in [(request, self._begin(request)) for request in some]:
                answer = begun if isinstance(begun, Answer) else self._result(begun)
                if answer is None:
                    break
                yield request, answer
        if self.failure is not None:
            raise self.failure

    def _result(self, task: "asyncio.Task[Answer | None]") -> Answer | None:
        if not task.done():
            self._runner.run(asyncio.wait([task]))
        return None if task.cancelled() else task.result()

    def _begin(self, request: Request) -> "Answer | asyncio.Task[Answer | None]":
        """Return the stored answer to a request, else the task that asks for it."""
        key = request_key(self._writer, request)
        stored = self._store.get_key(key)
        if key in self._tasks or (stored is not None and stored.is_final):
            self._progress.stored()
        if stored is not None and stored.is_final:
            return stored
        if key not in self._tasks:
            is_known_bad = stored is not None and stored.is_turned_down
            task = self._runner.get_loop().create_task(self._ask(request, is_known_bad))
            self._tasks[key] = task
        return self._tasks[key]

    def stop(self, reason: BaseException) -> None:
        """Make no more calls; `answers` raises `reason` once it has no more answers."""
        self.failure = self.failure or reason
        self._caller.stop()

    def abandon(self) -> None:
        """Give up calls in flight."""
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """Complete and store calls in flight, then close the writer's connections."""
        self.stop(GeneratorExit())
        try:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            async with asyncio.timeout(_PATIENCE_S):
                await self._writer.close()
        except TimeoutError:
            _LOG.warning("the writer does not end; it is left running")
        finally:
            await self._store.drain()
            self._progress.close()

    async def _ask(self, request: Request, is_known_bad: bool) -> Answer | None:
        """Return the answer to a request, None where the run has ended before."""
        try:
            async with self._places:
                answer = None if self.failure else await self._caller.ask(request)
            if answer is not None:
                self._note(answer, is_known_bad)
            return answer
        except BaseException as error:  # raised by `answers`: no task ends silently
            self.stop(error)
            return None

    def _note(self, answer: Answer, is_known_bad: bool) -> None:
        """Count an answer: for the live line, the number of calls in flight, and failures."""
        self._progress.answered(answer.status, self._caller.account.spent_usd())
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
