"""Which words a change of log-prob lies in: by class of word, by literal, by sequence of words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.intervals import Floats, estimate, holm
from sft_probe.analysis.stats.runs import Recording
from sft_probe.analysis.stats.tokens import token_ends
from sft_probe.analysis.studies.lexicon import CLASSES, pieces, spread
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text

MIN_DOCS = 10
"""A literal in fewer docs has no interval worth printing."""
LENGTHS_OF_SEQUENCES = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class WordChanges:
    """Changes between two steps of one run and split, in nats, with 95 % intervals over docs."""

    first_step: int
    last_step: int
    pieces: pd.DataFrame
    """A row per piece: `doc_id category cluster index kind literal change`."""
    classes: pd.DataFrame
    """A row per category and class: nats per response; classes add up to the whole change."""
    literals: pd.DataFrame
    """A row per category and literal in `MIN_DOCS` docs or more: nats per occurrence."""
    sequences: pd.DataFrame
    """A row per category and sequence of pieces in `MIN_DOCS` docs or more, by the sum gained."""


def words(
    recording: Recording,
    split: str = "heldout",
    step: int | None = None,
    categories: Sequence[str] | None = None,
) -> WordChanges:
    """Divide the change of every response among its words.

    Args:
        recording: a run with token log-probs, its probe set and its tokenizer.
        split: of the docs.
        step: the change up to it, from the first one; default: the last.
        categories: default: all.

    Raises:
        UserError: the run has one step, no token log-probs, or lacks its probe set or tokenizer.
    """
    rows = recording.rows[recording.rows["split"] == split]
    names = list(categories or recording.categories(split))
    steps = sorted(int(number) for number in rows["step"].unique())
    if recording.tokens is None or len(steps) < 2:
        raise UserError(
            f"{recording.name} has no token log-probs of two steps on its {split} prompts. "
            "Sweep it with:  sft-probe sweep RUN"
        )
    if recording.probe_set is None or not recording.manifest:
        raise UserError(
            f"{recording.name}: its probe set or manifest is not here, so its words are not known."
        )
    first, last = steps[0], steps[-1] if step is None else step
    if last not in steps[1:]:
        raise UserError(f"step {last} was not scored after the first: steps are {steps}.")
    table = pd.DataFrame(_pieces(recording, rows, names, first, last))
    if table.empty:
        raise UserError(f"{recording.name}: no response was scored at steps {first} and {last}.")
    return WordChanges(
        first_step=first,
        last_step=last,
        pieces=table,
        classes=_by_class(table),
        literals=_by_literal(table[~table["kind"].isin(["white space", "EOS"])], ["literal"]),
        sequences=_by_literal(_sequences(table), ["literal"]).sort_values(
            ["category", "total"], ascending=[True, False], ignore_index=True
        ),
    )


def _pieces(
    recording: Recording, rows: pd.DataFrame, categories: Sequence[str], first: int, last: int
) -> Iterator[dict[str, object]]:
    """Yield a row for each piece of each response that both steps scored."""
    keys = ["doc_id", "category"]
    at = {step: rows[rows["step"] == step].reset_index().set_index(keys) for step in (first, last)}
    arrays = recording.cube(str(rows["split"].iloc[0]), categories)
    for key in at[last].index.intersection(at[first].index):
        doc_id, category = str(key[0]), str(key[1])
        if category not in categories:
            continue
        before, row = at[first].loc[key], at[last].loc[key]
        cluster = arrays.clusters[arrays.doc_ids.index(doc_id), arrays.categories.index(category)]
        common = {"doc_id": doc_id, "cluster": cluster, "category": category}
        one, other = (_token_logprobs(recording, int(found["index"])) for found in (before, row))
        parts = pieces(recording.texts[doc_id][category])
        changes = spread(other - one, token_ends(recording, doc_id, category), parts)
        for index, (piece, change) in enumerate(zip(parts, changes, strict=True)):
            yield {
                **common,
                "index": index,
                "kind": piece.kind,
                "literal": piece.literal,
                "change": change,
            }
        yield {
            **common,
            "index": len(parts),
            "kind": "EOS",
            "literal": "",
            "change": row["logprob_eos"] - before["logprob_eos"],
        }


def _token_logprobs(recording: Recording, row: int) -> Floats:
    """Return the token log-probs of a score row, float64 [tokens]."""
    tokens = recording.tokens
    values = [] if tokens is None else tokens["token_logprobs"][row].as_py()
    return np.array(values or [], dtype=np.float64)


def _by_class(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate the mean change per response in each class; a response without it counts as 0."""
    blocks = []
    for category, part in table.groupby("category", sort=False):
        sums = part.pivot_table(
            index=["doc_id", "cluster"], columns="kind", values="change", aggfunc="sum"
        )
        sums = sums.reindex(columns=list(CLASSES)).fillna(0.0)
        found = estimate(sums.to_numpy(), _clusters(sums), band=True)
        blocks.append(
            pd.DataFrame(
                {
                    "category": category,
                    "kind": CLASSES,
                    "num_pieces": [int((part["kind"] == kind).sum()) for kind in CLASSES],
                    "num_docs": found.num_docs,
                    "change": found.mean,
                    "stderr": found.stderr,
                    "low": found.low,
                    "high": found.high,
                    "band_low": found.band_low,
                    "band_high": found.band_high,
                    "p_holm": holm(found.p_values),
                }
            )
        )
    return pd.concat(blocks, ignore_index=True)


