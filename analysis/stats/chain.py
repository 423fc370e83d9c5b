"""Stages of training, one after another, as one run on one axis of steps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.runs import Recording
from sft_probe.errors import UserError

_JOINT_NATS = 0.05


def chained(stages: Sequence[Recording]) -> Recording:
    """Return stages of training, such as SFT and DPO after it, as one run.

    A stage begins at the step that its manifest names as its parent's, else at the last step of the
    stage before, whose later steps are left out. Changes are from the first step of the first
    stage.

    Raises:
        UserError: the stages were scored on other texts, in another form, or in other units of
            steps.
    """
    if len(stages) < 2:
        raise UserError("--chain needs two stages or more, such as: runs/sft runs/dpo --chain.")
    kinds = {
        "probe sets": {str(stage.probe.get("probe_set_sha256")) for stage in stages},
        "prompt formats": {str(stage.probe.get("prompt_format")) for stage in stages},
        "units of steps": {stage.step_unit for stage in stages},
        "kinds of records (docs and published means)": {
            str(stage.means is None) for stage in stages
        },
    }
    for name, values in kinds.items():
        if len(values) > 1:
            raise UserError(f"--chain: the stages have different {name}, so they share no axis.")
    chain = stages[0]
    for stage in stages[1:]:
        chain = _joined(chain, stage)
    return replace(chain, name=" > ".join(stage.name for stage in stages))


def _joined(before: Recording, stage: Recording) -> Recording:
    """Return a chain with one more stage at its end."""
    border = _border(before, stage)
    means, tokens = before.means, before.tokens
    num_tokens = tokens.num_rows if tokens is not None else 0
    rows = before.rows
    notes = (*before.notes, *(note for note in stage.notes if note not in before.notes))
    if before.means is not None and stage.means is not None:
        means, gap = _appended(before.means, stage.means, border, "value")
    else:
        later = stage.rows.set_axis(stage.rows.index + num_tokens)
        rows, gap = _appended(before.rows, later, border, "logprob")
    if tokens is not None and stage.tokens is not None:
        tokens = pa.concat_tables([tokens, stage.tokens]).combine_chunks()
    if gap > _JOINT_NATS:
        notes = (
            *notes,
            f"{stage.name} starts {gap:.2f} nats (mean of a category, at most) from where the "
            "stage before ends: other weights or other scoring",
        )
    return replace(
        before,
        rows=rows,
        tokens=tokens,
        means=means,
        stages=(*before.stages, (border, f"start of {stage.name}")),
        notes=notes,
        benchmarks=None,
        generations=None,
    )


def _border(before: Recording, stage: Recording) -> int:
    """Return the step of the chain at which a stage starts."""
    frame = before.rows if before.means is None else before.means
    first = int(before.stages[-1][0]) if before.stages else 0
    parent = stage.manifest.get("parent") or {}
    if parent and Path(str(parent.get("run_dir"))).name == before.path.resolve().name:
        return first + int(parent["step"])
    return int(frame["step"].max())


def _appended(
    before: pd.DataFrame, later: pd.DataFrame, border: int, value: str
) -> tuple[pd.DataFrame, float]:
    """Return both tables on one axis, and how far they are apart at the border: the largest
    difference of the means of a category, in nats."""
    start = later["step"].min()
    shifted = later.assign(step=later["step"] - start + border)
    at_end = before[before["step"] == border].groupby(["split", "category"])[value].mean()
    at_start = shifted[shifted["step"] == border].groupby(["split", "category"])[value].mean()
    gap = (at_start - at_end).abs().max()
    kept = before[before["step"] <= border]
    rest = shifted[shifted["step"] > border] if len(at_end) else shifted
    joined = pd.concat([kept, rest])
    if "run" in joined:
        joined["run"] = before["run"].iloc[0]
    return joined, 0.0 if pd.isna(gap) else float(gap)
