"""What trainers log of preference data: `logps/chosen`, `rewards/margins` and the like, from TRL's
`trainer_state.json` or an export of Weights & Biases."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sft_probe.analysis.stats.imports.imported import (
    Imported,
    benchmark_table,
    is_finite,
    named,
)
from sft_probe.analysis.stats.steps import STEP
from sft_probe.errors import UserError

_KEY = re.compile(r"(?:.* - )?(?:(train|eval)[/_])?(logps|rewards)/([^/]+)")
"""A key of the log; `RUN - ` stands before it in an export of the W&B page."""
_STEPS = ("train/global_step", "global_step", "trainer/global_step", "step", "Step", "_step")
_SPLITS = {"train": "train", "eval": "heldout"}
_NOTE = (
    "means that a trainer logged: those of training are of other examples at each step, so they "
    "move with the batch; no intervals"
)

Line = Mapping[str, Any]


def is_trainer_log(lines: Sequence[Line]) -> bool:
    """Return whether lines look like a log of preference training."""
    return any(_KEY.fullmatch(str(key)) for line in lines for key in line)


def read_trainer_log(path: Path, lines: Sequence[Line]) -> Imported:
    """Return the log-probs of a log as means, and its rewards as other measures.

    What stands under `eval` is of held-out prompts, all else of prompts trained on. Where a step
    was logged twice, as after a resume, the later line counts.

    Args:
        path: of the log, which gives the run its name.
        lines: keys to values, in order; empty and absent values are left out.

    Raises:
        UserError: no column tells the step, or a value is no number; names the line and the key.
    """
    seen: dict[tuple[str, str, str, int], float] = {}
    keys = dict.fromkeys(str(key) for line in lines for key in line)
    repeats = 0
    for number, line in enumerate(lines, start=1):
        for key, value in line.items():
            if not (match := _KEY.fullmatch(str(key))) or pd.isna(value):
                continue
            if not is_finite(value):
                raise UserError(f"{path}, entry {number}: {key} is {value!r}, which is no number.")
            split = _SPLITS[match[1] or "train"]
            place = (match[2], split, match[3], _step_of(path, number, line))
            repeats += place in seen
            seen[place] = float(value)
    means = pd.DataFrame(
        [
            {"split": split, "category": name, "step": step, "value": value}
            for (kind, split, name, step), value in seen.items()
            if kind == "logps"
        ]
    )
    cells = [
        (step, "rewards", name, split, value, math.nan, math.nan)
        for (kind, split, name, step), value in seen.items()
        if kind == "rewards"
    ]
    left_out = [key for key in keys if not _KEY.fullmatch(key) and key not in _STEPS]
    notes = [_NOTE, *([f"{repeats} values were logged again later"] if repeats else [])]
    return Imported(
        name=path.resolve().parent.name if path.name == "trainer_state.json" else path.stem,
        form="a log of preference training",
        step_unit=STEP,
        taken=_taken(seen),
        notes=(*notes, *([f"keys left out: {named(left_out)}"] if left_out else [])),
        means=means if len(means) else None,
        benchmarks=benchmark_table(path.stem, sorted(cells)),
    )


def _step_of(path: Path, number: int, line: Line) -> int:
    """Return the step of a line. Raises `UserError` where it has none."""
    for name in _STEPS:
        step = line.get(name)
        if is_finite(step) and float(step) == int(step) >= 0:
            return int(step)
    raise UserError(
        f"{path}, entry {number}: no step. One of {', '.join(_STEPS)} must hold a whole number."
    )


def _taken(seen: Mapping[tuple[str, str, str, int], float]) -> tuple[str, ...]:
    found = []
    for kind, what in (("logps", "mean log-prob, nats per response"), ("rewards", "rewards")):
        for split, where in (("train", "batches of training"), ("heldout", "eval")):
            names = dict.fromkeys(n for k, s, n, _ in seen if (k, s) == (kind, split))
            if names:
                found.append(f"{what}, {where}: {named(names)}")
    return tuple(found)
