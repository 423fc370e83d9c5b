"""The ledger of a gain: how much of it shows without a prompt, and what each nearer prompt adds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import cluster_ids
from sft_probe.analysis.stats.intervals import Floats, estimate
from sft_probe.analysis.stats.runs import load_recording
from sft_probe.analysis.sweep.request import CONTEXTS
from sft_probe.errors import UserError
from sft_probe.files import find, make_dir, read_jsonl, write_text

ADDED = {"none": "text", "far": "register", "near": "topic", "own": "prompt"}
"""What each context adds to the one before it, in the order of `CONTEXTS`."""
WHOLE = "whole"
MEASURES = ("logprob_with_eos", "first", "body", "eos")
"""The last three add up to the first."""
MIN_DOCS = 10
_COLUMNS = ["doc_id", "conversation_id", "category", "step", "context"]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Parts of the change of every category, in nats per response."""

    run: str
    train_category: str | None
    parts: pd.DataFrame
    """Rows `category measure step part change stderr low high band_low band_high num_docs`; the
    parts of a step add up to its `whole`."""
    preference: pd.DataFrame
    """Change of chosen less that of rejected under their own prompts: `step change low high`;
    empty where one of them was not scored."""


def ledger(run: Path, categories: Sequence[str] | None = None) -> Ledger:
    """Split the change of each category by the contexts that its responses were scored under.

    With d f(c) the change from the first step of a response's log-prob under context c, the parts
    are text = d f(none), register = d f(far) - d f(none), topic = d f(near) - d f(far), prompt =
    d f(own) - d f(near); d f(far) is the mean over its derangements. They add up to d f(own)
    identically, doc by doc. A context that was not scored joins two parts. Intervals are over docs,
    in clusters of those that share a conversation or the text; the band is one over all parts and
    steps of a category and measure.

    Raises:
        UserError: no contexts were scored, at one step only, or on fewer than 10 docs.
    """
    table = _read(run)
    recording = load_recording(run)
    blocks = []
    names = list(dict.fromkeys(table["category"]))
    for category in categories or names:
        if category not in names:
            raise UserError(f"--categories: {category!r} was not scored; there are {names}.")
        own = table[table["category"] == category]
        texts = [recording.texts.get(doc_id, {}).get(category) for doc_id in _doc_ids(own)]
        blocks += [_parts(own, measure, texts) for measure in MEASURES]
    return Ledger(
        run=recording.name,
        train_category=recording.train_category,
        parts=pd.concat(blocks, ignore_index=True),
        preference=_preference(table),
    )


def _read(run: Path) -> pd.DataFrame:
    """Return all rows of contexts, one per doc, category, step and context."""
    paths = find(run, "sweep/step_*/contexts_*/contexts.jsonl")
    if not paths:
        raise UserError(
            f"{run}: no contexts were scored. Run:  sft-probe sweep {run} --contexts "
            f"{','.join(reversed(CONTEXTS))}"
        )
    table = pd.DataFrame([row for path in paths for row in read_jsonl(path)])
    table = table.drop_duplicates([*_COLUMNS, "context_doc_id"])
    if table["step"].nunique() < 2:
        raise UserError(f"{run}: contexts were scored at one step only; a change needs two.")
    table["first"] = table["logprob_first"]
    table["body"] = table["logprob"] - table["logprob_first"]
    table["eos"] = table["logprob_eos"]
    table["logprob_with_eos"] = table["logprob"] + table["logprob_eos"]
    if (num_docs := table["doc_id"].nunique()) < MIN_DOCS:
        raise UserError(f"{run}: contexts of {num_docs} docs; a ledger needs {MIN_DOCS}.")
    return table.groupby(_COLUMNS, as_index=False)[list(MEASURES)].mean()


def _doc_ids(table: pd.DataFrame) -> list[str]:
    return sorted(table["doc_id"].unique())


def _changes(table: pd.DataFrame, measure: str) -> dict[str, Floats]:
    """Return the change from the first step under each context: [docs, steps after the first]."""
    changes = {}
    for context in CONTEXTS:
        own = table[table["context"] == context]
        if len(own):
            wide = own.pivot(index="doc_id", columns="step", values=measure)
            values = wide.reindex(_doc_ids(table)).to_numpy()
            changes[context] = values[:, 1:] - values[:, :1]
    return changes


def _parts(table: pd.DataFrame, measure: str, texts: Sequence[str | None]) -> pd.DataFrame:
    """Return the parts of one category and measure, at every step after the first."""
    changes = _changes(table, measure)
    steps = sorted(table["step"].unique())[1:]
    parts, before, waiting = {}, np.zeros_like(changes["own"]), []
    for context in CONTEXTS:
        waiting.append(ADDED[context])
        if context in changes:
            parts[" + ".join(waiting)] = changes[context] - before
            before, waiting = changes[context], []
    parts[WHOLE] = changes["own"]
    values = np.stack(list(parts.values()), axis=1)
    flat = values.reshape(len(values), -1)
    conversations = table.drop_duplicates("doc_id").sort_values("doc_id")["conversation_id"]
    found = estimate(flat, cluster_ids(conversations.tolist(), list(texts)), band=True)
    index = pd.MultiIndex.from_product([parts, steps], names=["part", "step"])
    numbers = {
        "change": found.mean,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        "band_low": found.band_low,
        "band_high": found.band_high,
        "num_docs": found.num_docs,
    }
    rows = pd.DataFrame(numbers, index=index).reset_index()
    return rows.assign(category=table["category"].iloc[0], measure=measure)


def _preference(table: pd.DataFrame) -> pd.DataFrame:
    """Return how much more chosen has changed than rejected, both under their own prompts."""
    own = table[table["context"] == "own"]
    sides = [own[own["category"] == name] for name in ("chosen", "rejected")]
    if not all(map(len, sides)):
        return pd.DataFrame(columns=["step", "change", "low", "high"])
    one, other = (_changes(side, "logprob_with_eos")["own"] for side in sides)
    conversations = own.drop_duplicates("doc_id").sort_values("doc_id")["conversation_id"]
    found = estimate(one - other, cluster_ids(conversations.tolist()))
    steps = sorted(own["step"].unique())[1:]
    return pd.DataFrame({"step": steps, "change": found.mean, "low": found.low, "high": found.high})


def write_ledger(found: Ledger, folder: Path) -> list[Path]:
    """Write `ledger.csv` and, where there is one, `preference.csv`; return the paths."""
    make_dir(folder)
    tables = {"ledger": found.parts.assign(run=found.run), "preference": found.preference}
    paths = [folder / f"{name}.csv" for name, table in tables.items() if len(table)]
    for path in paths:
        write_text(path, tables[path.stem].to_csv(index=False))
    return paths
