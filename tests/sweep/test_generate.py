"""`sft-probe sweep --generate`: greedy answers, against a loop without batches, padding or
cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Run, user_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.analysis.sweep.generate import repetition
from sft_probe.files import sha256_file
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, encode

NUM_DOCS = 3
NORM = "model.norm.weight"


def greedy(checkpoint: Path, prompt: str, limit: int) -> tuple[list[int], bool]:
    """Ids without the end, and whether it came."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    ids = encode(tokenizer, prompt)
    answer: list[int] = []
    while len(answer) < limit:
        with torch.no_grad():
            token_id = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token_id == tokenizer.eos_token_id:
            return answer, True
        answer.append(token_id)
    return answer, False


@pytest.fixture
def run(swept_run: Path, tmp_path: Path) -> Path:
    """A copy of the swept run, to change."""
    copy = tmp_path / "tiny"
    shutil.copytree(swept_run, copy)
    return copy


def change(
    checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any
) -> None:
    """Edits the weights of a snapshot and its generation config."""
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    edit(tensors)
    save_file(tensors, weights, {"format": "pt"})
    (checkpoint / "generation_config.json").write_text(json.dumps(config))
    meta = json.loads((checkpoint / "meta.json").read_text())
    for name in meta["sha256"]:
        meta["sha256"][name] = sha256_file(checkpoint / name)
    (checkpoint / "meta.json").write_text(json.dumps(meta))


def test_generated_answers_are_greedy_at_each_step(
    sft_probe: Run, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last snapshot asks for sampling, as those of chat models do, and is made to end its
    answers."""
    monkeypatch.setattr("sft_probe.analysis.sweep.generate.MAX_NEW_TOKENS", 12)
    last = run / "weights/step_000004"
    prompts = {
        doc.doc_id: PromptFormat("hh").render(doc.messages).text
        for doc in load_probe_set("helpful-mini").of_split("heldout")[:NUM_DOCS]
    }
    third = greedy(last, next(iter(prompts.values())), 3)[0][-1]
    end = int(AutoTokenizer.from_pretrained(last).eos_token_id)

    def favour_the_end(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][end] = 3 * tensors["model.embed_tokens.weight"][third]

    change(last, favour_the_end, do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert sft_probe("sweep", run).returncode == 0, "other weights are scored again"
    before = (run / "scores.parquet").read_bytes()
    assert sft_probe("sweep", run, "--generate", NUM_DOCS, "--batch_size", 2).returncode == 0
    table = pd.read_parquet(run / "generations.parquet")
    assert (run / "scores.parquet").read_bytes() == before
    assert list(table["doc_id"]) == list(prompts) * 3
    assert list(table["step"]) == [0] * NUM_DOCS + [1] * NUM_DOCS + [4] * NUM_DOCS
    assert set(table["run"]) == {"tiny"}
    for row in table.to_dict("records"):
        checkpoint = run / f"weights/step_{row['step']:06d}"
        ids, ended = greedy(checkpoint, prompts[row["doc_id"]], 12)
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        assert row["text"] == tokenizer.decode(ids)
        assert (row["num_tokens"], row["ended"], row["max_new_tokens"]) == (len(ids), ended, 12)
    assert table.groupby("step")["ended"].any().to_dict() == {0: False, 1: False, 4: True}


def test_more_answers_are_added_to_those_there_and_figures_and_reports_show_them(
    sft_probe: Run, run: Path
) -> None:
    for count in (1, 2, 2):
        result = sft_probe("sweep", run, "--generate", count)
        assert result.returncode == 0, result.stderr
    assert "step 4 is complete" in result.stderr
    shutil.rmtree(run / "sweep/step_000001/generate_2")  # a step with fewer docs than the others
    assert sft_probe("sweep", run).returncode == 0
    assert pd.read_parquet(run / "generations.parquet")["step"].value_counts().to_dict() == {
        0: 2,
        1: 1,
        4: 2,
    }
    text = sft_probe("analyze", run).stdout
    assert "greedy answers to 1 held-out prompts, step 0 to 4: " in text
    assert sft_probe("plot", run, "--format", "svg").returncode == 0
    drawn = pd.read_csv(run / "figures/generations.csv")
    assert set(drawn["name"]) == {
        "change of chosen (nats)",
        "length (tokens)",
        "share that ended",
        "repeated 4-grams",
    }


def test_generation_refuses_bad_numbers_and_names_answers_that_are_not_finite(
    sft_probe: Run, run: Path
) -> None:
    message = user_error(sft_probe("sweep", run, "--generate", 5000))
    assert "--generate 5000: only 32 held-out prompts have at most 768 tokens" in message
    change(
        run / "weights/step_000004",
        lambda tensors: tensors.update({NORM: tensors[NORM] * float("nan")}),
    )
    message = user_error(sft_probe("sweep", run, "--generate", 1))
    assert "step 4: --generate: the logits are NaN or infinite" in message
    assert set(pd.read_parquet(run / "generations.parquet")["step"]) == {0, 1}, (
        "the others are kept"
    )


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_is_the_share_of_repeated_four_grams(ids: list[int]) -> None:
    found = repetition(ids)
    if len(ids) < 4:
        assert found is None
        return
    seen = [
        tuple(ids[i : i + 4]) in {tuple(ids[j : j + 4]) for j in range(i)}
        for i in range(len(ids) - 3)
    ]
    assert found == pytest.approx(sum(seen) / len(seen))
