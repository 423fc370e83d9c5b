"""A probe set from a table that the user has: one row per prompt, one column per category."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from sft_probe.errors import UserError
from sft_probe.files import find, jsonl_lines, make_dir, write_json, write_jsonl
from sft_probe.synth.derange import derangement
from sft_probe.synth.hh import parse_prompt


def write_probe_set(
    table: Path,
    out: Path,
    *,
    prompt_column: str,
    categories: dict[str, str],
    prompt_format: str,
    heldout: int,
    limit: int | None,
    seed: int,
) -> list[str]:
    """Writes a probe set from a CSV, JSONL or Parquet table; returns why rows were left out, one line each.

    A prompt in HH form (`\\n\\nHuman: ... \\n\\nAssistant:`) becomes its turns, any other one user turn. Responses are
    stripped. Where `categories` has `chosen` but no `random`, `random` is the seeded derangement within each split.

    Args:
        table: the file; its suffix says what it is.
        out: directory of the set.
        prompt_column: column with the prompts.
        categories: category to column.
        prompt_format: stored in the manifest.
        heldout: number of docs held out; whole conversations are, so it may be passed by a few.
        limit: number of docs at most, drawn at random.
        seed: of the draw, the split and the derangement.

    Raises:
        UserError: the table or a column does not exist, or too few rows are usable.
    """
    frame = _read_table(table)
    missing = [column for column in (prompt_column, *categories.values()) if column not in frame.columns]
    if missing:
        raise UserError(f"{table} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")
    docs, left_out = _docs(frame, table.stem, prompt_column, categories)
    random.Random(seed).shuffle(docs)  # noqa: S311 - reproducible, not secret
    docs = docs[:limit]
    _split(docs, heldout)
    names = list(categories)
    if "chosen" in categories and "random" not in categories:
        names.append("random")
        for split in ("train", "heldout"):
            add_random([doc for doc in docs if doc["split"] == split], seed)
    make_dir(out)
    for split in ("train", "heldout"):
        write_jsonl(out / f"{split}.jsonl", [doc for doc in docs if doc["split"] == split])
    writers = {name: f"column {categories[name]!r}" if name in categories else "derangement" for name in names}
    write_manifest(out, writers, prompt_format, {"source": table.name, "seed": seed, "left_out": len(left_out)})
    return left_out


def add_random(docs: list[dict[str, Any]], seed: int) -> None:
    """Gives each doc of one split its `random` response and the `random_doc_id` it comes from."""
    for doc, partner in zip(docs, derangement([doc["chosen"] for doc in docs], seed), strict=True):
        doc["random"] = docs[partner]["chosen"]
        doc["random_doc_id"] = docs[partner]["doc_id"]


def write_manifest(out: Path, writers: dict[str, str], prompt_format: str, provenance: dict[str, Any]) -> None:
    """Writes `probe_set.json` for the JSONL files in `out`: last, so that it stands for a complete set."""
    (out / "probe_set.json").unlink(missing_ok=True)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in find(out, "*.jsonl")}
    rows = [json.loads(line) for name in files for line in jsonl_lines((out / name).read_text("utf-8"))]
    manifest = {
        "name": out.resolve().name,
        "counts": {split: sum(row["split"] == split for row in rows) for split in ("train", "heldout")},
        "categories": writers,
        "prompt_format": prompt_format,
        "sha256": files,
        "provenance": provenance,
    }
    write_json(out / "probe_set.json", manifest)


def _read_table(table: Path) -> pd.DataFrame:
    readers: dict[str, Any] = {
        ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
        ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
        ".parquet": pd.read_parquet,
    }
    if table.suffix not in readers:
        raise UserError(f"{table}: a table is a .csv, .jsonl or .parquet file.")
    try:
        frame: pd.DataFrame = readers[table.suffix](table)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the table {table}: {error}") from error
    return frame


def _docs(
    frame: pd.DataFrame, name: str, prompt_column: str, categories: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    docs, left_out = [], []
    for number, row in enumerate(frame.to_dict("records"), start=1):
        texts = {category: row[column] for category, column in categories.items()}
        empty = [category for category, text in texts.items() if not isinstance(text, str) or not text.strip()]
        messages = parse_prompt(row[prompt_column]) if isinstance(row[prompt_column], str) else []
        if empty or not messages:
            reason = f"empty {', '.join(empty)}" if empty else "the prompt does not end with a user's turn"
            left_out.append(f"row {number}: {reason}")
            continue
        root = hashlib.sha256(messages[0]["content"].encode()).hexdigest()[:12]
        doc = {"doc_id": f"{name}-{number:05d}", "conversation_id": root, "split": "", "messages": messages}
        docs.append(doc | {category: text.strip() for category, text in texts.items()})
    return docs, left_out


def _split(docs: list[dict[str, Any]], heldout: int) -> None:
    """Holds out whole conversations until `heldout` docs are reached."""
    if not 0 < heldout < len(docs):
        raise UserError(f"--heldout {heldout} of {len(docs)} usable docs leaves one of the splits empty.")
    sizes = Counter(doc["conversation_id"] for doc in docs)
    held: set[str] = set()
    num_held = 0
    for conversation_id, size in sizes.items():
        if num_held >= heldout:
            break
        held.add(conversation_id)
        num_held += size
    for doc in docs:
        doc["split"] = "heldout" if doc["conversation_id"] in held else "train"
