"""Contrasts between categories: margins, the part of a log-prob that the prompt gives (PMI), slopes
with length."""

import math

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.intervals import Estimate, estimate, pair_mean, slope
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import Recording

MIN_PAIR_CLUSTERS = 20
"""Effective clusters below which an interval of PMI carries a warning: each cluster is in two
places."""


def contrast_table(recording: Recording, measure: str = "logprob") -> pd.DataFrame:
    """Return rows `run split contrast category step value stderr low high num_docs
    effective_clusters`.

    Intervals are 95 %, over prompts.

    `margin`: log-prob of the training category (else `chosen`) less that of `category`, in nats, at
    that step. `margin_change`: the same of changes from the first step. `pmi`: mean of log p(y_n |
    x_n) - log p(y_n | x_m) in nats, m the doc whose `random` response is y_n; only texts scored
    under both prompts count, clustered by both docs. `pmi_change`: the same of changes, the part of
    chosen's change that its own prompt has over another's. `slope`: change from the first step in
    nats per token of the response.
    """
    tables = []
    for split in recording.splits if recording.means is None else ():
        arrays = recording.cube(split)
        parts = [
            *_margins(arrays, recording.target(arrays.categories) or "chosen", measure),
            *_slopes(arrays, measure),
        ]
        if recording.probe_set is not None:
            parts += _pmi(
                arrays, {doc.doc_id: doc.random_doc_id for doc in recording.probe_set.docs}, measure
            )
        tables += [part.assign(run=recording.name, split=split) for part in parts]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    return table[["run", "split", *(name for name in table if name not in {"run", "split"})]]


def _rows(contrast: str, category: str, steps: list[int], found: Estimate) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "contrast": contrast,
            "category": category,
            "step": steps,
            "value": found.mean,
            "stderr": found.stderr,
            "low": found.low,
            "high": found.high,
            "num_docs": found.num_docs,
            "effective_clusters": found.effective_clusters,
        }
    )


def _margins(arrays: Cube, reference: str, measure: str) -> list[pd.DataFrame]:
    if reference not in arrays.categories:
        return []
    own = arrays.categories.index(reference)
    tables = []
    for name, values in (
        ("margin", arrays.arrays[measure]),
        ("margin_change", arrays.change(measure)),
    ):
        for number, category in enumerate(arrays.categories):
            if number != own:
                found = estimate(
                    values[:, own] - values[:, number], arrays.shared_clusters(own, number)
                )
                tables.append(_rows(name, category, arrays.steps, found))
    return tables


def _slopes(arrays: Cube, measure: str) -> list[pd.DataFrame]:
    tables = []
    for number, category in enumerate(arrays.categories):
        tokens = arrays.at_start("num_tokens")[:, number, 0]
        found = slope(tokens, arrays.change(measure)[:, number, 1:], arrays.clusters[:, number])
        tables.append(_rows("slope", category, arrays.steps[1:], found))
    return tables


def _pmi(arrays: Cube, random_doc_ids: dict[str, str | None], measure: str) -> list[pd.DataFrame]:
    if not {"chosen", "random"} <= set(arrays.categories):
        return []
    number_of = {doc_id: number for number, doc_id in enumerate(arrays.doc_ids)}
    pairs = [
        (number_of[owner], number)
        for doc_id, number in number_of.items()
        if (owner := random_doc_ids.get(doc_id)) in number_of and owner is not None
    ]
    if len(pairs) < 2:
        return []
    owner_of, borrower_of = np.array(pairs).T
    chosen, random = arrays.categories.index("chosen"), arrays.categories.index("random")
    values = arrays.arrays[measure]
    difference = values[owner_of, chosen] - values[borrower_of, random]
    complete = ~np.isnan(difference).any(axis=1)
    if complete.sum() < 2:
        return []
    clusters = arrays.shared_clusters(chosen, random)
    owners, borrowers = clusters[owner_of[complete]], clusters[borrower_of[complete]]
    levels = difference[complete]
    return [
        _rows(name, "chosen", arrays.steps, pair_mean(own, owners, borrowers))
        for name, own in (("pmi", levels), ("pmi_change", levels - levels[:, :1]))
    ]


def pmi_sentence(contrasts: pd.DataFrame, run: str, split: str) -> str | None:
    """Return what the last change of chosen's PMI is, with its interval; `None` where it was not
    measured."""
    if contrasts.empty:
        return None
    names = {"run": run, "split": split, "contrast": "pmi_change"}
    rows = contrasts[(contrasts[list(names)] == pd.Series(names)).all(axis=1)]
    if rows.empty or math.isnan(rows["low"].iloc[-1]):
        return None
    last = rows.iloc[-1]
    few = last["effective_clusters"] < MIN_PAIR_CLUSTERS
    warning = (
        f", in {last['effective_clusters']:.0f} clusters: the interval may cover less than 95 %"
        if few
        else ""
    )
    return (
        f"of chosen's change, {last['value']:+z.1f} [{last['low']:+z.1f}, {last['high']:+z.1f}] "
        "nats hang on its own "
        f"prompt (change of PMI over {last['num_docs']} texts that were also scored under another "
        f"prompt{warning})"
    )
