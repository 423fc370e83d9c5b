"""Asks a writer in batch jobs, which cost half and may take a day."""

import asyncio
import logging
import math
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, islice
from time import monotonic
from typing import Protocol, TypeVar, runtime_checkable

from sft_probe.errors import UserError
from sft_probe.synth.asking.budget import Limits, UselessRunError
from sft_probe.synth.asking.call import Account, pause_s
from sft_probe.synth.asking.protocol import Answer, Request, RetryLater, WriterId, failed_answer
from sft_probe.synth.asking.store import Job, Store, request_key

_LOG = logging.getLogger(__name__)
_JOB_SIZE = 10_000
_TRIAL_SIZE = 50
"""Size of the first job. A job cannot be stopped when its answers turn out to be of no use."""
_LINE_INTERVAL_S = 60.0
_SAVED_AT_ONCE = 1000
_T = TypeVar("_T")


class JobFailedError(Exception):
    """A job that ended without answers; the message says why."""


@runtime_checkable
class BatchWriter(WriterId, Protocol):
    """A writer that is asked in jobs.

    All methods raise `RetryLater` for calls that may succeed later, `UserError` for others.
    """

    poll_s: float
    """Seconds between polls of a job."""

    async def submit(self, display_name: str, requests: dict[str, Request]) -> str:
        """Create a job of requests by key; return its name."""
        ...

    async def find(self, display_name: str) -> str | None:
        """Return the name of the job with this display name, None where there is none."""
        ...

    async def read(self, job_name: str) -> dict[str, Answer] | None:
        """Return the answers by key of a finished job, None before. Raise `JobFailedError`."""
        ...

    async def close(self) -> None:
        """Close connections. The writer may be used again afterwards."""
        ...


def ask_batch(
    requests: Iterable[Request], writer: BatchWriter, store: Store, limits: Limits
) -> Iterator[tuple[Request, Answer]]:
    """Yield all requests with their answers, as `ask_all` does, by jobs of what the store lacks.

    Jobs of a run that was stopped are found in the store and read, not created again. All requests
    are held in memory. The errors are those of `ask_all`; requests beyond the budget are left out.
    """
    everything = list(requests)
    run = _BatchRun(
        {request_key(writer, request): request for request in everything}, writer, store, limits
    )
    with asyncio.Runner() as runner:
        try:
            runner.run(run.run())
        except KeyboardInterrupt:
            _LOG.warning(
                "stopped; jobs continue at the server. The same command finds and reads them."
            )
            raise SystemExit(130) from None
        finally:
            runner.run(writer.close())
    for request in everything:
        answer = store.get(writer, request)
        if answer is not None:
            yield request, answer


