"""The sweep: every checkpoint that is not scored yet, in this process or on a Ray cluster, then the
tables.

It resumes part by part: `sweep/step_000016/heldout/` exists only complete.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from sft_probe.analysis.stats.steps import STEP
from sft_probe.analysis.stats.tables import write_tables
from sft_probe.analysis.sweep.benchmarks import BenchmarkTasks
from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.follow import follow
from sft_probe.analysis.sweep.generate import generation_docs
from sft_probe.analysis.sweep.ownership import StepBusyError, claim_sources
from sft_probe.analysis.sweep.parts import inputs_text
from sft_probe.analysis.sweep.reference import find_reference
from sft_probe.analysis.sweep.request import SweepRequest, find_checkpoints
from sft_probe.analysis.sweep.settings import (
    fix_settings,
    resolve_settings,
)
from sft_probe.analysis.sweep.step import Scorer
from sft_probe.errors import UserError

log = logging.getLogger(__name__)


def sweep(request: SweepRequest) -> list[Path]:
    """Score what is not scored yet and writes the tables; return their paths.

    Raises:
        UserError: nothing can be scored; or, after all others are done, some checkpoint could not
            be.
    """
    if request.follow:
        problems = _follow(request)
    else:
        checkpoints, problems = find_checkpoints(request)
        if not checkpoints:
            raise UserError("\n".join(["no checkpoint can be scored:", *problems]))
        problems += _prepare(request, checkpoints)(_shard(request, checkpoints))
    tables = write_tables(request.directory)
    if problems:
        done = f"the others are in {request.directory}" if tables else "nothing was scored"
        raise UserError(
            "\n".join(
                [f"{len(problems)} checkpoints could not be scored in full; {done}:", *problems]
            )
        )
    return tables


def _follow(request: SweepRequest) -> list[str]:
    """Score checkpoints as they appear; return what went wrong."""
    prepared: list[Callable[[list[Checkpoint]], list[str]]] = []

    def score(found: Sequence[Checkpoint], some: list[Checkpoint]) -> list[str]:
        mine = [one for one in some if one in _shard(request, found)]
        if not mine:
            return []
        if not prepared:
            prepared.append(_prepare(request, found))
        problems = prepared[0](mine)
        write_tables(request.directory)
        return problems

    return follow(request, partial(find_checkpoints, request), score)


def _shard(request: SweepRequest, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    index, num_shards = request.shard
    return list(checkpoints[index - 1 :: num_shards])


def _prepare(
    request: SweepRequest, checkpoints: Sequence[Checkpoint]
) -> Callable[[list[Checkpoint]], list[str]]:
    """Fix what all steps share, and return what scores some of them and says what went wrong.

    Raises:
        UserError: nothing can be scored.
    """
    reference = find_reference(request.reference, checkpoints) if request.reference else None
    benchmarks = BenchmarkTasks(request.tasks)
    if checkpoints[0].step_unit != STEP:
        log.warning("the names tell no steps: %ss are counted instead", checkpoints[0].step_unit)
    if request.engine == "ray":
        request = _on_ray().connect(request)
    settings = resolve_settings(request, checkpoints)
    if request.generate:
        generation_docs(
            settings.docs, request.generate, settings.max_length
        )  # refused before anything is scored
    max_tokens = fix_settings(settings, request)
    claim_sources(request.directory, checkpoints)
    for drop in settings.dropped:
        log.warning("left out of all categories: %s: %s", drop.doc_id, drop.reason)
    log.info(inputs_text(request, settings.probe_set, settings.format_name))
    log.info(
        "%d checkpoints; %d docs can be scored in %d categories, %d are left out",
        len(checkpoints),
        len(settings.docs),
        len(settings.probe_set.categories),
        len(settings.dropped),
    )
    if request.engine == "ray":
        return partial(_on_ray().score_on_ray, request, settings.decided_by, reference=reference)
    return partial(_score_here, Scorer(request, settings, max_tokens, benchmarks, reference))


def _on_ray() -> ModuleType:
    try:
        from sft_probe.analysis.sweep import on_ray
    except ImportError as error:
        raise UserError(
            f"--engine ray needs Ray ({error}). Run:  pip install 'sft-probe[ray]'"
        ) from error
    return on_ray


def _score_here(scorer: Scorer, checkpoints: list[Checkpoint]) -> list[str]:
    """Score one after the other, last those that another process is scoring now; return what went
    wrong."""
    problems = []
    waiting = deque((checkpoint, False) for checkpoint in checkpoints)
    while waiting:
        checkpoint, wait = waiting.popleft()
        try:
            found = scorer.score(checkpoint, wait=wait)
        except StepBusyError:
            log.info("step %d: another process is scoring it", checkpoint.step)
            waiting.append((checkpoint, True))
            continue
        except UserError as error:
            found = [str(error)]
        problems += [f"step {checkpoint.step}: {problem}" for problem in found]
        for problem in found:
            log.error("step %d: %s", checkpoint.step, problem)
    return problems
