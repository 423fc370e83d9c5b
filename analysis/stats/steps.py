"""The step that the name of a checkpoint or revision tells: never guessed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft_probe.errors import UserError

STEP, EPOCH = "optimizer step", "epoch"
REMEDY = (
    "Say the step with NAME=STEP, e.g. `--revisions main=2000` or `--checkpoints out/final=2000`."
)
_LAST_STEP = 2**53
"""The largest that every reader of the tables, JavaScript and spreadsheets included, keeps
exactly."""
_WORDS = {
    STEP: r"(?:global[-_. ]?)?steps?|checkpoints?|ckpts?|iter(?:ation)?s?",
    EPOCH: r"epochs?",
}
_SEPARATOR = r"[-_=. :#]"
_NO_POSITION = "".join(
    rf"(?<!{word}[-_. ])" for word in ("warmup", "max", "total", "num", "every", "save", "eval")
)
"""`warmup_steps100` names a setting, not where the training stood."""
_ANY_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class NamedStep:
    """A step and what it counts."""

    step: int
    unit: str | None
    """`STEP` or `EPOCH`; `None` where the user has given the number."""


def check_step(step: int, where: str) -> int:
    """Return `step`. Raises `UserError`, beginning with `where`, for one that no training makes."""
    if not 0 <= step <= _LAST_STEP:
        raise UserError(
            f"{where}: {step} is no step; a step is a whole number from 0 to {_LAST_STEP}."
        )
    return step


def find_step(name: str) -> NamedStep | None:
    """Return the number after step, checkpoint, ckpt, iter or global_step; without one, that after
    epoch.

    Raises:
        UserError: the name tells several steps, or one that is no plain number, such as 1e3, 10k or
            a date.
    """
    for unit in (STEP, EPOCH):
        numbers = {_plain_number(name, match) for match in _pattern(unit).finditer(name)}
        if len(numbers) > 1:
            raise UserError(
                f"{name!r} tells several steps: {', '.join(map(str, sorted(numbers)))}."
            )
        if numbers:
            return NamedStep(numbers.pop(), unit)
    return None


def step_in(name: str) -> NamedStep:
    """Return what `find_step` finds. Raises `UserError` also where a name tells no step."""
    if found := find_step(name):
        return found
    seen = ", ".join(_ANY_NUMBER.findall(name)) or "no number"
    raise UserError(
        f"{name!r} tells no step: there must be a number after step, checkpoint, ckpt, iter or "
        f"global_step (seen: {seen})."
    )


def _pattern(unit: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?<![a-z]){_NO_POSITION}(?:{_WORDS[unit]}){_SEPARATOR}*(\d+)", re.IGNORECASE
    )


def _plain_number(name: str, match: re.Match[str]) -> int:
    """Return the number that was found; what follows it must not be a part of it."""
    rest = name[match.end() :]
    if re.match(rf"[a-z,]|{_SEPARATOR}*\d+(?![a-z\d])", rest, re.IGNORECASE):
        word = re.match(r"[-_=. :#,\w]*", match[1] + rest)
        raise UserError(f"{name!r}: is {word[0] if word else match[1]!r} a step, and which?")
    return int(match[1])


def split_explicit(name: str) -> tuple[str, int | None]:
    """Return name and step of `NAME=STEP`; the whole and `None` where no step is written beside a
    name.

    In `epoch=3-step=300`, as Lightning writes it, the number belongs to the name.
    """
    match = re.fullmatch(r"(.+)=(\d+)", name)
    words = "|".join(_WORDS.values())
    if not match or re.search(rf"(?<![a-z])(?:{words}){_SEPARATOR}*$", match[1], re.IGNORECASE):
        return name, None
    return match[1], int(match[2])


def common_unit(found: Sequence[tuple[str, NamedStep]]) -> str:
    """Return what all the steps count.

    Raises:
        UserError: some names tell steps, others epochs.
    """
    examples = {named.unit: name for name, named in found if named.unit}
    if len(examples) > 1:
        raise UserError(
            f"{examples[STEP]!r} tells a step and {examples[EPOCH]!r} an epoch, which have no "
            f"common axis. {REMEDY}"
        )
    return next(iter(examples), None) or STEP
