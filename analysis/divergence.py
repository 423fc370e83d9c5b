"""How far a run has moved from its start: forward KL of next-token distributions, teacher-forced on held-out texts."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sft_probe.analysis.checkpoints import Checkpoint, of_run
from sft_probe.analysis.curves import crossing
from sft_probe.analysis.live_model import LiveModel
from sft_probe.analysis.settings import SweepRequest, SweepSettings, resolve_settings
from sft_probe.errors import UserError
from sft_probe.files import jsonl_lines, make_dir, write_jsonl
from sft_probe.prompts import EncodedDoc, terminator_id

log = logging.getLogger(__name__)

_CHUNK = 64


def divergences(run: Path) -> pd.DataFrame:
    """Rows `run step doc_id category split kl_sum num_tokens` of every snapshot, scored where `RUN/kl` has none yet.

    `kl_sum` is KL(start || step) in nats, summed over the `num_tokens` positions that predict a held-out response (the
    `chosen` one, or of the first category where a set has none) and its terminator, in float32 weights.

    Raises:
        UserError: a snapshot is damaged, or there is none of step 0.
    """
    checkpoints, problems = of_run(run)
    if problems or checkpoints[0].step != 0:
        raise UserError("\n".join([f"{run}: the KL needs every snapshot, and that of step 0.", *problems]))
    paths = {item.step: make_dir(run / "kl") / f"step_{item.step:06d}.jsonl" for item in checkpoints}
    missing = [item for item in checkpoints if not paths[item.step].exists()]
    if missing:
        request = SweepRequest(directory=run)
        settings = resolve_settings(request, checkpoints[0])
        start, live = (LiveModel("float32", request.resolved_device, settings) for _ in range(2))
        for checkpoint in missing:
            log.info("%s, step %d: KL from the start", run, checkpoint.step)
            write_jsonl(paths[checkpoint.step], _rows(settings, start, live, checkpoints[0], checkpoint))
    lines = [line for path in paths.values() for line in jsonl_lines(path.read_text("utf-8"))]
    return pd.DataFrame([json.loads(line) for line in lines])


def _rows(
    settings: SweepSettings, start: LiveModel, live: LiveModel, first: Checkpoint, checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    checkpoint.verify()
    if start.model is None:
        first.verify()
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
            raise UserError(f"step {checkpoint.step}: the logits of {doc.doc.doc_id} are NaN or infinite.")
        rows.append(
            {
                "run": settings.run_columns["run"], "step": checkpoint.step, "doc_id": doc.doc.doc_id,
                "category": category, "split": "heldout", "kl_sum": kl,
                "num_tokens": len(doc.continuation_ids[category]) + 1,
            }
        )  # fmt: skip
    return rows


@torch.inference_mode()
def kl_sum(start: Any, model: Any, doc: EncodedDoc, category: str, end: int) -> float:
    """KL(start || model) in nats, summed over the positions that predict the response and `end`, in float64."""
    ids = torch.tensor([[*doc.prompt_ids, *doc.continuation_ids[category], end]], device=model.device)
    place = slice(len(doc.prompt_ids) - 1, -1)
    logits = [item(input_ids=ids).logits[0, place] for item in (start, model)]
    total = 0.0
    for ours, theirs in zip(*(item.split(_CHUNK) for item in logits), strict=True):
        before, after = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
    return total


def kl_text(runs: pd.DataFrame) -> list[str]:
    """A line per run of `sft-probe simplicity --kl`."""
    return [
        f"forward KL of {row['run']} from its start: {row['kl_per_token']:.4f} nats per token of held-out "
        f"{row['kl_category']} responses, where its own target has gained {row['matched_gain']:.4f} nats per token "
        f"(step {row['kl_step']:.1f})"
        if not math.isnan(row["kl_per_token"])
        else f"forward KL of {row['run']}: no matched gain: a run's own target did not gain, or was not scored"
        for _, row in runs.iterrows()
    ]


def at_matched_gain(runs: Sequence[Path], gains: Sequence[pd.DataFrame | None]) -> pd.DataFrame:
    """`matched_gain kl_step kl_per_token kl_category` of each run, where all have gained the same on their own target.

    The gain is the least of the runs' last ones; curves are linear between steps.

    Args:
        runs: their directories.
        gains: `step gain` of each, nats per body token; `None` where it is not known.
    """
    last = [math.nan if gain is None else float(gain["gain"].iloc[-1]) for gain in gains]
    known = [value for value in last if not math.isnan(value)]
    matched = min(known) if known and min(known) > 0 else math.nan
    rows = []
    for run, gain in zip(runs, gains, strict=True):
        table = divergences(run)
        sums = table.groupby("step")[["kl_sum", "num_tokens"]].sum()
        place = None if gain is None or math.isnan(matched) else crossing(gain["gain"].to_numpy(), matched)
        step = math.nan if place is None or gain is None else float(place @ gain["step"].to_numpy(dtype=float))
        curve = sums["kl_sum"] / sums["num_tokens"]
        rows.append(
            {
                "matched_gain": matched, "kl_step": step, "kl_category": table["category"].iloc[0],
                "kl_per_token": float(np.interp(step, curve.index, curve)) if not math.isnan(step) else math.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
