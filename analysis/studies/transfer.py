"""`sft-probe transfer --runs`: what each training set moves in every probe category, from scores of
finished runs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.analyze import few_runs_note
from sft_probe.analysis.stats.clusters import count_text, renumber
from sft_probe.analysis.stats.curves import matched_gain
from sft_probe.analysis.stats.intervals import Estimate
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import Recording, load_recording
from sft_probe.analysis.stats.verdict import cluster_warnings
from sft_probe.analysis.studies.training_runs import HALVES
from sft_probe.analysis.studies.transfer_maths import (
    Gains,
    delta,
    difference,
    noise_floor,
    omega_at_matched_gain,
    omega_curve,
    ratio,
    selectivity_of,
)
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text

_HEADLINE = ("random", "chosen_no_prompt")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Tidy tables of a set of rows.

    Intervals are 95 %, over other prompts and other runs where every row has two seeds or more,
    else over prompts.
    """

    matrix: pd.DataFrame
    """`row target category transfer low high efficiency efficiency_low efficiency_high seeds`, the
    last common step"""
    selectivity: pd.DataFrame
    """`row selectivity low high`"""
    omega: pd.DataFrame
    """`row other omega low high matched_gain matched_omega matched_low matched_high is_null`, of
    rows with other targets; `is_null`: the noise floor, of the rows `half_1` and `half_2`"""
    differences: pd.DataFrame
    """`row other category difference low high`, nats per body token: rows of one target on it, and
    every row against `chosen` on chosen"""
    curves: pd.DataFrame
    """`row other step gain omega low high`"""
    shares: pd.DataFrame
    """`row of share low high`, of chosen's held-out gain"""
    step: int
    num_docs: int
    clusters: str
    """How many, in words"""
    notes: list[str]


def transfer(sources: Sequence[str]) -> Transfer:
    """Read runs, each `RUN` or `ROW=RUN`; runs of one row are its seeds. Rows are named by their
    training category.

    Raises:
        UserError: under two rows, or runs that share no docs, categories and steps, or rows without
            body log-probs.
    """
    rows: dict[str, list[Recording]] = {}
    for source in sources:
        name, given, path = source.rpartition("=")
        recording = load_recording(Path(path))
        if recording.means is not None:
            raise UserError(f"{path} holds means only; transfer needs score rows of docs.")
        rows.setdefault(name if given else str(recording.train_category), []).append(recording)
    if len(rows) < 2:
        raise UserError(
            f"transfer compares at least two rows; there is only {', '.join(rows)}. Name them "
            "ROW=RUN."
        )
    models = {recording.model for group in rows.values() for recording in group}
    if len(models) > 1:
        raise UserError(
            f"the runs start from several models, {', '.join(sorted(models))}; compare those of "
            "one."
        )
    gains, doc_ids, complete = _gains(rows)
    pairs = list(itertools.combinations(gains, 2))
    curves = [_curve(one, two) for one, two in pairs if one.target != two.target]
    notes = (
        [f"{len(doc_ids) - complete} docs without all scores are left out"]
        if complete < len(doc_ids)
        else []
    )
    return Transfer(
        matrix=pd.DataFrame(_matrix(gains)),
        selectivity=pd.DataFrame(
            [{"row": gain.name, **_columns("selectivity", selectivity_of(gain))} for gain in gains]
        ),
        omega=pd.DataFrame([row for one, two in pairs if (row := _omega(one, two))]),
        differences=pd.DataFrame(_differences(gains)),
        curves=pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(),
        shares=pd.DataFrame(_shares(gains)),
        step=gains[0].steps[-1],
        num_docs=complete,
        clusters=count_text(gains[0].clusters.max(axis=0) + 1),
        notes=[*notes, *cluster_warnings(_cluster_sizes(gains[0])), *_seed_notes(gains)],
    )


