"""Finding what a sweep scores: snapshots of a run, Hugging Face checkpoints, revisions on the hub."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from sft_probe.errors import UserError
from sft_probe.files import read_json, sha256_file


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of weights on the step axis. What a foreign checkpoint does not say of itself is `None`."""

    step: int
    model: str
    """Path or hub id."""
    revision: str = "main"
    examples_seen: int | None = None
    tokens_seen: int | None = None
    epoch: float | None = None
    weights_dtype: str | None = None
    sha256: dict[str, str] | None = None
    """File name to hash of the weights."""

    def verify(self) -> None:
        """Raises `UserError` where a file of the weights is missing or is not the one that was saved."""
        for name, expected in (self.sha256 or {}).items():
            path = Path(self.model, name)
            if not path.is_file():
                raise UserError(f"{path} is missing.")
            if sha256_file(path) != expected:
                raise UserError(f"{path} is damaged: its sha256 is not the one in meta.json.")


def of_run(run_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """Snapshots of a run, by step, and what is wrong with those that cannot be used.

    Raises:
        UserError: the directory holds no snapshots.
    """
    checkpoints, problems = [], []
    for folder in sorted(run_dir.glob("weights/step_*")):
        try:
            meta = read_json(folder / "meta.json")
            checkpoints.append(
                Checkpoint(
                    step=meta["step"],
                    model=str(folder),
                    examples_seen=meta["examples_seen"],
                    tokens_seen=meta["tokens_seen"],
                    epoch=meta["epoch"],
                    weights_dtype=meta["dtype"],
                    sha256=meta["sha256"],
                )
            )
        except UserError as error:
            problems.append(f"{folder.name}: {error}")
        except KeyError as error:
            problems.append(f"{folder.name}: {folder / 'meta.json'} has no {error}.")
    if not checkpoints and not problems:
        raise UserError(f"{run_dir} holds no snapshots (weights/step_*); is it the directory of a run?")
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step), problems


def of_patterns(patterns: list[str]) -> list[Checkpoint]:
    """Hugging Face model directories; the step is in `trainer_state.json` or in the name.

    Raises:
        UserError: nothing matches, a directory tells no step, or two tell the same.
    """
    matches = (match for pattern in patterns for match in glob.glob(pattern))  # noqa: PTH207 - absolute or relative
    folders = sorted({Path(match) for match in matches if Path(match).is_dir()})
    if not folders:
        raise UserError(f"no directory matches {' '.join(patterns)}.")
    return _unique([Checkpoint(step=_step_of(folder), model=str(folder)) for folder in folders])


def of_revisions(model: str, revisions: list[str]) -> list[Checkpoint]:
    """Revisions of a hub model, as Pythia's `step1000`.

    Raises:
        UserError: a revision's name holds no step, or two hold the same.
    """
    return _unique([Checkpoint(step=_step_in(name), model=model, revision=name) for name in revisions])


def _step_of(folder: Path) -> int:
    state = folder / "trainer_state.json"
    return int(read_json(state)["global_step"]) if state.exists() else _step_in(folder.name)


def _step_in(name: str) -> int:
    match = re.search(r"(\d+)\D*$", name)
    if not match:
        raise UserError(f"{name!r} tells no step: name it like checkpoint-500 or step500.")
    return int(match[1])


def _unique(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    by_step: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints:
        other = by_step.setdefault(checkpoint.step, checkpoint)
        if other is not checkpoint:
            first, second = (f"{item.model}@{item.revision}" for item in (other, checkpoint))
            raise UserError(f"{first} and {second} are both step {checkpoint.step}.")
    return [by_step[step] for step in sorted(by_step)]
