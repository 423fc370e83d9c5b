"""How simple a training target is for a model: code lengths from the losses of the first epoch, examples to half gain.

All losses are those of an example before the update it takes part in, summed over response and terminator, in nats.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.curves import half_step
from sft_probe.analysis.recordings import Recording, load_recordings
from sft_probe.analysis.statistics import over_runs
from sft_probe.errors import UserError
from sft_probe.files import jsonl_lines, make_dir, write_text

MIN_ORDERS = 3
_BLOCK = 16
_CONVERGED = 0.01
_COLUMNS = ("run", "step", "doc_id", "category", "split", "loss_sum", "num_tokens", "num_bytes", "order")
COLUMNS = [
    "run", "train_category", "order_seed", "num_examples", "num_bytes", "code_length", "bits_per_byte", "start_length",
    "start_bits_per_byte", "learned_bits", "num_at_start", "surplus", "surplus_note", "half_gain_examples",
]  # fmt: skip


def first_epoch(directory: Path) -> pd.DataFrame | None:
    """`first_epoch.jsonl` of a run in the order of training; `None` where there is none.

    Raises:
        UserError: a line is no row of losses, or a doc stands there twice.
    """
    path = directory / "first_epoch.jsonl"
    if not path.is_file():
        return None
    rows = []
    for number, line in enumerate(jsonl_lines(path.read_text("utf-8")), start=1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in _COLUMNS})
            if not math.isfinite(row["loss_sum"]):
                raise UserError(f"{path}, line {number}: the loss of {row['doc_id']} is {row['loss_sum']}.")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no row of a first-epoch loss ({error}).") from error
    if not rows:
        raise UserError(f"{path} is empty: training stopped before its first step.")
    table = pd.DataFrame(rows).sort_values("order", kind="stable").reset_index(drop=True)
    repeated = table.duplicated(["doc_id", "category"])
    if repeated.any():
        raise UserError(f"{path}: {table['doc_id'][repeated].iloc[0]} stands there twice; an example is coded once.")
    return table


@dataclass(frozen=True, kw_only=True)
class Simplicity:
    """What `sft-probe simplicity` found."""

    runs: pd.DataFrame
    """One row per run, `COLUMNS`, with the KL those of `at_matched_gain`; in nats unless the name says bits."""
    contrasts: pd.DataFrame
    """`train_category than num_runs num_texts difference_bits bits_per_byte low high`, on the same texts."""
    notes: list[str]


def simplicity(paths: Sequence[Path], *, with_kl: bool = False) -> Simplicity:
    """Code lengths of finished runs.

    `code_length` is the prequential one, the sum of all first-epoch losses (Blier & Ollivier 2018, arXiv 1802.07044).
    `learned_bits` is what the same texts cost before training less that, where the run has scores of trained prompts at
    step 0. `surplus` is the surplus description length (Whitney et al. 2020, arXiv 2009.07368) against the held-out
    loss of a converged run, or null with the reason in `surplus_note`. `with_kl` adds the forward KL from the start at
    matched gain (arXiv 2509.04259), for which every snapshot is loaded once.

    Raises:
        UserError: a run has no scores or no `first_epoch.jsonl`; with the KL, if it has no snapshot of step 0.
    """
    recordings = load_recordings(paths)
    losses: dict[str, pd.DataFrame] = {}
    for recording in recordings:
        table = first_epoch(recording.path)
        if table is None:
            raise UserError(f"{recording.path} has no first_epoch.jsonl: it was not trained by this version.")
        losses[recording.name] = table
    limits = _limits(recordings)
    runs = pd.DataFrame([_row(recording, losses[recording.name], limits) for recording in recordings])[COLUMNS]
    if with_kl:
        from sft_probe.analysis.divergence import at_matched_gain

        gains = [_gain(recording) for recording in recordings]
        runs = pd.concat([runs, at_matched_gain([recording.path for recording in recordings], gains)], axis=1)
    notes = [
        "raw code lengths mostly rank the entropy of the texts: compare categories on the same texts",
    ]
    fewest = min(runs.groupby("train_category", dropna=False)["order_seed"].nunique())
    if fewest < MIN_ORDERS:
        notes.append(f"{fewest} data order(s) of a category: a claim needs at least {MIN_ORDERS}")
    return Simplicity(runs=runs, contrasts=_contrasts(recordings, losses, notes), notes=notes)


def _row(recording: Recording, losses: pd.DataFrame, limits: dict[str, tuple[float, str]]) -> dict[str, object]:
    nats, num_bytes = float(losses["loss_sum"].sum()), int(losses["num_bytes"].sum())
    start = _start_losses(recording, losses)
    own = losses[losses["doc_id"].isin(start)]
    start_length = sum(start.values()) if start else math.nan
    limit, note = limits[recording.setting]
    gain = _gain(recording)
    return {
        "run": recording.name,
        "train_category": recording.train_category,
        "order_seed": recording.order_seed,
        "num_examples": len(losses),
        "num_bytes": num_bytes,
        "code_length": nats,
        "bits_per_byte": nats / num_bytes / math.log(2),
        "start_length": start_length,
        "start_bits_per_byte": start_length / own["num_bytes"].sum() / math.log(2) if start else math.nan,
        "learned_bits": (start_length - own["loss_sum"].sum()) / math.log(2) if start else math.nan,
        "num_at_start": len(own),
        "surplus": surplus(losses, limit) if math.isfinite(limit) else math.nan,
        "surplus_note": note,
        "half_gain_examples": half_step(gain["examples_seen"], gain["gain"]) if gain is not None else math.nan,
    }


def _start_losses(recording: Recording, losses: pd.DataFrame) -> dict[str, float]:
    """Doc id to the loss of its training text at step 0, in nats, from score rows of trained prompts."""
    rows = recording.rows
    if recording.means is not None or recording.train_category is None:
        return {}
    own = rows[(rows["split"] == "train") & (rows["category"] == recording.train_category) & (rows["step"] == 0)]
    own = own[own["doc_id"].isin(losses["doc_id"]) & own["logprob_with_eos"].notna()]
    return {str(doc): -float(value) for doc, value in zip(own["doc_id"], own["logprob_with_eos"], strict=True)}


def _limits(recordings: Sequence[Recording]) -> dict[str, tuple[float, str]]:
    """Per setting, the held-out loss per token of a converged run of it, or NaN; and what it is or why not."""
    found: dict[str, tuple[float, str]] = {}
    for recording in recordings:
        limit, note = _converged_loss(recording)
        best, _ = found.get(recording.setting, (math.nan, ""))
        if recording.setting not in found or (not math.isnan(limit) and not best <= limit):
            found[recording.setting] = (limit, note)
    return found


def _converged_loss(recording: Recording) -> tuple[float, str]:
    """Least held-out loss per token, terminator counted, where it stopped falling in the last of two or more epochs."""
    category = recording.train_category
    rows = recording.rows if recording.means is None else pd.DataFrame(columns=["split", "category"])
    rows = rows[(rows["split"] == "heldout") & (rows["category"] == category)]
    if rows.empty or rows["logprob_with_eos"].isna().all():
        return math.nan, f"not estimable: no held-out scores of {category} with the terminator"
    sums = rows.groupby("step").agg(nats=("logprob_with_eos", "sum"), tokens=("num_tokens", "sum"), n=("step", "size"))
    loss = -sums["nats"] / (sums["tokens"] + sums["n"])
    epochs = float(rows["epoch"].max())
    if not epochs >= 2:
        return math.nan, "not estimable: no converged run (under two epochs)"
    within = rows.groupby("step")["epoch"].first()
    earlier = loss[within <= epochs - 1]
    gain = (float(earlier.min()) - float(loss.min())) / float(loss.iloc[0]) if len(earlier) else math.inf
    if gain > _CONVERGED:
        return math.nan, "not estimable: the held-out loss still fell by over 1 % in the last epoch"
    return float(loss.min()), f"limit: {loss.min():.3f} nats per token, the least held-out loss of {recording.name}"


def surplus(losses: pd.DataFrame, limit: float, block: int = _BLOCK) -> float:
    """Surplus description length in nats: over blocks of examples, the mean loss above `limit`, times the block's size.

    Negative blocks count as 0; blocks, since single examples lie above and below any limit by their texts alone.

    Args:
        losses: rows `loss_sum num_tokens` in the order of training, both with the terminator.
        limit: nats per token, terminator counted.
        block: examples.
    """
    number = np.arange(len(losses)) // block
    number = np.minimum(number, max(len(losses) // block - 1, 0))  # a short rest joins the block before
    sums = losses.assign(tokens=losses["num_tokens"]).groupby(number)[["loss_sum", "tokens"]].sum()
    return float((sums["loss_sum"] - limit * sums["tokens"]).clip(lower=0).sum())


def _gain(recording: Recording) -> pd.DataFrame | None:
    """`step examples_seen gain`: the held-out change of a run's own category in nats per body token, where known."""
    if recording.means is not None or "heldout" not in recording.splits:
        return None
    if (target := recording.target(recording.categories("heldout"))) is None:
        return None
    arrays = recording.cube("heldout", [target])
    seen = recording.rows.groupby("step")["examples_seen"].first().reindex(arrays.steps)
    num_tokens = np.nansum(arrays.at_start("num_tokens")[:, 0, 0] - 1)
    gain = np.nansum(arrays.change("body")[:, 0], axis=0) / num_tokens
    return pd.DataFrame({"step": arrays.steps, "examples_seen": seen.to_numpy(dtype=float), "gain": gain})


