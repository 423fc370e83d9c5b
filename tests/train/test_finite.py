"""A loss that is NaN or infinite stops a run before the update, with a state, and names step and
examples."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run, make_tokenizer, user_error
from processes import run_forked, train_on_two_ranks
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sft_probe.errors import UserError
from sft_probe.files import write_json, write_jsonl
from sft_probe.probe_set import load_probe_set
from sft_probe.train.arguments import parse_arguments

FLAGS = [
    "--max_steps",
    "8",
    "--seed",
    "0",
    "--gradient_accumulation_steps",
    "2",
    "--learning_rate",
    "1e-3",
]
FLAGS += ["--snapshot_steps", "0,1,last", "--resume_steps", "+3"]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A model with NaN where one token is embedded, and the run of the same model without it."""

    model: Path
    whole_run: Path
    step: int
    """The first one whose loss is NaN."""
    doc_id: str
    """The one doc of that step that has the token."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, sft_probe: Run) -> Broken:
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=False, max_position_embeddings=1024, **small
    )
    model = LlamaForCausalLM(config)
    for name in ("whole", "nan"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    flags = (
        "--model_name_or_path",
        folder / "whole",
        "--per_device_train_batch_size",
        4,
        "--deepspeed",
        "none",
    )
    assert sft_probe("train", *FLAGS, *flags, "--output_dir", folder / "run").returncode == 0
    texts = {
        doc.doc_id: " ".join([*(turn["content"] for turn in doc.messages), doc.responses["chosen"]])
        for doc in load_probe_set("helpful-mini").docs
    }
    shown = [(row["step"], row["doc_id"]) for row in read_jsonl(folder / "run/first_epoch.jsonl")]
    tokens = {doc_id: set(tokenizer.encode(texts[doc_id])) for _, doc_id in shown}
    times = Counter(token for step, doc_id in shown for token in tokens[doc_id])
    step, doc_id, token = next(
        (step, doc_id, token)
        for step, doc_id in shown
        if step > 4
        for token in tokens[doc_id]
        if times[token] == 1
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder / "nan")
    return Broken(model=folder / "nan", whole_run=folder / "run", step=step, doc_id=doc_id)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_no_bare_nan(folder: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in a file")

    for path in folder.rglob("*.json*"):
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(text, parse_constant=refuse)


def check_stopped(run: Path, broken: Broken, stderr: str) -> None:
    last = broken.step - 1
    assert f"step {broken.step}: the loss is NaN or infinite" in stderr
    assert f"1 of 8 examples of the step have such a loss: {broken.doc_id} (chosen)." in stderr
    assert f"The state of step {last} is in checkpoint-{last}" in stderr
    assert (run / f"checkpoint-{last}/sft_probe_state.json").exists()
    assert not (run / "manifest.json").exists()
    losses, whole = (read_jsonl(path / "losses.jsonl") for path in (run, broken.whole_run))
    assert [row["loss"] for row in losses] == pytest.approx(
        [row["loss"] for row in whole[:last]], abs=1e-5
    )
    check_no_bare_nan(run)


def test_a_loss_that_is_nan_stops_the_run_before_the_update(
    broken: Broken, sft_probe: Run, tmp_path: Path
) -> None:
    flags = (
        "--model_name_or_path",
        broken.model,
        "--per_device_train_batch_size",
        4,
        "--deepspeed",
        "none",
    )
    for _ in range(2):  # the second time it resumes, and stops at the same place
        result = sft_probe("train", *FLAGS, *flags, "--output_dir", tmp_path / "run")
        check_stopped(tmp_path / "run", broken, user_error(result))
    assert f"resumes from checkpoint-{broken.step - 1}" in result.stderr
    state = load_file(tmp_path / f"run/checkpoint-{broken.step - 1}/model.safetensors")
    assert sum(int(tensor.isnan().sum()) for tensor in state.values()) == 32, (
        "more than the one row is NaN"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("none", marks=pytest.mark.full),
        "zero2",
        pytest.param("zero3", marks=pytest.mark.full),
    ],
)
def test_a_loss_that_is_nan_on_one_rank_stops_all_ranks(
    stage: str, broken: Broken, tmp_path: Path
) -> None:
    flags = (
        "--model_name_or_path",
        broken.model,
        "--per_device_train_batch_size",
        2,
        "--deepspeed",
        stage,
    )
    for attempt in range(1 if stage == "zero2" else 2):
        result = run_forked(
            *FLAGS, *flags, "--output_dir", tmp_path / "run", target=train_on_two_ranks
        )
        assert result.returncode == 1  # torchrun has an exit code of its own
        assert "Traceback" not in result.stderr.partition("sft-probe:")[0], result.stderr
        assert ("resumes from checkpoint-" in result.stderr) == (attempt == 1)
        check_stopped(tmp_path / "run", broken, result.stderr)


def test_an_update_that_diverges_stops_the_run_at_the_next_step(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = (*tiny_flags, "--learning_rate", "1e38", "--output_dir", tmp_path / "run")
    message = user_error(sft_probe("train", *flags))
    assert "step 2: the loss is NaN or infinite" in message
    assert "4 of 4 examples" in message
    assert "lower --learning_rate" in message
    assert [row["step"] for row in read_jsonl(tmp_path / "run/losses.jsonl")] == [1]
    check_no_bare_nan(tmp_path / "run")


def test_a_last_update_that_diverges_makes_no_complete_run(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = (
        *tiny_flags,
        "--max_steps",
        1,
        "--learning_rate",
        "3e38",
        "--weight_decay",
        "2",
        "--output_dir",
    )
    message = user_error(sft_probe("train", *flags, tmp_path / "run"))
    assert (
        "after step 1 some weights are NaN or infinite: the last update diverged. Lower "
        "--learning_rate"
    ) in message
    assert not (tmp_path / "run/manifest.json").exists()


def test_the_console_shows_the_loss_that_the_file_holds(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe(
        "train", *tiny_flags, "--disable_tqdm", "true", "--output_dir", tmp_path / "run"
    )
    shown = [
        line.split("'loss': '")[1].split("'")[0]
        for line in result.stdout.splitlines()
        if "'loss'" in line
    ]
    assert shown == [f"{row['loss']:.4g}" for row in read_jsonl(tmp_path / "run/losses.jsonl")]
    assert len(shown) == 4


@pytest.mark.parametrize(
    "flag", ["--learning_rate", "--weight_decay", "--max_grad_norm", "--max_wall_time_s"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_flags_that_are_not_finite_are_refused(flag: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{flag} {value}: a finite number is needed"):
        parse_arguments(["--output_dir", str(tmp_path), "--deepspeed", "none", flag, value])


def test_files_hold_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    value = {"a": [float("nan"), 1.5, {"b": float("-inf")}], "c": "NaN"}
    write_json(tmp_path / "one.json", value)
    write_jsonl(tmp_path / "two.jsonl", [value, {"d": 1}])
    expected = {"a": [None, 1.5, {"b": None}], "c": "NaN"}
    assert json.loads((tmp_path / "one.json").read_text()) == expected
    assert read_jsonl(tmp_path / "two.jsonl") == [expected, {"d": 1}]
    check_no_bare_nan(tmp_path)
