"""Finding what a sweep scores: snapshots of a run, Hugging Face checkpoints, revisions on the
hub."""

import glob
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sft_probe.analysis.stats.steps import (
    REMEDY,
    STEP,
    NamedStep,
    check_step,
    common_unit,
    split_explicit,
    step_in,
)
from sft_probe.errors import UserError
from sft_probe.files import check_exists, find, read_object

log = logging.getLogger(__name__)

OWN_SNAPSHOTS = "weights"
_STAGE = re.compile(r"(?:stage|phase)\d+", re.IGNORECASE)
_META = {
    "step": int,
    "examples_seen": int,
    "tokens_seen": int,
    "epoch": float,
    "dtype": str,
    "sha256": dict,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of weights on the step axis. What a foreign checkpoint does not say of itself is
    `None`."""

    step: int
    model: str
    """Path or hub id."""
    source: str
    """Where it belongs: the directory that holds it, the hub id, or `weights` for snapshots of the
    run itself."""
    revision: str = "main"
    step_unit: str = STEP
    examples_seen: int | None = None
    tokens_seen: int | None = None
    epoch: float | None = None
    weights_dtype: str | None = None
    sha256: dict[str, str] | None = None
    """File name to hash of the weights, as they were when they were saved."""

    @property
    def name(self) -> str:
        """The path, or the hub id and revision."""
        return self.model if self.revision == "main" else f"{self.model}@{self.revision}"


class NothingFoundError(UserError):
    """There is no checkpoint, or not yet."""


def snapshots_of_run(run_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the snapshots of a run, by step, and what is wrong with those that cannot be used.

    Raises:
        UserError: the directory does not exist, or holds no snapshots.
    """
    check_exists(run_dir)
    checkpoints: dict[int, Checkpoint] = {}
    problems = []
    for folder in find(run_dir, "weights/step_*"):
        try:
            checkpoint = _of_snapshot(folder)
            if other := checkpoints.get(checkpoint.step):
                raise UserError(
                    f"meta.json says step {checkpoint.step}, which is that of {other.model}."
                )
            checkpoints[checkpoint.step] = checkpoint
        except UserError as error:
            problems.append(f"{folder.name}: {error}")
    if not checkpoints and not problems:
        raise NothingFoundError(
            f"{run_dir} holds no snapshots (weights/step_*); is it the directory of a run?"
        )
    return [checkpoints[step] for step in sorted(checkpoints)], problems


def _of_snapshot(folder: Path) -> Checkpoint:
    path = folder / "meta.json"
    meta = read_object(path, _META)
    return Checkpoint(
        step=check_step(meta["step"], f"{path}: 'step'"),
        model=str(folder),
        source=OWN_SNAPSHOTS,
        examples_seen=meta["examples_seen"],
        tokens_seen=meta["tokens_seen"],
        epoch=meta["epoch"],
        weights_dtype=meta["dtype"],
        sha256=meta["sha256"],
    )


def checkpoints_matching(patterns: Sequence[str]) -> tuple[list[Checkpoint], list[str]]:
    """Return Hugging Face model directories, by step, and what is wrong with those that cannot be
    used.

    The step is the one of `PATH=STEP`, else that of `trainer_state.json`, else the one in the name.

    Raises:
        UserError: a pattern matches nothing, a name tells no step or several, two tell the same, or
            steps are mixed with epochs.
    """
    given = {folder: step for pattern in patterns for folder, step in _matches(pattern).items()}
    if not given:
        raise NothingFoundError(f"no directory matches {' '.join(patterns)}.")
    states: dict[Path, NamedStep] = {}
    problems = []
    for folder in sorted(given):
        state = folder / "trainer_state.json"
        if given[folder] is None and state.exists():
            try:
                step = read_object(state, {"global_step": int})["global_step"]
                states[folder] = NamedStep(check_step(step, f"{state}: 'global_step'"), STEP)
            except UserError as error:
                problems.append(f"{folder.name}: {error}")
                del given[folder]
    names = {
        folder: (folder.absolute().name, step)
        for folder, step in given.items()
        if folder not in states
    }
    steps = states | _read_steps(names)
    unit = common_unit([(str(folder), step) for folder, step in steps.items()])
    return _unique(
        [
            Checkpoint(
                step=step.step,
                step_unit=unit,
                model=str(folder),
                source=str(folder.absolute().parent.resolve()),
            )
            for folder, step in steps.items()
        ]
    ), problems


def _matches(pattern: str) -> dict[Path, int | None]:
    """Return the directories that a pattern matches, and the step where one is written beside
    it."""
    matches = glob.glob(pattern)  # noqa: PTH207 - absolute or relative
    name, step = (pattern, None) if matches else split_explicit(pattern)
    folders = [Path(match) for match in matches or glob.glob(name) if Path(match).is_dir()]  # noqa: PTH207
    # a file is skipped: a shell may have put it in the place of `out/*`
    if not matches and not folders:
        raise NothingFoundError(f"no directory matches {name}.")
    if step is not None and len(folders) > 1:
        raise UserError(f"{name} matches {len(folders)} directories; only one can be step {step}.")
    return dict.fromkeys(folders, step)


def main_source(checkpoints: Sequence[Checkpoint]) -> str:
    """Return where most of the checkpoints belong: a base model at step 0 may lie elsewhere."""
    return Counter(checkpoint.source for checkpoint in checkpoints).most_common(1)[0][0]


def hub_revisions(model: str, revisions: Sequence[str]) -> list[Checkpoint]:
    """Return revisions of a hub model, such as Pythia's `step1000`; `NAME=STEP` says the step of
    one whose name does not.

    Raises:
        UserError: a name tells no step or several, two tell the same, or steps are mixed with
            epochs.
    """
    names = {name: (name, step) for name, step in map(split_explicit, revisions)}
    steps = _read_steps(names)
    unit = common_unit(list(steps.items()))
    path = Path(model)
    if path.is_dir() and len(names) > 1:
        log.warning(
            "%s is a directory, which has no revisions: all steps are the same weights", model
        )
    source = (
        str(path.absolute().parent.resolve() / path.absolute().name) if path.is_dir() else model
    )
    return _unique(
        [
            Checkpoint(step=step.step, step_unit=unit, model=model, revision=name, source=source)
            for name, step in steps.items()
        ]
    )


Key = TypeVar("Key")


def _read_steps(names: Mapping[Key, tuple[str, int | None]]) -> dict[Key, NamedStep]:
    """Return the steps of names, some of them given. Raises one `UserError` about all that tell
    none."""
    steps: dict[Key, NamedStep] = {}
    faults = []
    for key, (name, step) in names.items():
        try:
            steps[key] = step_in(name) if step is None else NamedStep(step, None)
            check_step(steps[key].step, repr(name))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(
            "\n".join(["the steps are not clear, so nothing is scored:", *faults, REMEDY])
        )
    if stages := sorted(
        {found[0].lower() for name, _ in names.values() for found in _STAGE.finditer(name)}
    )[1:]:
        log.warning(
            "several stages (%s, ...): their steps are taken as counted through", ", ".join(stages)
        )
    return steps


def _unique(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    by_step: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints:
        other = by_step.setdefault(checkpoint.step, checkpoint)
        if other is not checkpoint:
            raise UserError(
                f"{other.name} and {checkpoint.name} are both step {checkpoint.step}. {REMEDY}"
            )
    return [by_step[step] for step in sorted(by_step)]