def _contrasts(
    recordings: Sequence[Recording], losses: dict[str, pd.DataFrame], notes: list[str]
) -> pd.DataFrame:  # fmt: skip
    """Code lengths of `random` and `chosen_no_prompt` less that of `chosen`, per data order, on the same texts.

    Of runs of one model and probe set; those with a `--train_data` of their own have no texts in common.
    """
    lengths: dict[str, dict[str, dict[str, float]]] = {}
    sizes: dict[str, int] = {}
    own = [recording for recording in recordings if not recording.manifest.get("train_data")]
    if len({(recording.model, recording.probe.get("probe_set_sha256")) for recording in own}) > 1:
        notes.append("no contrast on the same texts: the runs are of several models or probe sets")
        return pd.DataFrame()
    for recording in own:
        table = losses[recording.name]
        owners = _owners(recording)
        if recording.train_category == "random" and not owners:
            notes.append(
                f"{recording.name} is not in the contrast: its probe set, which tells whose texts, is not here"
            )
            continue
        if recording.order_seed in lengths.get(str(recording.train_category), {}):
            raise UserError(f"two runs on {recording.train_category} have order seed {recording.order_seed}: give one.")
        texts = [owners.get(str(name), str(name)) for name in table["doc_id"]]
        sizes |= dict(zip(texts, table["num_bytes"].astype(int), strict=True))
        per_order = lengths.setdefault(str(recording.train_category), {})
        per_order[recording.order_seed] = dict(zip(texts, table["loss_sum"].astype(float), strict=True))
    rows = []
    for other in ("random", "chosen_no_prompt"):
        orders = sorted(lengths.get(other, {}).keys() & lengths.get("chosen", {}).keys())
        if not orders:
            continue
        pairs = [(lengths["chosen"][order], lengths[other][order]) for order in orders]
        common = set.intersection(*(set(one) & set(two) for one, two in pairs))
        if not common:
            continue
        bits = np.array([[sum(two[t] - one[t] for t in common)] for one, two in pairs]) / math.log(2)
        mean, _, low, high = over_runs(bits)
        rows.append(
            {
                "train_category": other, "than": "chosen", "num_runs": len(orders), "num_texts": len(common),
                "difference_bits": mean[0], "bits_per_byte": mean[0] / sum(sizes[text] for text in common),
                "low": low[0], "high": high[0],
            }
        )  # fmt: skip
    if not rows:
        notes.append("no contrast on the same texts: it needs runs on chosen and on random or chosen_no_prompt")
    return pd.DataFrame(rows)


def _owners(recording: Recording) -> dict[str, str]:
    """For a run on `random`, doc id to the doc whose text it was trained on."""
    if recording.train_category != "random" or recording.probe_set is None:
        return {}
    return {doc.doc_id: doc.random_doc_id for doc in recording.probe_set.docs if doc.random_doc_id is not None}


def write_simplicity(found: Simplicity, folder: Path) -> list[Path]:
    """Writes `simplicity.csv` and, where there is one, `simplicity_contrasts.csv`; returns their paths."""
    make_dir(folder)
    tables = {"simplicity": found.runs, "simplicity_contrasts": found.contrasts}
    paths = [folder / f"{name}.csv" for name, table in tables.items() if len(table)]
    for path in paths:
        write_text(path, tables[path.stem].to_csv(index=False))
    return paths