class _BatchRun:
    def __init__(
        self, requests: dict[str, Request], writer: BatchWriter, store: Store, limits: Limits
    ) -> None:
        self._requests, self._writer, self._store, self._limits = requests, writer, store, limits
        self._account = Account(writer, store, limits)

    async def run(self) -> None:
        """Find the jobs of earlier runs, create missing ones (a small one first), wait for all."""
        self._started_s = self._said_s = monotonic()
        for job in self._store.jobs(self._writer):
            if job.name is None:
                await self._find(job)
        jobs, missing, out_of_budget = self._store.jobs(self._writer), self._missing(), 0
        is_unproven = not jobs and not self._store.has_text(self._writer)
        if is_unproven and len(missing) > 2 * _TRIAL_SIZE:
            trial, missing = missing[:_TRIAL_SIZE], missing[_TRIAL_SIZE:]
            out_of_budget = await self._submit_all(trial)
            await self._read_all()
            self._check_trial(trial)
        out_of_budget += await self._submit_all(missing)
        await self._read_all()
        if out_of_budget:
            raise UserError(
                f"the budget is spent: {out_of_budget} requests were not sent, because their worst "
                f"case exceeds ${self._limits.max_cost_usd:.4f} (${self._store.cost_usd():.4f} is "
                "spent). All answers are stored; raise --max-cost-usd to continue."
            )

    async def _find(self, job: Job) -> None:
        """Find a job whose name never arrived by its display name, unless it was never created."""
        name = await self._patiently(lambda: self._writer.find(job.display_name))
        if name is None:
            await self._store.close_job(job)
        else:
            await self._store.save_job(self._writer, replace(job, name=name))

    def _missing(self) -> list[str]:
        """Return the keys of the requests that are neither answered nor in a job."""
        known = {key for job in self._store.jobs(self._writer) for key in job.keys}
        answers = ((key, self._store.get_key(key)) for key in self._requests if key not in known)
        return [key for key, answer in answers if answer is None or not answer.is_final]

    def _check_trial(self, keys: list[str]) -> None:
        answers = [answer for key in keys if (answer := self._store.get_key(key)) is not None]
        if answers and not any(answer.status == "ok" for answer in answers):
            faults = Counter(f"{answer.status}: {answer.reason}" for answer in answers)
            self._store.forget_without_text(self._writer, None)
            raise UselessRunError(f"of the first {len(answers)} answers none has a text", faults)

    async def _submit_all(self, keys: list[str]) -> int:
        """Create jobs of these requests; return how many the budget left out."""
        limit_usd = self._limits.max_cost_usd
        costs = [self._account.worst_usd(self._requests[key]) for key in keys]
        totals = accumulate(costs, initial=self._store.cost_usd())
        number = sum(limit_usd is None or total <= limit_usd for total in islice(totals, 1, None))
        for start in range(0, number, _JOB_SIZE):
            part = slice(start, min(start + _JOB_SIZE, number))
            job = Job(f"sft-probe-{uuid.uuid4().hex}", None, tuple(keys[part]), sum(costs[part]))
            await self._store.save_job(self._writer, job)
            name = await self._submit(job, {key: self._requests[key] for key in job.keys})
            await self._store.save_job(self._writer, replace(job, name=name))
        return len(keys) - number

    async def _submit(self, job: Job, requests: dict[str, Request]) -> str:
        """Create a job; return its name. After a failed call, which may have created it, look for
        it first.

        Where the attempts run out the job stays in the store, and the next run looks for it.
        """
        is_uncertain = False

        async def submit() -> str:
            nonlocal is_uncertain
            if is_uncertain and (found := await self._writer.find(job.display_name)) is not None:
                return found
            is_uncertain = True
            try:
                return await self._writer.submit(job.display_name, requests)
            except UserError:  # refused for good
                await self._store.close_job(job)
                raise

        return await self._patiently(submit)

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        attempt = 1
        while True:
            try:
                return await call()
            except RetryLater as wait:
                if attempt == self._limits.max_attempts:
                    raise UserError(
                        f"the server does not answer: {wait}. Run the same command later."
                    ) from None
                await asyncio.sleep(pause_s(self._limits, attempt, wait))
                attempt += 1

    async def _read_all(self) -> None:
        """Wait for all jobs and store their answers."""
        jobs = self._store.jobs(self._writer)
        if jobs:
            number = sum(len(job.keys) for job in jobs)
            _LOG.info("waiting for %d batch jobs with %d requests", len(jobs), number)
        for number, job in enumerate(jobs):
            await self._read(job, f"{number} of {len(jobs)} batch jobs are read")
        self._account.check_version()

    async def _read(self, job: Job, progress: str) -> None:
        """Wait for a job and store its answers. A job that also has other requests is kept."""
        keys = [key for key in job.keys if key in self._requests]
        others = tuple(key for key in job.keys if key not in self._requests)
        # a missing line may be paid for; the job's name tells it apart from that of an earlier job
        missing = replace(failed_answer(f"{job.name} gave no answer"), num_prompt_tokens=None)
        try:
            answers = await self._finished(str(job.name), progress)
        except JobFailedError as error:
            _LOG.warning(
                "the job %s failed: %s. The next run asks its requests again.", job.name, error
            )
            answers, missing, others = {}, failed_answer(f"job: {error}"), ()
        for start in range(0, len(keys), _SAVED_AT_ONCE):
            some = keys[start : start + _SAVED_AT_ONCE]
            await asyncio.gather(*(self._save(key, answers.get(key, missing)) for key in some))
        if not others:
            await self._store.close_job(job)
            return
        _LOG.warning("%d answers of %s belong to other requests; it is kept", len(others), job.name)
        read_usd = sum(self._account.worst_usd(self._requests[key]) for key in keys)
        rest = replace(job, keys=others, cost_usd=max(0.0, job.cost_usd - read_usd))
        await self._store.save_job(self._writer, rest)

    async def _finished(self, name: str, progress: str) -> dict[str, Answer]:
        """Wait for a job; return its answers by key.

        Raises:
            JobFailedError: the job has no answers.
            UserError: the wait takes too long.
        """
        longest_s = self._limits.max_wait_s or math.inf
        while (answers := await self._patiently(lambda: self._writer.read(name))) is None:
            now_s = monotonic()
            waited_s = now_s - self._started_s
            if waited_s >= longest_s:
                raise UserError(
                    f"the batch jobs have not ended after {waited_s:.0f} s ({progress}). They "
                    "continue at the server and are paid for; the same command reads them later."
                )
            if now_s - self._said_s >= _LINE_INTERVAL_S:
                self._said_s = now_s
                _LOG.info(
                    "waiting for %.0f min: %s; %s has not ended", waited_s / 60, progress, name
                )
            await asyncio.sleep(min(self._writer.poll_s, longest_s - waited_s))
        return answers

    async def _save(self, key: str, answer: Answer) -> None:
        kept, stored = self._account.checked(answer), self._store.get_key(key)
        if stored is not None and (
            stored.raw == kept.raw or (kept.status == "error" and stored.status != "error")
        ):
            return  # read by a run that was stopped before it closed the job
        await self._account.save(self._requests[key], answer)
