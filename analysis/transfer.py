"""`sft-probe transfer --runs`: what each training set moves in every probe category, from scores of finished runs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.measures import Cube
from sft_probe.analysis.recordings import Recording, load_recording
from sft_probe.analysis.statistics import over_runs
from sft_probe.analysis.transfer_maths import (
    Gains,
    clusters_of,
    difference,
    draws_of,
    efficiency,
    interval,
    omega,
    omega_at_matched_gain,
    omega_curve,
    omega_null,
    selectivity,
    share_of,
)
from sft_probe.analysis.transfer_runs import HALVES
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text

_HEADLINE = ("random", "chosen_no_prompt")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Tidy tables of a set of rows; intervals are 95 %, over prompts, and over seeds where there are several."""

    matrix: pd.DataFrame
    """`row target category transfer low high efficiency seeds seeds_low seeds_high`, the last common step"""
    selectivity: pd.DataFrame
    """`row selectivity`"""
    omega: pd.DataFrame
    """`row other omega low high matched_gain matched_omega matched_low matched_high seeds_low seeds_high is_null`, of
    rows with other targets; `is_null`: the noise floor, of the rows `half_1` and `half_2`"""
    differences: pd.DataFrame
    """`row other category difference low high`, of rows with one target: nats per body token"""
    curves: pd.DataFrame
    """`row other step gain omega low high`"""
    shares: pd.DataFrame
    """`row of share low high seeds_low seeds_high`, of chosen's held-out gain"""
    step: int
    num_docs: int
    num_clusters: int
    notes: list[str]


def transfer(sources: Sequence[str]) -> Transfer:
    """Reads runs, each `RUN` or `ROW=RUN`; runs of one row are its seeds. Rows are named by their training category.

    Raises:
        UserError: under two rows, or runs that share no docs, categories and steps, or rows without body log-probs.
    """
    rows: dict[str, list[Recording]] = {}
    for source in sources:
        name, given, path = source.rpartition("=")
        recording = load_recording(Path(path))
        if recording.means is not None:
            raise UserError(f"{path} holds means only; transfer needs score rows of docs.")
        rows.setdefault(name if given else str(recording.train_category), []).append(recording)
    if len(rows) < 2:
        raise UserError(f"transfer compares at least two rows; there is only {', '.join(rows)}. Name them ROW=RUN.")
    models = {recording.model for group in rows.values() for recording in group}
    if len(models) > 1:
        raise UserError(f"the runs start from several models, {', '.join(sorted(models))}; compare those of one.")
    gains, doc_ids, complete = _gains(rows)
    draws = draws_of(len(gains[0].tokens))
    pairs = list(itertools.combinations(gains, 2))
    curves = [_curve(one, two, draws) for one, two in pairs if one.target != two.target]
    notes = [f"{len(doc_ids) - complete} docs without all scores are left out"] if complete < len(doc_ids) else []
    if min(len(group) for group in rows.values()) < 3:
        notes.append("under 3 seeds per row: intervals hold for other prompts and say nothing of training noise")
    return Transfer(
        matrix=_matrix(gains, draws),
        selectivity=_selectivity(gains),
        omega=pd.DataFrame([row for one, two in pairs if (row := _omega(one, two, draws))]),
        differences=pd.DataFrame([_difference(one, two, draws) for one, two in pairs if one.target == two.target]),
        curves=pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(),
        shares=pd.DataFrame(_shares(gains, draws)),
        step=gains[0].steps[-1],
        num_docs=complete,
        num_clusters=len(gains[0].tokens),
        notes=notes,
    )


def _gains(rows: dict[str, list[Recording]]) -> tuple[list[Gains], list[str], int]:
    """Gains of all rows on the docs that every run scored at every common step; how many docs and how many complete."""
    runs = [recording for group in rows.values() for recording in group]
    if any("heldout" not in recording.splits for recording in runs):
        raise UserError("transfer is measured on held-out prompts, and a run has no scores of them.")
    common = [name for name in runs[0].categories("heldout") if all(name in run.categories("heldout") for run in runs)]
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
        raise UserError("no doc has body log-probs in all runs; they come from `sft-probe sweep` or the live probe.")
    clusters = np.unique(first.clusters[index][complete], return_inverse=True)[1]
    gains = []
    for name, group in rows.items():
        sums = np.stack([clusters_of(changes[id(run)][complete], clusters) for run in group])
        gains.append(
            Gains(
                name=name, target=_target(name, group[0], common), categories=common, steps=steps, change=sums,
                tokens=clusters_of(tokens[complete], clusters), order_seeds=_order_seeds(name, group),
            )
        )  # fmt: skip
    return gains, doc_ids, int(complete.sum())


def _order_seeds(row: str, group: Sequence[Recording]) -> list[str]:
    """Of the runs of a row; their places where one does not tell its own."""
    seeds = [run.order_seed for run in group]
    if "?" in seeds:
        return [str(place) for place in range(len(seeds))]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"runs of the row {row} are no repeats: their order seeds are {', '.join(seeds)}.")
    return seeds


def _body_change(arrays: Cube, doc_ids: list[str], steps: list[int]) -> np.ndarray:
    docs = [arrays.doc_ids.index(name) for name in doc_ids]
    points = [arrays.steps.index(step) for step in steps]
    values = arrays.arrays["body"][docs][:, :, points]
    return np.asarray(values - values[:, :, :1])


def _target(row: str, recording: Recording, categories: list[str]) -> str:
    if (target := recording.target(categories)) is None:
        raise UserError(
            f"the row {row} was trained on {recording.train_category}, which was not probed; probed: "
            f"{', '.join(categories)}."
        )
    return target


