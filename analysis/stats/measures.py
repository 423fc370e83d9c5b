"""What is measured of a response: its log-prob and parts of it, as arrays over docs, categories and
steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.clusters import Ints, cluster_ids, count_text
from sft_probe.analysis.stats.intervals import Floats
from sft_probe.scores import TOKEN_COLUMNS

POSITIONS = {
    "tokens_1": 1,
    "tokens_2_4": 4,
    "tokens_5_16": 16,
    "tokens_17_64": 64,
    "tokens_65_up": None,
}
"""Part of a response to its last token, counted from 1."""
PARTS = ("first", "body", "eos")
MEASURES = ("logprob", "logprob_with_eos", *PARTS, *POSITIONS)
"""Columns of nats: all but `eos` and `logprob_with_eos` without the terminator."""


_NUMBERS = ("logprob", "logprob_first", "logprob_eos", "num_tokens", "num_bytes")


def add_measures(rows: pa.Table) -> pd.DataFrame:
    """Return score rows as a frame without the columns of tokens, with one for each of
    `MEASURES`.

    `first` is `logprob_first`, `body` the rest of `logprob`; parts by position are null without
    token log-probs. `logprob_with_eos` is the sum of both, or as a run that was scored elsewhere
    gives it.
    """
    frame: pd.DataFrame = rows.drop_columns(["token_logprobs", *TOKEN_COLUMNS]).to_pandas()
    for name in (*_NUMBERS, "logprob_with_eos"):
        frame[name] = frame[name].astype("float64")
    frame["first"] = frame["logprob_first"]
    frame["body"] = frame["logprob"] - frame["logprob_first"]
    frame["eos"] = frame["logprob_eos"]
    whole = frame["logprob"] + frame["logprob_eos"]
    frame["logprob_with_eos"] = whole.fillna(frame["logprob_with_eos"])
    for name, sums in _sums_by_position(rows["token_logprobs"].combine_chunks()).items():
        frame[name] = sums
    return frame


def _sums_by_position(tokens: pa.ListArray) -> dict[str, Floats]:
    """Return [rows] for each part; NaN where a row has no token log-probs."""
    lengths = tokens.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    totals = np.concatenate(
        [[0.0], np.cumsum(tokens.flatten().to_numpy(zero_copy_only=False).astype(np.float64))]
    )
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    missing = (lengths == 0).nonzero()[0]
    sums, begin = {}, starts
    for name, last in POSITIONS.items():
        end = starts + (lengths if last is None else np.minimum(lengths, last))
        sums[name] = totals[end] - totals[begin]
        sums[name][missing] = np.nan
        begin = end
    return sums


@dataclass(frozen=True, kw_only=True)
class Cube:
    """One split of one run as arrays `[docs, categories, steps]`."""

    doc_ids: list[str]
    categories: list[str]
    steps: list[int]
    clusters: Ints
    """[docs, categories], numbered for each category apart"""
    arrays: dict[str, Floats]
    """`MEASURES`, `num_tokens` and `num_bytes`; NaN where there is no row."""

    def shared_clusters(self, *categories: int) -> Ints:
        """Return [docs], the clusters of a contrast: docs that share one in any of these
        categories."""
        return cluster_ids(*self.clusters[:, categories].T)

    @property
    def cluster_text(self) -> str:
        """How many clusters the categories have, as `24 clusters` or `20 to 24 clusters`."""
        return count_text(self.clusters.max(axis=0) + 1)

    def change(self, measure: str) -> Floats:
        """Return [docs, categories, steps], the paired change from the first step, in nats."""
        values = self.arrays[measure]
        return values - values[:, :, :1]

    def at_start(self, name: str) -> Floats:
        """Return [docs, categories, steps]: the first step's `num_tokens` or `num_bytes`, at every
        step."""
        values = self.arrays[name]
        return np.broadcast_to(values[:, :, :1], values.shape)


def cube(
    rows: pd.DataFrame, categories: Sequence[str], texts: dict[str, dict[str, str]] | None = None
) -> Cube:
    """Return arrays from the rows of one run, source and split.

    Args:
        rows: from `add_measures`.
        categories: their order.
        texts: doc id to category to response; docs that share a category's response share its
            cluster.
    """
    docs = pd.Categorical(rows["doc_id"])
    doc_ids = [str(name) for name in docs.categories]
    steps = sorted(int(step) for step in rows["step"].unique())
    index = (
        docs.codes,
        pd.Categorical(rows["category"], categories=list(categories)).codes,
        np.searchsorted(steps, rows["step"].to_numpy()),
    )
    arrays = {}
    for name in (*MEASURES, "num_tokens", "num_bytes"):
        arrays[name] = np.full((len(doc_ids), len(categories), len(steps)), np.nan)
        arrays[name][index] = rows[name].to_numpy(dtype=np.float64)
    conversations = (
        rows.drop_duplicates("doc_id").set_index("doc_id")["conversation_id"].reindex(doc_ids)
    )
    conversation_of: list[object] = [None if pd.isna(name) else name for name in conversations]
    own_texts = [
        [(texts or {}).get(doc_id, {}).get(category) for doc_id in doc_ids]
        for category in categories
    ]
    clusters = np.stack([cluster_ids(conversation_of, own) for own in own_texts], axis=1)
    return Cube(
        doc_ids=doc_ids, categories=list(categories), steps=steps, clusters=clusters, arrays=arrays
    )
