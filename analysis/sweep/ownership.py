"""Who may write what: one process scores a step at a time, and one directory holds the scores of
one model."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sft_probe.analysis.stats.tables import tables_lock
from sft_probe.analysis.sweep.checkpoints import OWN_SNAPSHOTS, Checkpoint
from sft_probe.analysis.sweep.identity import (
    Identity,
    differences,
    identify,
    parts_of,
    recorded,
    recorded_of_step,
)
from sft_probe.analysis.sweep.parts import step_folder
from sft_probe.analysis.sweep.settings import sweep_manifest
from sft_probe.errors import UserError
from sft_probe.files import find, remove_leftovers, write_json

log = logging.getLogger(__name__)


class StepBusyError(Exception):
    """Another process is scoring the step."""


@contextmanager
def owned_step(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a step. The system releases the lock when its process ends, also
    by `kill -9`.

    Args:
        folder: of the step.
        wait: until the present owner is done.

    Raises:
        StepBusyError: another process owns the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StepBusyError from error
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


def stale_parts(folder: Path, identity: Identity) -> list[Path]:
    """Return the parts of a step whose weights are no longer those of its checkpoint.

    Raises:
        UserError: they were scored from another place, whose weights were others.
    """
    stale = []
    for part in parts_of(folder):
        scored = recorded(part)
        found = differences(identity, scored) if scored else []
        if found and scored and scored["place"] != identity["place"]:
            raise UserError(
                f"{part} was scored from {scored['place']}, and {identity['place']} has other "
                "weights "
                f"({', '.join(found[:3])}). A step belongs to one checkpoint: sweep into another "
                "directory, or delete "
                f"{folder} to score it again."
            )
        if found:
            stale.append(part)
    return stale


def remove_parts(directory: Path, parts: Sequence[Path]) -> None:
    """Remove parts of a step that the caller owns."""
    with tables_lock(directory):
        for part in parts:
            shutil.rmtree(part)


def claim_sources(directory: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Record in the sweep's manifest where its checkpoints come from.

    Raises:
        UserError: the directory holds the scores of another model.
    """
    path = directory / "sweep" / "manifest.json"
    with FileLock(path.with_name(".lock")):
        manifest = sweep_manifest(directory) or {}
        known = manifest.get("sources")
        if known is None and any(step.is_dir() for step in find(path.parent, "step_*")):
            log.warning(
                "steps scored by an earlier version are kept; it did not record their weights"
            )
        _check_sources(directory, known, checkpoints)
        sources = {checkpoint.source for checkpoint in checkpoints} | set(known or [])
        if sources != set(known or []):
            write_json(path, {**manifest, "sources": sorted(sources)})


def _check_sources(
    directory: Path, known: Sequence[str] | None, checkpoints: Sequence[Checkpoint]
) -> None:
    """Raise `UserError` where checkpoints would be added to the scores of another model.

    Checkpoints belong together where they come from one place; where one command names both places;
    or where weights that were scored are found again in the new place, as after a move.
    """
    sources = {checkpoint.source for checkpoint in checkpoints}
    if known is None or sources <= set(known) or sources >= set(known):
        return
    again = []
    for checkpoint in checkpoints:
        scored = recorded_of_step(step_folder(directory, checkpoint.step))
        if scored is None:
            continue
        try:
            found = differences(identify(checkpoint, scored), scored)
        except UserError:  # reported when it is its turn
            continue
        if found:
            raise _another_model(
                directory,
                known,
                sources,
                f"; at step {checkpoint.step} {', '.join(found[:3])} differ",
            )
        again.append(checkpoint.step)
    if not any(again):  # step 0 may be the same base model in two runs
        raise _another_model(directory, known, sources, "")


def _another_model(directory: Path, known: Sequence[str], sources: set[str], why: str) -> UserError:
    names = [
        ", ".join("the run itself" if place == OWN_SNAPSHOTS else place for place in sorted(places))
        for places in (known, sources)
    ]
    return UserError(
        f"{directory / 'sweep'} holds the scores of the checkpoints of {names[0]}; those of "
        f"{names[1]} are another "
        f"model's{why}. Sweep them into another directory. If all are of one model, name the "
        "checkpoints of both "
        "places in one command."
    )
