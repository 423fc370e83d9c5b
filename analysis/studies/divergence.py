"""How far a run has moved from its start: forward KL of next-token distributions, teacher-forced on
held-out texts."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sft_probe.analysis.stats.curves import matched_gain
from sft_probe.analysis.sweep.checkpoints import Checkpoint, snapshots_of_run
from sft_probe.analysis.sweep.identity import check_undamaged, identify
from sft_probe.analysis.sweep.live_model import LiveModel
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.settings import SweepSettings, resolve_settings
from sft_probe.errors import UserError
from sft_probe.files import jsonl_lines, make_dir, write_jsonl
from sft_probe.prompts import EncodedDoc, terminator_id

log = logging.getLogger(__name__)

_CHUNK = 64


def divergences(run: Path) -> pd.DataFrame:
    """Return rows `run step doc_id category split kl_sum num_tokens weights` of every snapshot,
    kept in `RUN/kl`.

    `kl_sum` is KL(start || step) in nats, summed over the `num_tokens` positions that predict a
    held-out response (the `chosen` one, or of the first category where a set has none) and its
    terminator, in float32 weights. What is there is scored again only where the weights of the
    snapshot or of the start have changed.

    Raises:
        UserError: a snapshot is damaged, or there is none of step 0.
    """
    checkpoints, problems = snapshots_of_run(run)
    if problems or checkpoints[0].step != 0:
        raise UserError(
            "\n".join([f"{run}: the KL needs every snapshot, and that of step 0.", *problems])
        )
    paths = {
        item.step: make_dir(run / "kl") / f"step_{item.step:06d}.jsonl" for item in checkpoints
    }
    missing = [
        item for item in checkpoints if not _is_scored(paths[item.step], checkpoints[0], item)
    ]
    if missing:
        request = SweepRequest(directory=run)
        settings = resolve_settings(request, checkpoints)
        start, live = (LiveModel("float32", request.resolved_device, settings) for _ in range(2))
        for checkpoint in missing:
            log.info("%s, step %d: KL from the start", run, checkpoint.step)
            write_jsonl(
                paths[checkpoint.step], _rows(settings, start, live, checkpoints[0], checkpoint)
            )
    lines = [line for path in paths.values() for line in jsonl_lines(path.read_text("utf-8"))]
    return pd.DataFrame([json.loads(line) for line in lines])


def _is_scored(path: Path, first: Checkpoint, checkpoint: Checkpoint) -> bool:
    if not path.exists():
        return False
    weights = {json.loads(line).get("weights") for line in jsonl_lines(path.read_text("utf-8"))}
    return weights <= {
        None,
        _weights_of(first, checkpoint),
    }  # an earlier version did not record them


def _weights_of(first: Checkpoint, checkpoint: Checkpoint) -> str:
    """Return a hash of the weights of both snapshots."""
    weights = json.dumps([first.sha256, checkpoint.sha256], sort_keys=True)
    return hashlib.sha256(weights.encode()).hexdigest()[:16]


def _rows(
    settings: SweepSettings,
    start: LiveModel,
    live: LiveModel,
    first: Checkpoint,
    checkpoint: Checkpoint,
) -> list[dict[str, Any]]:
    check_undamaged(checkpoint, identify(checkpoint))
    if start.model is None:
        check_undamaged(first, identify(first))
        start.load(first)
    live.load(checkpoint)
    categories = settings.probe_set.categories
    category = "chosen" if "chosen" in categories else categories[0]
    end = terminator_id(settings.format_name, settings.tokenizer)
    rows = []
    for doc in settings.docs:
        if doc.doc.split != "heldout":
            continue
        kl = kl_sum(start.model, live.model, doc, category, end)
        if math.isnan(kl):
            raise UserError(
                f"step {checkpoint.step}: the logits of {doc.doc.doc_id} are NaN or infinite."
            )
        rows.append(
            {
                "run": settings.run_columns["run"],
                "step": checkpoint.step,
                "doc_id": doc.doc.doc_id,
                "category": category,
                "split": "heldout",
                "kl_sum": kl,
                "num_tokens": len(doc.continuation_ids[category]) + 1,
                "weights": _weights_of(first, checkpoint),
            }
        )
    return rows


@torch.inference_mode()
def kl_sum(start: Any, model: Any, doc: EncodedDoc, category: str, end: int) -> float:
    """Return KL(start || model) in nats, summed over the positions that predict the response and
    `end`, in float64."""
    ids = torch.tensor(
        [[*doc.prompt_ids, *doc.continuation_ids[category], end]], device=model.device
    )
    place = slice(len(doc.prompt_ids) - 1, -1)
    logits = [item(input_ids=ids).logits[0, place] for item in (start, model)]
    total = 0.0
    for ours, theirs in zip(*(item.split(_CHUNK) for item in logits), strict=True):
        before, after = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
    return total


def kl_text(runs: pd.DataFrame) -> list[str]:
    """Return a line per run of `sft-probe simplicity --kl`."""
    lines = []
    for _, row in runs.iterrows():
        head = (
            f"forward KL of {row['run']} from its start, nats per token of held-out "
            f"{row['kl_category']} responses"
        )
        if math.isnan(row["kl_at"]):
            lines.append(
                f"{head}: no matched gain (a run's own target did not gain, or was not scored at a "
                "snapshot)"
            )
            continue
        before = (
            f"{row['kl_before']:.4f} at step {row['kl_step_before']:.0f} (gain "
            f"{row['kl_gain_before']:.4f}), "
        )
        lines.append(
            f"{head}: "
            f"{before if row['kl_step_before'] < row['kl_step_at'] else ''}{row['kl_at']:.4f} at "
            f"step {row['kl_step_at']:.0f} (gain {row['kl_gain_at']:.4f}); matched gain "
            f"{row['matched_gain']:.4f}, half of "
            "the least last gain of the runs"
        )
    return lines


def at_matched_gain(runs: Sequence[Path], gains: Sequence[pd.DataFrame | None]) -> pd.DataFrame:
    """Return the KL of each run at the two snapshots between which its own target reaches the
    matched gain.

    The matched gain is half of the least last gain of the runs. Nothing is interpolated: the curve
    between two snapshots is not known. Columns: `matched_gain kl_category`, and `kl_step kl_gain
    kl` each with `_before` and `_at`; both are the first snapshot where the gain is there from the
    start, NaN where there is no matched gain.

    Args:
        runs: their directories.
        gains: `step gain` of each, nats per body token; `None` where it is not known.
    """
    last = [math.nan if gain is None else float(gain["gain"].iloc[-1]) for gain in gains]
    matched = matched_gain(last)
    rows = []
    for run, gain in zip(runs, gains, strict=True):
        table = divergences(run)
        sums = table.groupby("step")[["kl_sum", "num_tokens"]].sum()
        gain_at = (
            pd.Series(math.nan, sums.index) if gain is None else gain.set_index("step")["gain"]
        )
        curve = pd.DataFrame(
            {"kl": sums["kl_sum"] / sums["num_tokens"], "kl_gain": gain_at}
        ).dropna()
        curve = curve.rename_axis("kl_step").reset_index()
        reached = np.flatnonzero(curve["kl_gain"] >= matched)
        row: dict[str, object] = {"matched_gain": matched, "kl_category": table["category"].iloc[0]}
        for name, back in (("before", 1), ("at", 0)):
            place = (
                curve.iloc[max(int(reached[0]) - back, 0)]
                if len(reached)
                else pd.Series(dtype=float)
            )
            row |= {
                f"{column}_{name}": place.get(column, math.nan)
                for column in ("kl_step", "kl_gain", "kl")
            }
        rows.append(row)
    return pd.DataFrame(rows)
