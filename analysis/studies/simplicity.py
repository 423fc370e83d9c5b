"""How simple a training target is for a model: code lengths from the losses of the first epoch,
excess description length, examples to half gain.

Every loss is that of an example before the update it takes part in, summed over response and
terminator, in nats.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.analyze import few_runs_note
from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.curves import half_bracket
from sft_probe.analysis.stats.intervals import Floats, over_runs, over_runs_and_docs
from sft_probe.analysis.stats.runs import Recording, load_recordings
from sft_probe.analysis.stats.verdict import cluster_warnings
from sft_probe.analysis.studies.description_length import MIN_ORDERS, CodedRun, excess_table
from sft_probe.analysis.studies.matched_kl import at_matched_gain
from sft_probe.errors import UserError
from sft_probe.files import jsonl_lines, make_dir, write_text

_COLUMNS = (
    "run",
    "step",
    "doc_id",
    "category",
    "split",
    "loss_sum",
    "num_tokens",
    "num_bytes",
    "order",
)
COLUMNS = [
    "run",
    "train_category",
    "order_seed",
    "num_examples",
    "num_bytes",
    "code_length",
    "bits_per_byte",
    "start_length",
    "start_bits_per_byte",
    "learned_bits",
    "num_at_start",
    "half_gain_after_examples",
    "half_gain_by_examples",
]


def first_epoch(directory: Path) -> pd.DataFrame | None:
    """Return `first_epoch.jsonl` of a run in the order of training; `None` where there is none.

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
                raise UserError(
                    f"{path}, line {number}: the loss of {row['doc_id']} is {row['loss_sum']}."
                )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: no row of a first-epoch loss ({error})."
            ) from error
    if not rows:
        raise UserError(f"{path} is empty: training stopped before its first step.")
    table = pd.DataFrame(rows).sort_values("order", kind="stable").reset_index(drop=True)
    repeated = table.duplicated(["doc_id", "category"])
    if repeated.any():
        raise UserError(
            f"{path}: {table['doc_id'][repeated].iloc[0]} stands there twice; an example is coded "
            "once."
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Simplicity:
    """What `sft-probe simplicity` found."""

    runs: pd.DataFrame
    """One row per run, `COLUMNS`, with the KL those of `at_matched_gain`; in nats unless the name
    says bits."""
    contrasts: pd.DataFrame
    """`train_category than num_runs num_texts difference_bits bits_per_byte low_orders high_orders
    low high effective_clusters largest_cluster`, each row on the same texts; `low` and `high` end
    the 95 % interval over data orders and texts, in bits (of one order: over texts alone)."""
    excess: pd.DataFrame
    """From `excess_table`, of the categories with three data orders."""
    notes: list[str]


def simplicity(paths: Sequence[Path]) -> Simplicity:
    """Compute the code lengths of finished runs.

    `code_length` is the prequential one, the sum of all first-epoch losses (Blier & Ollivier 2018,
    arXiv 1802.07044). `learned_bits` is what the same texts cost before training less that, where
    the run has scores of trained prompts at step 0. Half of the last held-out gain was first seen
    at `half_gain_by_examples`, and not yet at the probed step before, `half_gain_after_examples`.
    Runs swept with `--reference` also have the forward KL from it at matched gain (arXiv
    2509.04259).

    Raises:
        UserError: a run has no scores or no `first_epoch.jsonl`, or was trained on pairs.
    """
    recordings = load_recordings(paths)
    losses: dict[str, pd.DataFrame] = {}
    for recording in recordings:
        if recording.manifest.get("objective", "sft") != "sft":
            raise UserError(
                f"{recording.path} was trained on {recording.trained_on}: code lengths are those "
                "of texts that SFT learns. Leave it out."
            )
        table = first_epoch(recording.path)
        if table is None:
            raise UserError(
                f"{recording.path} has no first_epoch.jsonl: it was not trained by this version."
            )
        losses[recording.name] = table
    runs = pd.DataFrame([_row(recording, losses[recording.name]) for recording in recordings])[
        COLUMNS
    ]
    gains = [_gain(recording) for recording in recordings]
    runs = pd.concat([runs, at_matched_gain(recordings, gains)], axis=1)
    notes = [
        "raw code lengths mostly rank the entropy of the texts: compare categories on the same "
        "texts",
    ]
    fewest = min(runs.groupby("train_category", dropna=False)["order_seed"].nunique())
    if fewest < MIN_ORDERS:
        notes.append(f"{fewest} data order(s) of a category: a claim needs at least {MIN_ORDERS}")
    contrasts = _contrasts(recordings, losses, notes)
    excess, reasons = excess_table(
        [
            CodedRun(recording=recording, losses=own, start=_start_losses(recording, own))
            for recording in recordings
            for own in (losses[recording.name],)
        ]
    )
    return Simplicity(runs=runs, contrasts=contrasts, excess=excess, notes=[*notes, *reasons])


def _row(recording: Recording, losses: pd.DataFrame) -> dict[str, object]:
    nats, num_bytes = float(losses["loss_sum"].sum()), int(losses["num_bytes"].sum())
    start = _start_losses(recording, losses)
    own = losses[losses["doc_id"].isin(start)]
    start_length = sum(start.values()) if start else math.nan
    gain = _gain(recording)
    after, by = (
        half_bracket(gain["examples_seen"], gain["gain"])
        if gain is not None
        else (math.nan, math.nan)
    )
    return {
        "run": recording.name,
        "train_category": recording.train_category,
        "order_seed": recording.order_seed,
        "num_examples": len(losses),
        "num_bytes": num_bytes,
        "code_length": nats,
        "bits_per_byte": nats / num_bytes / math.log(2),
        "start_length": start_length,
        "start_bits_per_byte": start_length / own["num_bytes"].sum() / math.log(2)
        if start
        else math.nan,
        "learned_bits": (start_length - own["loss_sum"].sum()) / math.log(2) if start else math.nan,
        "num_at_start": len(own),
        "half_gain_after_examples": after,
        "half_gain_by_examples": by,
    }


def _start_losses(recording: Recording, losses: pd.DataFrame) -> dict[str, float]:
    """Return doc id to the loss of its training text at step 0, in nats, from score rows of trained
    prompts."""
    rows = recording.rows
    if recording.means is not None or recording.train_category is None:
        return {}
    own = rows[
        (rows["split"] == "train")
        & (rows["category"] == recording.train_category)
        & (rows["step"] == 0)
    ]
    own = own[own["doc_id"].isin(losses["doc_id"]) & own["logprob_with_eos"].notna()]
    return {
        str(doc): -float(value)
        for doc, value in zip(own["doc_id"], own["logprob_with_eos"], strict=True)
    }


def _gain(recording: Recording) -> pd.DataFrame | None:
    """Return `step examples_seen gain`: the held-out change of a run's own category in nats per
    body token, where known."""
    if recording.means is not None or "heldout" not in recording.splits:
        return None
    if (target := recording.target(recording.categories("heldout"))) is None:
        return None
    arrays = recording.cube("heldout", [target])
    seen = recording.rows.groupby("step")["examples_seen"].first().reindex(arrays.steps)
    num_tokens = np.nansum(arrays.at_start("num_tokens")[:, 0, 0] - 1)
    gain = np.nansum(arrays.change("body")[:, 0], axis=0) / num_tokens
    return pd.DataFrame(
        {"step": arrays.steps, "examples_seen": seen.to_numpy(dtype=float), "gain": gain}
    )


def _contrasts(
    recordings: Sequence[Recording], losses: dict[str, pd.DataFrame], notes: list[str]
) -> pd.DataFrame:
    """Return the code lengths of `random` and `chosen_no_prompt` less that of `chosen`, on the same
    texts.

    Only runs of one model and probe set are compared, order by order; runs with a `--train_data` of
    their own have no texts in common. Adds to `notes` why a run or the whole contrast is missing,
    and what its interval may not cover.
    """
    own = [recording for recording in recordings if not recording.manifest.get("train_data")]
    if len({(recording.model, recording.probe.get("probe_set_sha256")) for recording in own}) > 1:
        notes.append("no contrast on the same texts: the runs are of several models or probe sets")
        return pd.DataFrame()
    coded = _coded_texts(own, losses, notes)
    clusters = _text_clusters(own)
    rows = []
    for other in ("random", "chosen_no_prompt"):
        orders = sorted(coded.get(other, {}).keys() & coded.get("chosen", {}).keys())
        tables = [coded[name][order] for order in orders for name in ("chosen", other)]
        texts = sorted(set.intersection(*(set(table.index) for table in tables))) if tables else []
        if not texts:
            continue
        chosen, others = (
            np.stack(
                [
                    coded[name][order].loc[texts, "loss_sum"].to_numpy(dtype=float)
                    for order in orders
                ]
            )
            for name in ("chosen", other)
        )
        num_bytes = int(tables[0].loc[texts, "num_bytes"].sum())
        numbers = cluster_ids([clusters.get(text, text) for text in texts])
        rows.append(
            {
                "train_category": other,
                "than": "chosen",
                **_difference((others - chosen), numbers, num_bytes),
            }
        )
    table = pd.DataFrame(rows)
    if rows:
        notes += cluster_warnings(table.rename(columns={"train_category": "category"}))
        notes += few_runs_note(int(table["num_runs"].min()))
    else:
        notes.append(
            "no contrast on the same texts: it needs runs on chosen and on random or "
            "chosen_no_prompt"
        )
    return table


def _coded_texts(
    recordings: Sequence[Recording], losses: dict[str, pd.DataFrame], notes: list[str]
) -> dict[str, dict[str, pd.DataFrame]]:
    """Return, by training category and order seed, `loss_sum num_bytes` of each text by the doc
    that it belongs to.

    Raises:
        UserError: two runs on one category have the same order seed.
    """
    coded: dict[str, dict[str, pd.DataFrame]] = {}
    for recording in recordings:
        table = losses[recording.name]
        owners = _owners(recording)
        if recording.train_category == "random" and not owners:
            notes.append(
                f"{recording.name} is not in the contrast: its probe set, which tells whose texts, "
                "is not here"
            )
            continue
        per_order = coded.setdefault(str(recording.train_category), {})
        if recording.order_seed in per_order:
            raise UserError(
                f"two runs on {recording.train_category} have order seed {recording.order_seed}: "
                "give one."
            )
        texts = [owners.get(str(name), str(name)) for name in table["doc_id"]]
        per_order[recording.order_seed] = table.assign(text=texts).set_index("text")[
            ["loss_sum", "num_bytes"]
        ]
    return coded


def _text_clusters(recordings: Sequence[Recording]) -> dict[str, str]:
    """Return the conversation of each doc, where the probe set is known."""
    probe_sets = [recording.probe_set for recording in recordings if recording.probe_set]
    return {doc.doc_id: doc.conversation_id for doc in probe_sets[0].docs} if probe_sets else {}


def _difference(nats: Floats, clusters: Ints, num_bytes: int) -> dict[str, object]:
    """Return the summed difference in bits with its 95 % intervals over orders, and over orders and
    texts.

    Args:
        nats: [orders, texts], differences of losses.
        clusters: [texts]
        num_bytes: size of all texts together.
    """
    bits = nats / math.log(2)
    num_texts = bits.shape[1]
    mean, _, low_orders, high_orders = over_runs(bits.sum(axis=1, keepdims=True))
    joint = over_runs_and_docs(bits[:, :, None], clusters)
    return {
        "num_runs": len(bits),
        "num_texts": num_texts,
        "difference_bits": mean[0],
        "bits_per_byte": mean[0] / num_bytes,
        "low_orders": low_orders[0],
        "high_orders": high_orders[0],
        "low": joint.low[0] * num_texts,
        "high": joint.high[0] * num_texts,
        "effective_clusters": joint.effective_clusters[0],
        "largest_cluster": joint.largest_cluster[0],
    }


def _owners(recording: Recording) -> dict[str, str]:
    """Return, for a run on `random`, doc id to the doc whose text it was trained on."""
    if recording.train_category != "random" or recording.probe_set is None:
        return {}
    return {
        doc.doc_id: doc.random_doc_id
        for doc in recording.probe_set.docs
        if doc.random_doc_id is not None
    }


def write_simplicity(found: Simplicity, folder: Path) -> list[Path]:
    """Write `simplicity.csv` and, where there are such rows, `simplicity_contrasts.csv` and
    `simplicity_excess.csv`; return their paths."""
    make_dir(folder)
    tables = {
        "simplicity": found.runs,
        "simplicity_contrasts": found.contrasts,
        "simplicity_excess": found.excess,
    }
    paths = [folder / f"{name}.csv" for name, table in tables.items() if len(table)]
    for path in paths:
        write_text(path, tables[path.stem].to_csv(index=False))
    return paths
