"""What is measured of a response: its log-prob and parts of it, as arrays over docs, categories and
steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.clusters import Ints, cluster_ids, count_text
from sft_probe.analysis.stats.intervals import Floats
from sft_probe.scores import DISTANCE_COLUMNS, TOKEN_COLUMNS

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
DISTRIBUTION = ("argmax", "entropy", "energy", "p_e", "norm")
"""Sums over the tokens of a response, of what the model's distributions say beside its log-prob:
log-prob of the most likely token, entropy, 1 - p of the token, ||p - one-hot||, and ||p||."""


DISTANCE = ("kl_forward", "kl_reverse", "marginal", "shifted")
"""Sums over the tokens of a response, of how far the model is from a reference: KL(reference ||
model), KL(model || reference) in nats, and places whose most likely token has rank 2 or 3, or above
3, under the reference (Lin et al., arXiv 2312.01552)."""


def at_position(measure: str, position: str | None) -> str:
    """Return the column of a sum over the tokens of one of `POSITIONS`; `None` is all tokens."""
    return measure if position is None else f"{measure}_{position}"


_NUMBERS = ("logprob", "logprob_first", "logprob_eos", "num_tokens", "num_bytes")


def add_measures(rows: pa.Table) -> pd.DataFrame:
    """Return score rows as a frame without the columns of tokens, with one for each of `MEASURES`
    and, where any row has them, of `DISTRIBUTION` and `DISTANCE`, whole and by position (`entropy`,
    `entropy_tokens_2_4` and so on).

    `first` is `logprob_first`, `body` the rest of `logprob`; parts by position are null without
    token log-probs.
    """
    lists = ["token_logprobs", *TOKEN_COLUMNS, *DISTANCE_COLUMNS]
    frame: pd.DataFrame = rows.drop_columns(lists).to_pandas()
    for name in (*_NUMBERS, "logprob_with_eos"):
        frame[name] = frame[name].astype("float64")
    frame["first"] = frame["logprob_first"]
    frame["body"] = frame["logprob"] - frame["logprob_first"]
    frame["eos"] = frame["logprob_eos"]
    whole = frame["logprob"] + frame["logprob_eos"]
    frame["logprob_with_eos"] = whole.fillna(frame["logprob_with_eos"])
    lengths = _lengths(rows["token_logprobs"])
    sums = _sums_by_position(_flat(rows["token_logprobs"]), lengths)
    columns = {name: sums[name] for name in POSITIONS}
    for column, of_tokens in (
        (TOKEN_COLUMNS[0], _distribution_of_tokens),
        (DISTANCE_COLUMNS[0], _distance_of_tokens),
    ):
        is_there = _lengths(rows[column]) == lengths
        values = of_tokens(rows.filter(pa.array(is_there))) if is_there.any() else {}
        for name, summands in values.items():
            for part, own in _sums_by_position(summands, lengths[is_there]).items():
                columns[at_position(name, part)] = np.full(len(rows), np.nan)
                columns[at_position(name, part)][is_there] = own
    return frame.assign(**columns)


def _distribution_of_tokens(rows: pa.Table) -> dict[str, Floats]:
    """Return the summands of `DISTRIBUTION`, [tokens of all rows].

    `p_e` is the distance between the model's distribution and the token's own (Ren & Sutherland,
    arXiv 2407.10490): ||p - e||^2 = ||p||^2 - 2 p_y + 1.
    """
    logprobs, argmax, entropy, norm = (
        _flat(rows[name])
        for name in ("token_logprobs", "token_max_logprobs", "token_entropies", "token_norms")
    )
    p = np.exp(logprobs)
    p_e = np.sqrt(np.maximum(norm**2 - 2 * p + 1, 0.0))  # 0 but for rounding where p is 1
    return {"argmax": argmax, "entropy": entropy, "energy": 1 - p, "p_e": p_e, "norm": norm}


def _distance_of_tokens(rows: pa.Table) -> dict[str, Floats]:
    """Return the summands of `DISTANCE`, [tokens of all rows]."""
    forward, reverse, ranks = (_flat(rows[name]) for name in DISTANCE_COLUMNS)
    marginal, shifted = ((ranks > 1) & (ranks <= 3), ranks > 3)
    return {
        "kl_forward": forward,
        "kl_reverse": reverse,
        "marginal": marginal.astype(np.float64),
        "shifted": shifted.astype(np.float64),
    }


def _flat(lists: pa.ChunkedArray) -> Floats:
    values = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float64)


def _lengths(lists: pa.ChunkedArray) -> Ints:
    lengths = lists.combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.asarray(lengths, dtype=np.int64)


def _sums_by_position(values: Floats, lengths: Ints) -> dict[str | None, Floats]:
    """Return [rows], the sum over all tokens (`None`) and over each of `POSITIONS`; NaN where a row
    has no tokens.

    Args:
        values: of the tokens of all rows.
        lengths: [rows]
    """
    totals = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.cumsum(lengths) - lengths
    ends = {
        name: starts + (lengths if last is None else np.minimum(lengths, last))
        for name, last in POSITIONS.items()
    }
    begins = [starts, *ends.values()]
    found: dict[str | None, Floats] = {None: totals[starts + lengths] - totals[starts]}
    for begin, (name, end) in zip(begins, ends.items(), strict=False):
        found[name] = totals[end] - totals[begin]
    return {name: np.where(lengths > 0, sums, np.nan) for name, sums in found.items()}


@dataclass(frozen=True, kw_only=True)
class Cube:
    """One split of one run as arrays `[docs, categories, steps]`."""

    doc_ids: list[str]
    categories: list[str]
    steps: list[int]
    clusters: Ints
    """[docs, categories], numbered for each category apart"""
    arrays: dict[str, Floats]
    """`MEASURES`, `num_tokens` and `num_bytes`, and what else the rows have of `add_measures`; NaN
    where there is no row."""

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

    def num_tokens(self, position: str | None) -> Floats:
        """Return [docs, categories, steps]: the first step's tokens in one of `POSITIONS`, or all
        of them, at every step."""
        lengths = self.at_start("num_tokens")
        if position is None:
            return lengths
        lasts = [0, *(np.inf if last is None else last for last in POSITIONS.values())]
        number = list(POSITIONS).index(position)
        return np.clip(lengths - lasts[number], 0, lasts[number + 1] - lasts[number])


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
    more = [
        at_position(name, part)
        for name in (*DISTRIBUTION, *DISTANCE)
        for part in (None, *POSITIONS)
    ]
    for name in (*MEASURES, "num_tokens", "num_bytes", *(name for name in more if name in rows)):
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