def _cluster_sizes(gains: Gains) -> pd.DataFrame:
    cells = {name: gains.cell(name, gains.last) for name in gains.categories}
    found = {name: delta(cell.value, [(cell, np.ones(1))]) for name, cell in cells.items()}
    return pd.DataFrame(
        {
            "category": list(found),
            "effective_clusters": [item.effective_clusters[0] for item in found.values()],
            "largest_cluster": [item.largest_cluster[0] for item in found.values()],
        }
    )


def _seed_notes(gains: list[Gains]) -> list[str]:
    """Say what the intervals over so few runs do not cover."""
    fewest = min(len(gain.change) for gain in gains)
    if fewest == 1:
        return [
            "one seed of a row: its intervals hold for other prompts and say nothing of training "
            "noise"
        ]
    return few_runs_note(fewest)


def _gains(rows: dict[str, list[Recording]]) -> tuple[list[Gains], list[str], int]:
    """Return the gains of all rows on the docs that every run scored at every common step; how many
    docs and how many complete."""
    runs = [recording for group in rows.values() for recording in group]
    if any("heldout" not in recording.splits for recording in runs):
        raise UserError(
            "transfer is measured on held-out prompts, and a run has no scores of them."
        )
    common = [
        name
        for name in runs[0].categories("heldout")
        if all(name in run.categories("heldout") for run in runs)
    ]
    cubes = {id(run): run.cube("heldout", common) for run in runs}
    steps = sorted(set.intersection(*(set(item.steps) for item in cubes.values())))
    doc_ids = sorted(set.intersection(*(set(item.doc_ids) for item in cubes.values())))
    if not common or not doc_ids or len(steps) < 2:
        raise UserError("the runs share no held-out docs, or no categories, or under two steps.")
    changes = {key: _body_change(item, doc_ids, steps) for key, item in cubes.items()}
    first = cubes[id(runs[0])]
    index = [first.doc_ids.index(name) for name in doc_ids]
    tokens = first.at_start("num_tokens")[index][:, :, 0] - 1
    complete = ~np.isnan(tokens).any(axis=1)
    for change in changes.values():
        complete &= ~np.isnan(change).any(axis=(1, 2))
    if not complete.any():
        raise UserError(
            "no doc has body log-probs of all common categories at all common steps in every run: "
            "scores are missing, "
            "or were made by a model without them; `sft-probe sweep` and the live probe give them."
        )
    clusters = renumber(first.clusters[index][complete])
    gains = [
        Gains(
            name=name,
            target=_target(name, group[0], common),
            categories=common,
            steps=steps,
            change=np.stack([changes[id(run)][complete] for run in group]),
            tokens=tokens[complete],
            clusters=clusters,
            order_seeds=_order_seeds(name, group),
        )
        for name, group in rows.items()
    ]
    return gains, doc_ids, int(complete.sum())


def _order_seeds(row: str, group: Sequence[Recording]) -> list[str]:
    """Return the order seeds of the runs of a row; their places where one does not tell its own."""
    seeds = [run.order_seed for run in group]
    if "?" in seeds:
        return [str(place) for place in range(len(seeds))]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"runs of the row {row} are no repeats: their order seeds are {', '.join(seeds)}."
        )
    return seeds


def _body_change(arrays: Cube, doc_ids: list[str], steps: list[int]) -> np.ndarray:
    docs = [arrays.doc_ids.index(name) for name in doc_ids]
    points = [arrays.steps.index(step) for step in steps]
    values = arrays.arrays["body"][docs][:, :, points]
    return np.asarray(values - values[:, :, :1])


def _target(row: str, recording: Recording, categories: list[str]) -> str:
    if (target := recording.target(categories)) is None:
        raise UserError(
            f"the row {row} was trained on {recording.train_category}, which was not probed; "
            f"probed: {', '.join(categories)}."
        )
    return target


def _owners(gains: list[Gains]) -> list[int | None]:
    """Return, for each category, the row of its name, else the first that has it as its target."""
    names, targets = [gain.name for gain in gains], [gain.target for gain in gains]
    return [
        names.index(name) if name in names else targets.index(name) if name in targets else None
        for name in gains[0].categories
    ]


