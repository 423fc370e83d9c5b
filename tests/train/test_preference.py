"""The preference stage: losses, rewards and weights against TRL's trainer, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import Run, make_checkpoint, make_docs, torchrun, user_error
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from sft_probe.train.preference import PreferenceLoss

WriteSet = Callable[[list[dict[str, Any]]], Path]
LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def pairs(number: int = 16) -> list[dict[str, Any]]:
    docs = make_docs(number)
    for doc in docs:
        doc["rejected"] = doc.pop("other")
    return docs


@pytest.fixture
def flags(tiny_model: Path, write_set: WriteSet) -> list[str]:
    """Three steps on eight pairs, in the order of the file, without warm-up."""
    return (
        f"--model_name_or_path {tiny_model} --probe_set {write_set(pairs())} --objective dpo "
        "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-3 --deepspeed none "
        "--train_sampling_strategy sequential --snapshot_steps last --max_length 256"
    ).split()


def losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


class Logged(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "rewards/chosen" in logs:
            self.rows.append(logs)


def train_with_trl(model: Path, folder: Path, *, lora: bool, **config: Any) -> list[dict[str, Any]]:
    """TRL's run on the same pairs in the same order; saves the model, returns its log."""
    rows = [
        {
            "prompt": f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:",
            "chosen": f" {doc['chosen']}",
            "rejected": f" {doc['rejected']}",
        }
        for doc in pairs()[1::2]
    ]
    logged = Logged()
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            **config,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear") if lora else None,
        callbacks=[logged],
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return logged.rows