def _owners(gains: list[Gains]) -> list[int | None]:
    """For each category, the row of its name, else the first that has it as its target."""
    names, targets = [gain.name for gain in gains], [gain.target for gain in gains]
    return [
        names.index(name) if name in names else targets.index(name) if name in targets else None
        for name in gains[0].categories
    ]


def _matrix(gains: list[Gains], draws: np.ndarray) -> pd.DataFrame:
    points = np.stack([gain.transfer()[0, :, :, -1].mean(axis=0) for gain in gains])  # [rows, categories]
    relative = efficiency(points, _owners(gains))
    table = []
    for number, gain in enumerate(gains):
        found = interval(points[number], gain.transfer(draws).mean(axis=1)[:, :, -1])
        _, _, low, high = over_runs(gain.transfer()[0, :, :, -1])
        for column, category in enumerate(gain.categories):
            table.append(
                {
                    "row": gain.name, "target": gain.target, "category": category,
                    "transfer": found.value[column], "low": found.low[column], "high": found.high[column],
                    "efficiency": relative[number, column], "seeds": len(gain.change),
                    "seeds_low": low[column], "seeds_high": high[column],
                }
            )  # fmt: skip
    return pd.DataFrame(table)


def _selectivity(gains: list[Gains]) -> pd.DataFrame:
    points = np.stack([gain.transfer()[0, :, :, -1].mean(axis=0) for gain in gains])
    found = selectivity(points, [gain.column(gain.target) for gain in gains])
    return pd.DataFrame({"row": [gain.name for gain in gains], "selectivity": found})


def _difference(one: Gains, two: Gains, draws: np.ndarray) -> dict[str, object]:
    found = difference(one, two, draws)
    return {
        "row": one.name, "other": two.name, "category": one.target, "difference": float(found.value),
        "low": float(found.low), "high": float(found.high),
    }  # fmt: skip


def _omega(one: Gains, two: Gains, draws: np.ndarray) -> dict[str, object] | None:
    """Of rows with other targets; of one target only the noise floor, from disjoint halves of its training set."""
    names: dict[str, object] = {"row": one.name, "other": two.name}
    if one.target == two.target:
        if {one.name, two.name} != set(HALVES):
            return None
        null = omega_null(one, two, draws)
        return {**names, "omega": float(null.value), "low": float(null.low), "high": float(null.high), "is_null": True}
    _, curve = omega_curve(one, two, draws)
    on_target = [gain.transfer()[0].mean(axis=0)[gain.column(gain.target)].max() for gain in (one, two)]
    matched_gain = float(min(on_target))
    matched = omega_at_matched_gain(one, two, draws, matched_gain)
    _, _, low, high = over_runs(_omega_of_seeds(one, two)[:, None])
    if math.isnan(curve.value[-1]):
        low, high = np.full(1, math.nan), np.full(1, math.nan)
    return {
        **names, "omega": curve.value[-1], "low": curve.low[-1], "high": curve.high[-1], "is_null": False,
        "matched_gain": matched_gain, "matched_omega": float(matched.value), "matched_low": float(matched.low),
        "matched_high": float(matched.high), "seeds_low": low[0], "seeds_high": high[0],
    }  # fmt: skip


def _omega_of_seeds(one: Gains, two: Gains) -> np.ndarray:
    """Omega at the last step of each order seed that both rows have."""
    of_one, of_two = _common_seeds(one, two)
    i, j = one.column(one.target), one.column(two.target)
    return omega(of_one[:, i], of_one[:, j], of_two[:, i], of_two[:, j])


def _common_seeds(one: Gains, two: Gains) -> tuple[np.ndarray, np.ndarray]:
    """T of both rows at the last step, [seeds, categories], by order seeds that both have."""
    common = [seed for seed in one.order_seeds if seed in two.order_seeds]
    if not common:
        nothing = np.full((1, len(one.categories)), np.nan)
        return nothing, nothing
    of_one, of_two = (
        gain.transfer()[0, [gain.order_seeds.index(seed) for seed in common], :, -1] for gain in (one, two)
    )
    return of_one, of_two


def _curve(one: Gains, two: Gains, draws: np.ndarray) -> pd.DataFrame:
    gain, found = omega_curve(one, two, draws)
    table = {"step": one.steps, "gain": gain, "omega": found.value, "low": found.low, "high": found.high}
    return pd.DataFrame(table).assign(row=one.name, other=two.name).iloc[1:]


def _shares(gains: list[Gains], draws: np.ndarray) -> list[dict[str, object]]:
    """The headline: the share of chosen's held-out gain that texts without their prompts already give."""
    by_name = {gain.name: gain for gain in gains}
    found: list[dict[str, object]] = []
    for name in _HEADLINE:
        if name in by_name and "chosen" in by_name:
            one, whole = by_name[name], by_name["chosen"]
            share = share_of(one, whole, "chosen", draws)
            of_one, of_whole = _common_seeds(one, whole)
            ratios = (of_one / of_whole)[:, [whole.column("chosen")]]
            _, _, low, high = over_runs(ratios if math.isfinite(share.value) else np.full((1, 1), math.nan))
            found.append(
                {
                    "row": name, "of": "chosen", "share": float(share.value), "low": float(share.low),
                    "high": float(share.high), "seeds_low": low[0], "seeds_high": high[0],
                }
            )  # fmt: skip
    return found


def write_transfer(found: Transfer, folder: Path) -> list[Path]:
    """Writes a CSV of each table that is not empty; returns the paths."""
    make_dir(folder)
    names = ("matrix", "selectivity", "omega", "curves", "differences", "shares")
    tables = {folder / f"transfer_{name}.csv": getattr(found, name) for name in names}
    written = [path for path, table in tables.items() if len(table)]
    for path in written:
        write_text(path, tables[path].to_csv(index=False))
    return written
