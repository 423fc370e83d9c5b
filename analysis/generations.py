"""Greedy answers of all checkpoints of a sweep: where they lie, what is said of them."""

from pathlib import Path

import pandas as pd

from sft_probe.files import find


def read_generations(directory: Path) -> pd.DataFrame:
    """All answers of a sweep; of a step with several counts of docs, those of the largest. Empty without any."""
    largest: dict[Path, Path] = {}
    for path in find(directory, "sweep/step_*/generate_*/generations.jsonl"):
        step = path.parent.parent
        largest[step] = max(path, largest.get(step, path), key=lambda item: int(item.parent.name.partition("_")[2]))
    tables = [pd.read_json(path, lines=True, dtype=False) for _, path in sorted(largest.items())]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def on_common_docs(table: pd.DataFrame) -> pd.DataFrame:
    """The answers to prompts that every step has, so that steps can be compared."""
    shared = table.groupby("doc_id")["step"].nunique() == table["step"].nunique()
    return table[table["doc_id"].map(shared)]


def generations_text(table: pd.DataFrame) -> str:
    """One sentence on first and last step."""
    table = on_common_docs(table)
    means = table.groupby("step")[["num_tokens", "ended", "repetition"]].mean()
    first, last = means.iloc[0], means.iloc[-1]
    return (
        f"greedy answers to {table['doc_id'].nunique()} held-out prompts, step {means.index[0]} to {means.index[-1]}: "
        f"{first['num_tokens']:.0f} to {last['num_tokens']:.0f} tokens (at most {table['max_new_tokens'].max()}), "
        f"ended by themselves {first['ended']:.0%} to {last['ended']:.0%}, repeated 4-grams "
        f"{first['repetition']:.0%} to {last['repetition']:.0%}"
    )