@pytest.mark.parametrize(
    ("loss", "lora"),
    [
        (("sigmoid", 0.1), False),
        pytest.param(("ipo", 0.1), False, marks=pytest.mark.full),
        pytest.param(("ipo", 0.5), True, marks=pytest.mark.full),
        pytest.param(("sigmoid", 0.5), True, marks=pytest.mark.full),
    ],
)
def test_losses_rewards_and_weights_are_those_of_trl(
    loss: tuple[str, float],
    lora: bool,
    flags: list[str],
    tmp_path: Path,
    sft_probe: Run,
) -> None:
    loss_type, beta = loss
    tiny_model = Path(flags[1])
    theirs = train_with_trl(
        tiny_model, tmp_path / "trl", lora=lora, loss_type=[loss_type], beta=beta
    )
    ours = ["--loss_type", loss_type, "--beta", beta, *(["--lora_r", 4] if lora else [])]
    result = sft_probe("train", *flags, *ours, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = losses(tmp_path / "run")
    assert len(rows) == len(theirs) == 3
    # at the first step all rewards are 0 up to rounding, which decides the accuracy
    assert rows[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5)
    for row, other in list(zip(rows, theirs, strict=True))[1:]:
        assert [row[name] for name in LOGGED] == pytest.approx(
            [float(other[name]) for name in LOGGED], abs=1e-5
        )
    if not lora:  # a LoRA begins at random
        mine = load_file(tmp_path / "run/weights/step_000003/model.safetensors")
        other_weights = load_file(tmp_path / "trl/model/model.safetensors")
        for name, value in mine.items():
            torch.testing.assert_close(value, other_weights[name], atol=1e-5, rtol=0)


@given(
    ratios=st.lists(st.floats(-300, 300), min_size=2, max_size=2),
    beta=st.floats(0.01, 2),
    smoothing=st.floats(0, 0.49),
)
def test_the_loss_of_a_pair_is_the_closed_form(
    ratios: list[float], beta: float, smoothing: float
) -> None:
    loss = PreferenceLoss(beta=beta, label_smoothing=smoothing, loss_type="sigmoid", sft_weight=0)
    found = loss.of_pairs(torch.tensor([ratios], dtype=torch.float64), torch.ones(1, 2))
    logit = beta * (ratios[0] - ratios[1])
    expected = (1 - smoothing) * np.logaddexp(0, -logit) + smoothing * np.logaddexp(0, logit)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_sft_term_is_that_of_trl(
    tiny_model: Path, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    theirs = train_with_trl(
        tiny_model,
        tmp_path / "trl",
        lora=False,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.7],
    )
    result = sft_probe("train", *flags, "--sft_weight", 0.7, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    ours = [row["loss"] for row in losses(tmp_path / "run")]
    assert ours == pytest.approx([float(row["loss"]) for row in theirs], abs=1e-5)


def test_reference_logprobs_are_those_of_a_float64_forward(
    tiny_model: Path, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    result = sft_probe("train", *flags, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "run/reference.json").read_text())["logprobs"]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    texts = {doc["doc_id"]: doc for doc in pairs()}
    for row in rows:
        doc = texts[row["doc_id"]]
        prompt = tokenizer.encode(f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:")
        response = [*tokenizer.encode(" " + doc[row["category"]]), tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = float(logprobs[range(len(response)), response].sum())
        assert row["logprob"] == pytest.approx(expected, abs=2e-4 * len(response))
    assert [row["category"] for row in rows] == ["chosen", "rejected"] * 8
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["objective"] == "dpo"
    assert len(manifest["reference_sha256"]) == 64


def test_another_reference_changes_the_first_margin(
    tiny_model: Path, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    other = make_checkpoint(tmp_path / "other", tiny_model, seed=1)
    result = sft_probe("train", *flags, "--reference", other, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert abs(losses(tmp_path / "run")[0]["rewards/chosen"]) > 0.001


def test_accumulated_pairs_give_the_weights_of_one_batch(
    flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    """Three pairs in the last batch of an epoch, so that micro-batches are of unequal size."""
    size = ["--per_device_train_batch_size"]
    whole = ["--max_steps", "2", "--sft_weight", "0.5"]
    for name, extra in {
        "one": [*size, "8"],
        "two": [*size, "3", "--gradient_accumulation_steps", "3"],
    }.items():
        result = sft_probe("train", *flags, *whole, *extra, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
    one, two = (
        load_file(tmp_path / name / "weights/step_000002/model.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-6, rtol=0)
    rows = losses(tmp_path / "two")
    assert [row["examples_seen"] for row in rows] == [8, 16]
    first = [
        json.loads(line) for line in (tmp_path / "two/first_epoch.jsonl").read_text().splitlines()
    ]
    assert [row["category"] for row in first] == ["chosen", "rejected"] * 8
    for row in first:
        assert row["reward"] == pytest.approx(0.1 * (-row["loss_sum"] - row["reference_logprob"]))


@pytest.mark.full
@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_two_ranks_train_as_one_that_accumulates(
    stage: str, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    alone = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    result = sft_probe("train", *flags, *alone, "--output_dir", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    halves = ["--per_device_train_batch_size", "2", "--deepspeed", stage]
    both = torchrun(*flags, *halves, "--output_dir", tmp_path / "two")
    assert both.returncode == 0, both.stderr
    for row, other in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-4)


def test_a_stopped_stage_resumes_exactly(flags: list[str], tmp_path: Path, sft_probe: Run) -> None:
    states = ["--resume_steps", "+1", "--output_dir", tmp_path / "run"]
    result = sft_probe("train", *flags, "--output_dir", tmp_path / "whole")
    assert result.returncode == 0, result.stderr
    assert sft_probe("train", *flags, *states, "--max_wall_time_s", "0").returncode == 75
    reference = (tmp_path / "run/reference.json").stat().st_mtime_ns
    assert sft_probe("train", *flags, *states).returncode == 0
    assert (tmp_path / "run/reference.json").stat().st_mtime_ns == reference
    whole, resumed = (
        load_file(tmp_path / name / "weights/step_000003/model.safetensors")
        for name in ("whole", "run")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert [row["loss"] for row in losses(tmp_path / "run")] == [
        row["loss"] for row in losses(tmp_path / "whole")
    ]


def test_pairs_that_teach_nothing_are_left_out_as_pairs(
    tiny_model: Path, flags: list[str], write_set: WriteSet, tmp_path: Path, sft_probe: Run
) -> None:
    docs = pairs()
    docs[1]["rejected"] = docs[1]["chosen"]
    docs[3]["rejected"] = "far too long, " * 200 + "sorry"
    write_set(docs)
    result = sft_probe("train", *flags, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "d1: chosen and rejected are the same text" in result.stderr
    assert "d3: over max_length 256 tokens" in result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["num_examples"] == 6
    assert manifest["doc_ids"] == ["d5", "d7", "d9", "d11", "d13", "d15"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--beta", "0"], "--beta 0.0: it must be above 0"),
        (["--label_smoothing", "0.5"], "from 0 to below 0.5"),
        (["--loss_type", "hinge"], "there is no choice 'hinge'. Use one of sigmoid, ipo"),
        (["--train_category", "rejected"], "trains on chosen over rejected"),
        (["--objective", "sft", "--beta", "0.2"], "--beta is for --objective dpo"),
        (["--objective", "ppo"], "there is no choice 'ppo'. Did you mean dpo?"),
    ],
)
def test_options_that_make_no_preference_stage_are_refused(
    extra: list[str], message: str, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    result = sft_probe("train", *flags, *extra, "--output_dir", tmp_path / "run")
    assert message in user_error(result)


def test_a_set_without_rejected_is_refused(
    flags: list[str], write_set: WriteSet, tmp_path: Path, sft_probe: Run
) -> None:
    write_set(make_docs())
    result = sft_probe("train", *flags, "--output_dir", tmp_path / "run")
    assert "--objective dpo needs `chosen` and `rejected`" in user_error(result)


def test_a_reference_of_another_vocabulary_is_refused(
    tiny_model: Path, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    other = make_checkpoint(tmp_path / "other", tiny_model, seed=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    result = sft_probe("train", *flags, "--reference", other, "--output_dir", tmp_path / "run")
    assert "its vocabulary is another one" in user_error(result)


def test_a_dry_run_counts_pairs(flags: list[str], sft_probe: Run) -> None:
    result = sft_probe("train", *flags, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "8 pairs of chosen and rejected" in result.stdout


def test_a_run_that_continues_from_a_snapshot_names_its_parent(
    tiny_run: Path, flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    snapshot = tiny_run / "weights/step_000004"
    model = ["--model_name_or_path", snapshot, "--output_dir", tmp_path / "run"]
    assert sft_probe("train", *flags, *model).returncode == 0
    parent = json.loads((tmp_path / "run/manifest.json").read_text())["parent"]
    meta = json.loads((snapshot / "meta.json").read_text())
    assert parent == {"run_dir": str(tiny_run), "step": 4, "sha256": meta["sha256"]}


def test_tables_say_that_a_run_was_trained_on_pairs(
    flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    probed = ["--probe_steps", "0,last", "--output_dir", tmp_path / "run"]
    assert sft_probe("train", *flags, *probed).returncode == 0
    result = sft_probe("analyze", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "trained on chosen over rejected (DPO)" in result.stdout
    refused = sft_probe("simplicity", tmp_path / "run")
    assert "was trained on chosen over rejected (DPO)" in user_error(refused)