def _columns(name: str, found: Estimate | None, prefix: str = "") -> dict[str, float]:
    """Return the value and interval of an estimate of one point; NaN for `None`."""
    values = (math.nan,) * 3 if found is None else (found.mean[0], found.low[0], found.high[0])
    return dict(zip((name, f"{prefix}low", f"{prefix}high"), map(float, values), strict=True))


def _matrix(gains: list[Gains]) -> list[dict[str, object]]:
    owners = _owners(gains)
    table: list[dict[str, object]] = []
    for gain in gains:
        for category, owner in zip(gain.categories, owners, strict=True):
            cell = gain.cell(category, gain.last)
            relative = (
                None if owner is None else ratio(cell, gains[owner].cell(category, gain.last))
            )
            table.append(
                {
                    "row": gain.name,
                    "target": gain.target,
                    "category": category,
                    **_columns("transfer", delta(cell.value, [(cell, np.ones(1))])),
                    **_columns("efficiency", relative, "efficiency_"),
                    "seeds": len(gain.change),
                }
            )
    return table


def _differences(gains: list[Gains]) -> list[dict[str, object]]:
    pairs = [
        (one, two) for one, two in itertools.combinations(gains, 2) if one.target == two.target
    ]
    by_name = {gain.name: gain for gain in gains}
    if "chosen" in by_name and "chosen" in gains[0].categories:
        pairs += [(gain, by_name["chosen"]) for gain in gains if gain.target != "chosen"]
    found: list[dict[str, object]] = []
    for one, two in pairs:
        cells = [gain.cell(two.target, gain.last) for gain in (one, two)]
        names = {"row": one.name, "other": two.name, "category": two.target}
        found.append({**names, **_columns("difference", difference(cells[0], cells[1]))})
    return found


def _omega(one: Gains, two: Gains) -> dict[str, object] | None:
    """Return omega of rows with other targets; of one target only the noise floor, from disjoint
    halves of its training set."""
    names: dict[str, object] = {"row": one.name, "other": two.name}
    if one.target == two.target:
        if {one.name, two.name} != set(HALVES):
            return None
        return {**names, "omega": noise_floor(one, two), "is_null": True}
    _, curve = omega_curve(one, two)
    gain = matched_gain([float(row.cell(row.target, row.last).value[0]) for row in (one, two)])
    matched = omega_at_matched_gain(one, two, gain)
    return {
        **names,
        "omega": curve.mean[-1],
        "low": curve.low[-1],
        "high": curve.high[-1],
        "is_null": False,
        "matched_gain": gain,
        **_columns("matched_omega", matched, "matched_"),
    }


def _curve(one: Gains, two: Gains) -> pd.DataFrame:
    gain, found = omega_curve(one, two)
    table = {
        "step": one.steps,
        "gain": gain,
        "omega": found.mean,
        "low": found.low,
        "high": found.high,
    }
    return pd.DataFrame(table).assign(row=one.name, other=two.name).iloc[1:]


def _shares(gains: list[Gains]) -> list[dict[str, object]]:
    """Return the headline: the share of chosen's held-out gain that texts without their prompts
    already give."""
    by_name = {gain.name: gain for gain in gains}
    found: list[dict[str, object]] = []
    for name in _HEADLINE:
        if name in by_name and "chosen" in by_name:
            one, whole = (
                gain.cell("chosen", gain.last) for gain in (by_name[name], by_name["chosen"])
            )
            found.append({"row": name, "of": "chosen", **_columns("share", ratio(one, whole))})
    return found


def write_transfer(found: Transfer, folder: Path) -> list[Path]:
    """Write a CSV of each table that is not empty; return the paths."""
    make_dir(folder)
    names = ("matrix", "selectivity", "omega", "curves", "differences", "shares")
    tables = {folder / f"transfer_{name}.csv": getattr(found, name) for name in names}
    written = [path for path, table in tables.items() if len(table)]
    for path in written:
        write_text(path, tables[path].to_csv(index=False))
    return written
