"""Docs that cannot be trained on or scored are named before training, and the rest of the run
works."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import SHARED, Run, make_docs, needs_shared

WriteSet = Callable[[list[dict[str, Any]]], Path]
CASE = SHARED / "cases/one_doc_refused_by_template"


@pytest.mark.parametrize("dry_run", [False, True])
def test_held_out_docs_that_cannot_be_scored_are_named_before_training(
    dry_run: bool, write_set: WriteSet, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    docs = make_docs(8)
    docs[2]["other"] = "word " * 2000 + "end."
    flags = (
        *tiny_flags,
        "--probe_set",
        write_set(docs),
        "--max_steps",
        1,
        "--output_dir",
        tmp_path / "run",
    )
    result = sft_probe("train", *flags, *["--dry_run"] * dry_run)
    assert result.returncode == 0, result.stderr
    text = result.stdout if dry_run else result.stderr
    assert "held out, but cannot be scored: d2: `other`: " in text
    if not dry_run:
        assert text.index("cannot be scored: d2") < text.index("training on 4 examples")


@needs_shared
@pytest.mark.parametrize("name", ["heldout.jsonl", "train.jsonl", "td.jsonl"])
def test_a_doc_that_the_template_refuses_is_left_out_and_named(
    name: str, sft_probe: Run, tmp_path: Path
) -> None:
    """It is left out with the template's own words, before training, and a sweep of the run
    works."""
    run = tmp_path / "run"
    shutil.copytree(CASE, tmp_path / "case")
    data = ("--train_data", tmp_path / "case/td.jsonl") if name == "td.jsonl" else ()
    probe_set = tmp_path / "case" / ("ok.jsonl" if data else name)
    flags = [
        "--model_name_or_path",
        tmp_path / "case/ck/checkpoint-1",
        "--probe_set",
        probe_set,
        *data,
    ]
    flags += [
        "--max_steps",
        2,
        "--prompt_format",
        "chat",
        "--max_length",
        200,
        "--per_device_train_batch_size",
        2,
    ]
    flags += ["--deepspeed", "none", "--output_dir", run]
    result = sft_probe("train", *flags)
    assert result.returncode == 0, result.stderr
    before, _, _ = result.stderr.partition("training on ")
    assert "roles must alternate user/assistant" in before
    assert ("held out, but cannot be scored: d8" in before) == (name == "heldout.jsonl")
    assert ("not trained on: " in before) == (name != "heldout.jsonl")
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["dropped"]) == (name != "heldout.jsonl")
    result = sft_probe("sweep", run)
    assert result.returncode == 0, result.stderr
    assert (run / "trajectory.csv").exists()
