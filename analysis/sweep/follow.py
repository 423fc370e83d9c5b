"""`sweep --follow`: checkpoints are scored as they appear, until the run has finished.

Nothing is kept but what a sweep keeps, so that a follower that is killed goes on where it was.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sft_probe.analysis.sweep.checkpoints import Checkpoint, NothingFoundError
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.errors import UserError
from sft_probe.files import read_object
from sft_probe.models import local_folder
from sft_probe.weights import ADAPTER_CONFIG, check_safetensors, check_weight_files

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between two looks."""
Find = Callable[[], tuple[list[Checkpoint], list[str]]]
Files = dict[str, tuple[int, int]]
"""Name to size and time of change of the files of a checkpoint."""


def follow(
    request: SweepRequest,
    find: Find,
    score: Callable[[Sequence[Checkpoint], list[Checkpoint]], list[str]],
) -> list[str]:
    """Score checkpoints as they appear, and return what went wrong.

    A checkpoint is scored once its weights are whole and none of its files has changed between two
    looks; one that is overwritten is scored again. It ends after the step `--until`, or the last
    one before it, or where the run has its `manifest.json`.

    Args:
        request: what is followed.
        find: returns the checkpoints there are, and what is wrong with others.
        score: given all checkpoints and those to score now, returns what went wrong.
    """
    until = math.inf if request.until is None else request.until
    seen: dict[int, Files] | None = None
    scored: dict[int, Files] = {}
    problems: dict[int, list[str]] = {}
    while True:
        is_last = _is_finished(request)  # before looking, so that nothing is missed
        # a run may be followed before it has a directory
        has_begun = bool(request.checkpoints) or request.directory.exists()
        everything, faults = _found(find, is_last=is_last) if has_begun else ([], [])
        found = [one for one in everything if one.step <= until]
        # a later step tells that no other comes before it
        is_reached = any(one.step >= until for one in everything)
        files = {one.step: _files(one) for one in found}
        still = {step for step, own in files.items() if is_last or (seen or {}).get(step) == own}
        ready = [
            one
            for one in found
            if one.step in still and scored.get(one.step) != files[one.step]
            if is_last or _is_whole(one)
        ]
        for one in ready:  # each alone, so that its tables are there before the next one is read
            problems[one.step] = score(found, [one])
            scored[one.step] = files[one.step]
        if is_last or (is_reached and scored == files):
            return [*faults, *(problem for own in problems.values() for problem in own)]
        if ready or seen is None:
            log.info("%s: %d checkpoints scored; waiting for more", request.directory, len(scored))
        seen = files
        time.sleep(POLL_S)


def _is_finished(request: SweepRequest) -> bool:
    """Return whether a run of our own says that nothing more will come."""
    return not request.checkpoints and (request.directory / "manifest.json").exists()


def _found(find: Find, *, is_last: bool) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints and what is wrong with others; nothing where there is none yet."""
    try:
        return find()
    except NothingFoundError:
        if is_last:
            raise
        return [], []


def _files(checkpoint: Checkpoint) -> Files:
    """Return the files of a checkpoint as they are now."""
    found = {}
    for path in Path(checkpoint.model).glob("*"):
        try:
            state = path.stat()
        except OSError:  # it has been renamed since
            continue
        found[path.name] = (state.st_size, state.st_mtime_ns)
    return found


def _is_whole(checkpoint: Checkpoint) -> bool:
    """Return whether config and weights of a checkpoint can be read."""
    folder = local_folder(checkpoint.model, checkpoint.revision)
    try:
        if (folder / ADAPTER_CONFIG).exists():
            read_object(folder / ADAPTER_CONFIG)
            check_safetensors(folder / "adapter_model.safetensors")
        else:
            read_object(folder / "config.json")
            check_weight_files(folder)
    except UserError as error:
        log.debug("%s is not whole yet: %s", checkpoint.name, error)
        return False
    return True
