"""Data of one's own to train on: shapes of rows, duplicates, and what is held out."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SHARED, Run, make_docs, needs_shared, user_error

WriteSet = Callable[[list[dict[str, Any]]], Path]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


HH = "\n\nHuman: Name a bird, number {i}.\n\nAssistant: {answer}"
SOURCES: dict[str, Callable[[int], dict[str, Any]]] = {
    "transcripts": lambda i: {
        "chosen": HH.format(i=i, answer=f"Wren {i}."),
        "rejected": HH.format(i=i, answer="No."),
    },
    "messages": lambda i: {
        "messages": [
            {"role": "user", "content": f"Name a bird, number {i}."},
            {"role": "assistant", "content": f"Wren {i}."},
        ]
    },
    "columns": lambda i: {"question": f"Name a bird, number {i}.", "answer": f"Wren {i}."},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_training_data_of_any_shape_is_read(
    kind: str, tiny_flags: list[str], write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    """8 rows, one empty answer, one prompt that is held out, one row that comes twice."""
    suffix = "jsonl" if kind == "transcripts" else "parquet"
    rows: list[dict[str, Any]] = [SOURCES[kind](i) for i in range(8)]
    rows[2] = json.loads(json.dumps(rows[2]).replace("Wren 2.", ""))
    rows.append(rows[3])
    path = tmp_path / f"own.{suffix}"
    write_rows(path, rows)
    docs = make_docs()
    docs[0]["messages"] = [{"role": "user", "content": "Name a bird, number 5."}]
    flags = (
        "--probe_set",
        write_set(docs),
        "--train_data",
        path,
        "--train_category",
        "chosen:0.5,random:0.5",
    )
    columns = (
        "--prompt_column",
        "question",
        "--response_column",
        "answer",
        "--per_device_train_batch_size",
        2,
    )
    result = sft_probe("train", *tiny_flags, *flags, *columns, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    dropped = {drop["doc_id"]: drop["reason"] for drop in manifest["dropped"]}
    assert dropped[f"own.{suffix}-000003"].endswith("3: an empty response")
    assert dropped[f"own.{suffix}-000006"] == "its conversation is that of the held-out doc d0"
    assert dropped[f"own.{suffix}-000009"].endswith(
        f"9: the same as an earlier row, own.{suffix}-000004"
    )
    assert len(dropped) == 3
    exposure = rows_of(tmp_path / "run/exposure.jsonl")
    assert Counter(row["category"] for row in exposure) == {"chosen": 3, "random": 3}
    write_rows(path, rows[:-1])
    result = sft_probe("train", *tiny_flags, *flags, *columns, "--output_dir", tmp_path / "run")
    assert "the train data has changed" in user_error(result)


def test_training_data_that_holds_held_out_docs_is_reported(
    tiny_flags: list[str], write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    """A file that is held out by its name, and a deeper turn of a conversation that is probed."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, Any]] = [SOURCES["messages"](i) for i in range(5)]
    rows[0]["messages"] = [
        *make_docs()[0]["messages"],
        *SOURCES["messages"](9)["messages"][::-1],
        *rows[0]["messages"],
    ]
    for name in ("train", "test"):
        write_rows(folder / f"{name}.jsonl", rows)
    flags = (
        "--probe_set",
        write_set(make_docs()),
        "--train_data",
        folder,
        "--output_dir",
        tmp_path / "run",
    )
    result = sft_probe("train", *tiny_flags, *flags, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "4 examples of chosen (2 dropped" in result.stdout
    assert (
        "dropped: train.jsonl-000001: its conversation is that of the held-out doc d0"
        in result.stdout
    )
    assert (
        "dropped: test.jsonl: all 5 rows: by its name, data that the source holds out"
        in result.stdout
    )


@needs_shared
def test_published_hh_rows_are_read_as_training_data(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    frame = pd.read_json(SHARED / "data/helpful-base/probe_train.jsonl", lines=True)
    sides = {side: frame["prompt"] + frame[side] for side in ("chosen", "rejected")}
    path = tmp_path / "train.jsonl.gz"
    pd.DataFrame(sides).to_json(path, orient="records", lines=True, compression="gzip")
    result = sft_probe(
        "train", *tiny_flags, "--train_data", path, "--output_dir", tmp_path / "run", "--dry_run"
    )
    assert result.returncode == 0, result.stderr
    num_examples, num_dropped = map(
        int, re.findall(r"(\d+) examples of chosen \((\d+) dropped", result.stdout)[0]
    )
    assert num_examples + num_dropped == 500
    assert num_examples > 450
