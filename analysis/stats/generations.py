"""Greedy answers of all checkpoints of a sweep: where they lie, what is said of them."""

import math
from pathlib import Path

import pandas as pd

from sft_probe.analysis.stats.trajectory import mean_interval
from sft_probe.files import find


def read_generations(directory: Path) -> pd.DataFrame:
    """Return all answers of a sweep; of a step with several counts of docs, those of the largest.
    Empty without any."""
    largest: dict[Path, Path] = {}
    for path in find(directory, "sweep/step_*/generate_*/generations.jsonl"):
        step = path.parent.parent
        largest[step] = max(
            path, largest.get(step, path), key=lambda item: int(item.parent.name.partition("_")[2])
        )
    tables = [pd.read_json(path, lines=True, dtype=False) for _, path in sorted(largest.items())]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def on_common_docs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the answers to prompts that every step has, so that steps can be compared."""
    shared = table.groupby("doc_id")["step"].nunique() == table["step"].nunique()
    return table[table["doc_id"].map(shared)]


def generations_text(table: pd.DataFrame) -> str:
    """Return one sentence on first and last step, each paired change with its 95 % interval over
    prompts."""
    table = on_common_docs(table)
    steps = sorted(table["step"].unique())
    return (
        f"greedy answers to {table['doc_id'].nunique()} held-out prompts, step {steps[0]} to "
        f"{steps[-1]}: "
        f"{_moved(table, 'num_tokens', 1)} tokens (at most {table['max_new_tokens'].max()}), "
        f"ended by themselves {_moved(table, 'ended', 100)} %, repeated 4-grams "
        f"{_moved(table, 'repetition', 100)} %; changes with 95 % intervals over prompts"
    )


def _moved(table: pd.DataFrame, column: str, scale: float) -> str:
    """Return `221 to 58 (-163 [-190, -136])`: means of the docs that have both steps, and their
    paired change."""
    numbers = table.assign(**{column: table[column].astype(float)})  # objects where all are null
    wide = scale * numbers.pivot(index="doc_id", columns="step", values=column).sort_index(axis=1)
    both = wide.iloc[:, [0, -1]].dropna()
    if both.empty:
        return "? to ?"
    first, last = both.mean()
    conversations = (
        table.drop_duplicates("doc_id").set_index("doc_id")["conversation_id"].loc[both.index]
    )
    low, high = mean_interval(
        (both.iloc[:, 1] - both.iloc[:, 0]).to_numpy(dtype=float), conversations.to_numpy()
    )
    interval = "no interval" if math.isnan(low) else f"[{low:+z.0f}, {high:+z.0f}]"
    return f"{first:.0f} to {last:.0f} ({last - first:+z.0f} {interval})"
