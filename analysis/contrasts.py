"""Contrasts between categories: margins, the part of a log-prob that the prompt gives (PMI), slopes with length."""

import numpy as np
import pandas as pd

from sft_probe.analysis.measures import Cube
from sft_probe.analysis.recordings import Recording
from sft_probe.analysis.statistics import Estimate, estimate, pair_mean, slope


def contrast_table(recording: Recording, measure: str = "logprob") -> pd.DataFrame:
    """Rows `run split contrast category step value stderr low high num_docs`, with 95 % intervals over prompts.

    `margin`: log-prob of the training category (else `chosen`) less that of `category`, in nats, at that step.
    `margin_change`: the same of changes from the first step. `pmi`: mean of log p(y_n | x_n) - log p(y_n | x_m) in
    nats, m the doc whose `random` response is y_n; only texts scored under both prompts count, clustered
    by both docs. `slope`: change from the first step in nats per token of the response.
    """
    tables = []
    for split in recording.splits if recording.means is None else ():
        arrays = recording.cube(split)
        parts = [*_margins(arrays, recording.target(arrays.categories) or "chosen", measure), *_slopes(arrays, measure)]
        if recording.probe_set is not None:
            parts += _pmi(arrays, {doc.doc_id: doc.random_doc_id for doc in recording.probe_set.docs}, measure)
        tables += [part.assign(run=recording.name, split=split) for part in parts]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    return table[["run", "split", "contrast", "category", "step", "value", "stderr", "low", "high", "num_docs"]]


def _rows(contrast: str, category: str, steps: list[int], found: Estimate) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "contrast": contrast, "category": category, "step": steps, "value": found.mean, "stderr": found.stderr,
            "low": found.low, "high": found.high, "num_docs": found.num_docs,
        }
    )  # fmt: skip


def _margins(arrays: Cube, reference: str, measure: str) -> list[pd.DataFrame]:
    if reference not in arrays.categories:
        return []
    own = arrays.categories.index(reference)
    tables = []
    for name, values in (("margin", arrays.arrays[measure]), ("margin_change", arrays.change(measure))):
        for number, category in enumerate(arrays.categories):
            if number != own:
                found = estimate(values[:, own] - values[:, number], arrays.clusters, band=False)
                tables.append(_rows(name, category, arrays.steps, found))
    return tables


def _slopes(arrays: Cube, measure: str) -> list[pd.DataFrame]:
    tables = []
    for number, category in enumerate(arrays.categories):
        tokens = arrays.at_start("num_tokens")[:, number, 0]
        found = slope(tokens, arrays.change(measure)[:, number, 1:], arrays.clusters)
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
    values = arrays.arrays[measure]
    own = values[owner_of, arrays.categories.index("chosen")]
    borrowed = values[borrower_of, arrays.categories.index("random")]
    difference = own - borrowed
    complete = ~np.isnan(difference).any(axis=1)
    if complete.sum() < 2:
        return []
    owners, borrowers = arrays.clusters[owner_of[complete]], arrays.clusters[borrower_of[complete]]
    found = pair_mean(difference[complete], owners, borrowers)
    return [_rows("pmi", "chosen", arrays.steps, found)]