def _by_literal(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Estimate the change per occurrence of what stands in enough docs, by category."""
    blocks = []
    for category, part in table.groupby("category", sort=False):
        in_docs = part.groupby(keys)["doc_id"].nunique()
        frequent = part.set_index(keys).loc[in_docs[in_docs >= MIN_DOCS].index].reset_index()
        if frequent.empty:
            continue
        groups = frequent.groupby(["doc_id", "cluster", *keys])["change"].agg(["sum", "count"])
        sums, counts = (groups[name].unstack(keys) for name in ("sum", "count"))
        found = estimate(
            sums.to_numpy(), _clusters(sums), denominators=counts.to_numpy(dtype=np.float64)
        )
        blocks.append(
            pd.DataFrame(
                {
                    "category": category,
                    "literal": sums.columns,
                    "num_docs": found.num_docs,
                    "count": counts.sum().to_numpy(dtype=np.int64),
                    "change": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "p_holm": holm(found.p_values),
                    "total": sums.sum().to_numpy(),
                }
            ).sort_values("total", ascending=False)
        )
    columns = ["category", "literal", "num_docs", "count", "change", "low", "high", "p_holm"]
    return (
        pd.concat(blocks, ignore_index=True)
        if blocks
        else pd.DataFrame(columns=[*columns, "total"])
    )


def _sequences(table: pd.DataFrame) -> pd.DataFrame:
    """Return the sequences of two to four visible pieces within a response, with their changes."""
    visible = table[~table["kind"].isin(["white space", "EOS"])]
    keys = ["doc_id", "category", "cluster"]
    rows = []
    for key, part in visible.groupby(keys, sort=False):
        literals, changes = part["literal"].tolist(), part["change"].to_numpy()
        totals = np.concatenate([[0.0], np.cumsum(changes)])
        for length in LENGTHS_OF_SEQUENCES:
            for start in range(len(literals) - length + 1):
                text = " ".join(literals[start : start + length])
                rows.append((*key, text, totals[start + length] - totals[start]))
    return pd.DataFrame(rows, columns=[*keys, "literal", "change"])


def _clusters(frame: pd.DataFrame) -> Ints:
    return cluster_ids(frame.index.get_level_values("cluster").tolist())


def write_words(found: WordChanges, folder: Path) -> list[Path]:
    """Write `words_classes`, `words_literals` and `words_sequences` as CSV; return the paths."""
    make_dir(folder)
    tables = {"classes": found.classes, "literals": found.literals, "sequences": found.sequences}
    paths = []
    for name, table in tables.items():
        paths.append(folder / f"words_{name}.csv")
        write_text(paths[-1], table.to_csv(index=False))
    return paths
