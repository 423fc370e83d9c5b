"""The second model of `sweep --reference`: which one it is, and what was scored beside it."""

from collections.abc import Sequence
from pathlib import Path

from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.identity import Identity, differences, recorded
from sft_probe.analysis.sweep.parts import REFERENCE
from sft_probe.errors import UserError


def find_reference(name: str, checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the model from which distances are taken.

    Args:
        name: `first`, a step, or a model (path or hub id, `NAME@REVISION`).
        checkpoints: those of the sweep, by step.

    Raises:
        UserError: no checkpoint has that step.
    """
    if name == "first":
        return checkpoints[0]
    if name.isdigit():
        steps = {checkpoint.step: checkpoint for checkpoint in checkpoints}
        if int(name) not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"--reference {name}: no checkpoint has that step; there are {known}.")
        return steps[int(name)]
    model, _, revision = name.partition("@")
    return Checkpoint(step=0, model=model, source=model, revision=revision or "main")


def reference_name(reference: Checkpoint) -> str:
    """Return `step 0` for a checkpoint of the sweep, else the name of the model."""
    is_model = reference.source == reference.model
    return reference.name if is_model else f"{reference.step_unit} {reference.step}"


def is_beside(part: Path, reference: Identity) -> bool:
    """Return whether a part was scored beside a reference with these weights."""
    known = recorded(part, REFERENCE)
    return known is not None and not differences(reference, known)
