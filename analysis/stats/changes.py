"""Tidy tables of levels and paired changes from the first step, of one run and over runs."""

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import renumber
from sft_probe.analysis.stats.intervals import (
    Estimate,
    Floats,
    estimate,
    over_runs,
    over_runs_and_docs,
    share,
    weighted_mean,
)
from sft_probe.analysis.stats.measures import MEASURES, PARTS, Cube
from sft_probe.analysis.stats.runs import Recording
from sft_probe.errors import UserError

log = logging.getLogger(__name__)

PER_RESPONSE, PER_TOKEN, PER_BYTE = "nats/response", "nats/body token", "nats/byte"


HEADLINES = ("logprob", "logprob_with_eos")
"""Measures of which a verdict can speak: for them the change from each step to the last has a band
too."""


COLUMNS = [
    *("run", "split", "step_unit", "category", "step", "examples_seen", "epoch"),
    *("measure", "unit", "level", "change", "stderr", "low", "high", "band_low", "band_high"),
    *("rest_low", "rest_high", "share", "share_low", "share_high"),
    *("num_docs", "num_clusters", "effective_clusters", "largest_cluster", "p_value"),
]
"""Of `change_table`."""


def change_table(recording: Recording, categories: Sequence[str] | None = None) -> pd.DataFrame:
    """Return every change of one run: a row per split, category, step, measure and unit.

    Columns: `run split step_unit category step examples_seen epoch measure unit level change stderr
    low high band_low band_high rest_low rest_high share share_low share_high num_docs num_clusters
    effective_clusters largest_cluster p_value`. `change` is the mean
    paired change from the first step; `low` to `high` its 95 % interval over prompts, `band_low` to
    `band_high` a 95 % band over all categories and steps of that measure. `rest_low` to `rest_high`
    is such a band of the change from this step to the last, for `HEADLINES`. `share` with its
    interval is that of a part in the change of first token, body and terminator, null where the
    interval of that whole holds 0. `num_docs` counts the docs that both steps have, `num_clusters`
    their clusters. `nats/body token` and `nats/byte` are ratios of sums.

    Raises:
        UserError: there is one step only, or no category is left.
    """
    if recording.means is not None:
        return _table_of_means(recording, categories)
    tables = []
    for split in recording.splits:
        names = chosen_categories(recording, split, categories)
        if names:
            tables.append(_table_of_split(recording, split, recording.cube(split, names)))
    if not tables:
        raise UserError(
            f"{recording.path} has no {', '.join(categories or ())}; it has {_known(recording)}."
        )
    return pd.concat(tables, ignore_index=True)


def chosen_categories(
    recording: Recording, split: str, categories: Sequence[str] | None
) -> list[str]:
    """Return the categories of a split that were asked for, in the order of the probe set."""
    return [
        name for name in recording.categories(split) if categories is None or name in categories
    ]


def _known(recording: Recording) -> str:
    return ", ".join(recording.categories(recording.splits[0]))


def _one_step(recording: Recording, step: int) -> UserError:
    return UserError(
        f"{recording.path} has scores of one step only ({step}), so nothing can have changed."
    )


class Measure(NamedTuple):
    """One number of every response and how it is averaged; arrays are [docs, categories, steps]."""

    name: str
    unit: str
    values: Floats
    denominators: Floats | None = None
    """The mean is then sum of values / sum of these."""


def _table_of_split(recording: Recording, split: str, arrays: Cube) -> pd.DataFrame:
    """Return the changes of the log-prob and its parts, with `rest_*` and `share*`."""
    found = arrays.arrays
    measures = [
        *(Measure(name, PER_RESPONSE, found[name]) for name in MEASURES),
        Measure("body", PER_TOKEN, found["body"], arrays.at_start("num_tokens") - 1),
        Measure("logprob", PER_BYTE, found["logprob"], arrays.at_start("num_bytes")),
    ]
    tables = []
    for measure in measures:
        # a plain `hf` model gives neither parts nor the terminator
        if not np.isnan(measure.values).all():
            table = table_of_measure(recording, split, arrays, measure)
            more = np.full((2, len(table)), np.nan)
            if measure.name in HEADLINES and measure.unit == PER_RESPONSE:
                left = measure.values[:, :, -1:] - measure.values
                rest = estimate(left, arrays.clusters, band=True)
                more = np.stack([rest.band_low.reshape(-1), rest.band_high.reshape(-1)])
            is_part = measure.name in PARTS and measure.unit == PER_RESPONSE
            nothing = dict.fromkeys(("share", "share_low", "share_high"), np.nan)
            shares = _shares(arrays, measure.name) if is_part else nothing
            tables.append(table.assign(rest_low=more[0], rest_high=more[1], **shares))
    return pd.concat(tables, ignore_index=True)


def table_of_measure(
    recording: Recording, split: str, arrays: Cube, measure: Measure
) -> pd.DataFrame:
    """Return a row per category and step: level, paired change from the first step, interval and
    band.

    Raises:
        UserError: there is one step only.
    """
    if len(arrays.steps) < 2:
        raise _one_step(recording, arrays.steps[0])
    seen = recording.rows.groupby("step")[["examples_seen", "epoch"]].first().reindex(arrays.steps)
    places = pd.DataFrame(
        itertools.product(arrays.categories, arrays.steps), columns=["category", "step"]
    ).join(seen, on="step")
    values = measure.values
    levels = weighted_mean(values, measure.denominators)
    found = estimate(
        values - values[:, :, :1], arrays.clusters, denominators=measure.denominators, band=True
    )
    table = _rows(places, levels, found).assign(measure=measure.name, unit=measure.unit)
    table.insert(0, "run", recording.name)
    table.insert(1, "split", split)
    table.insert(2, "step_unit", recording.step_unit)
    return table


def _rows(places: pd.DataFrame, levels: Floats, found: Estimate) -> pd.DataFrame:
    columns = {
        "level": levels,
        "change": found.mean,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        "band_low": found.band_low,
        "band_high": found.band_high,
        "num_docs": found.num_docs,
        "num_clusters": found.num_clusters,
        "effective_clusters": found.effective_clusters,
        "largest_cluster": found.largest_cluster,
        "p_value": found.p_values,
    }
    return places.assign(**{name: values.reshape(-1) for name, values in columns.items()})


def _shares(arrays: Cube, part: str) -> dict[str, Floats]:
    """Return the share of a part in the change of all parts with its interval, by point."""
    whole = arrays.change("logprob_with_eos")
    found = share(arrays.change(part), whole, arrays.clusters)
    known = estimate(whole, arrays.clusters).has_sign
    columns = {"share": found.mean, "share_low": found.low, "share_high": found.high}
    return {name: np.where(known, values, np.nan).reshape(-1) for name, values in columns.items()}


def _table_of_means(recording: Recording, categories: Sequence[str] | None) -> pd.DataFrame:
    assert recording.means is not None  # noqa: S101 - the caller's branch
    means = recording.means
    if means["step"].nunique() < 2:
        raise _one_step(recording, int(means["step"].iloc[0]))
    if categories is not None:
        means = means[means["category"].isin(categories)]
        if means.empty:
            raise UserError(
                f"{recording.path} has no {', '.join(categories)}; it has {_known(recording)}."
            )
    means = means.sort_values("step", kind="stable")
    start = means.groupby(["split", "category"])["value"].transform("first")
    unknown = (
        "stderr",
        "low",
        "high",
        "band_low",
        "band_high",
        "rest_low",
        "rest_high",
        "effective_clusters",
        "largest_cluster",
        "p_value",
        "share",
        "share_low",
        "share_high",
    )
    table = means.rename(columns={"value": "level"}).assign(
        run=recording.name,
        step_unit=recording.step_unit,
        change=means["value"] - start,
        measure="logprob_with_eos",
        unit=PER_RESPONSE,
        examples_seen=means["step"] if recording.step_unit == "training examples" else np.nan,
        epoch=np.nan,
        num_docs=0,
        num_clusters=0,
        **dict.fromkeys(unknown, np.nan),
    )
    order = {name: number for number, name in enumerate(recording.categories(recording.splits[0]))}
    return table.sort_values(
        ["split", "category", "step"], key=lambda c: c.map(order) if c.name == "category" else c
    )


def groups_of_runs(recordings: Sequence[Recording]) -> list[list[Recording]]:
    """Run that differ in their order seeds alone, two or more in each group."""
    groups: dict[str, list[Recording]] = {}
    for recording in recordings:
        if recording.means is None and recording.train_category:
            groups.setdefault(recording.setting, []).append(recording)
    found = []
    for group in groups.values():
        seeds = {recording.order_seed for recording in group}
        if len(seeds) == len(group) > 1:
            found.append(group)
        elif len(group) > 1:
            names = ", ".join(recording.name for recording in group)
            log.warning(
                "not averaged, since they have the same order seed and so are no repeats: %s", names
            )
    return found


def table_over_runs(
    group: Sequence[Recording], measure: str, categories: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return changes averaged over runs, each point on the docs that all runs have there; empty
    where there are none.

    Columns: `split category step change low high both_low both_high num_runs num_docs
    effective_clusters largest_cluster`. `low` to `high` is the t-interval on run means (these
    prompts, other runs), `both_low` to `both_high` that of `over_runs_and_docs` (other prompts
    too).
    """
    tables = []
    for split in group[0].splits:
        if all(split in recording.splits for recording in group):
            chosen = [chosen_categories(recording, split, categories) for recording in group]
            names = [name for name in chosen[0] if all(name in other for other in chosen)]
            if names:
                tables.append(
                    _split_over_runs([item.cube(split, names) for item in group], measure).assign(
                        split=split
                    )
                )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _split_over_runs(cubes: list[Cube], measure: str) -> pd.DataFrame:
    first = cubes[0]
    doc_ids = sorted(set.intersection(*(set(item.doc_ids) for item in cubes)))
    steps = sorted(set.intersection(*(set(item.steps) for item in cubes)))
    if not doc_ids or len(steps) < 2 or any(item.steps[0] != steps[0] for item in cubes):
        return pd.DataFrame()
    changes = np.stack(
        [_aligned(item, measure, doc_ids, steps) for item in cubes]
    )  # [runs, docs, categories, steps]
    changes = np.where(np.isnan(changes).any(axis=0), np.nan, changes)
    clusters = renumber(first.clusters[[first.doc_ids.index(name) for name in doc_ids]])
    mean, _, low, high = over_runs(weighted_mean(np.moveaxis(changes, 1, 0)))
    both = over_runs_and_docs(changes, clusters)
    table = pd.DataFrame(itertools.product(first.categories, steps), columns=["category", "step"])
    columns = {
        "change": mean,
        "low": low,
        "high": high,
        "both_low": both.low,
        "both_high": both.high,
        "num_docs": both.num_docs,
        "effective_clusters": both.effective_clusters,
        "largest_cluster": both.largest_cluster,
    }
    flat = {name: values.reshape(-1) for name, values in columns.items()}
    return table.assign(**flat, num_runs=len(cubes))


def _aligned(arrays: Cube, measure: str, doc_ids: list[str], steps: list[int]) -> Floats:
    docs = [arrays.doc_ids.index(name) for name in doc_ids]
    points = [arrays.steps.index(step) for step in steps]
    return np.asarray(arrays.change(measure)[docs][:, :, points])
