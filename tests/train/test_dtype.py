"""The dtype of the weights that are really trained is what the manifest, each snapshot and each row
say."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Run, user_error
from safetensors.torch import load_file


class Case(NamedTuple):
    stage: str
    dtype: str
    flag: str
    weights: str
    """What a forward pass reads, so that live rows are of this dtype."""
    trained: str
    """What is updated and saved."""


CASES = [
    Case("none", "float32", "", "float32", "float32"),
    Case("none", "float32", "bf16", "float32", "float32"),  # autocast
    Case("none", "bfloat16", "", "bfloat16", "bfloat16"),
    Case("none", "bfloat16", "bf16", "bfloat16", "bfloat16"),
    *(
        case
        for stage in ("zero1", "zero2", "zero3")
        for case in (
            Case(stage, "float32", "", "float32", "float32"),
            Case(stage, "float32", "bf16", "bfloat16", "float32"),
            Case(stage, "bfloat16", "", "bfloat16", "float32"),
            Case(stage, "bfloat16", "bf16", "bfloat16", "float32"),
        )
    ),
]
QUICK = [
    case
    for case in CASES
    if case.stage == "none" or case == ("zero3", "bfloat16", "", "bfloat16", "float32")
]


def first_loss(run: Path) -> float:
    return float(json.loads((run / "losses.jsonl").read_text().splitlines()[0])["loss"])


def is_rounded(folder: Path) -> bool:
    """True where bfloat16 holds every weight."""
    weights = load_file(folder / "model.safetensors").values()
    return all(torch.equal(tensor.float(), tensor.bfloat16().float()) for tensor in weights)


def check(case: Case, run: Path, tiny_run: Path) -> None:
    """What is said, and what files and losses show of it."""
    manifest = json.loads((run / "manifest.json").read_text())
    meta = json.loads((run / "weights/step_000001/meta.json").read_text())
    row = json.loads((run / "probe/step_000001.jsonl").read_text().splitlines()[0])
    assert manifest["arguments"]["dtype"] == case.dtype
    assert (manifest["weights_dtype"], manifest["trained_dtype"]) == (case.weights, case.trained)
    assert meta["dtype"] == case.trained
    assert (row["weights_dtype"], row["compute_dtype"]) == (case.weights, case.weights)
    stored = load_file(run / "weights/step_000001/model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{case.trained}"}
    assert is_rounded(run / "weights/step_000001") == (case.trained == "bfloat16")
    computes_in_16_bits = case.weights == "bfloat16" or case.flag == "bf16"
    assert (abs(first_loss(run) - first_loss(tiny_run)) > 2e-6) == computes_in_16_bits
    assert first_loss(run) == pytest.approx(first_loss(tiny_run), abs=0.05)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[pytest.mark.slow] * (case.stage != "none")
            if case in QUICK
            else pytest.mark.full,
        )
        for case in CASES
    ],
    ids=["-".join(case[:3]) for case in CASES],
)
def test_the_dtype_is_the_one_that_was_asked_for(
    case: Case, tiny_flags: list[str], tiny_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    flags: list[Any] = [
        "--deepspeed",
        case.stage,
        "--dtype",
        case.dtype,
        "--max_steps",
        1,
        "--probe_steps",
        "last",
    ]
    flags += ["--learning_rate", "1e-2", *([f"--{case.flag}", "true"] if case.flag else [])]
    result = sft_probe(
        "train", *tiny_flags, *flags, "--output_dir", tmp_path / "run", process=case.stage != "none"
    )
    assert result.returncode == 0, result.stderr
    check(case, tmp_path / "run", tiny_run)


@pytest.mark.slow
def test_a_deepspeed_file_of_another_dtype_is_refused(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    """It names no bf16, so that `--dtype bfloat16` would be trained in float32 under ZeRO-3."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    config |= {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 3}}
    (tmp_path / "own.json").write_text(json.dumps(config))
    flags = (
        "--deepspeed",
        tmp_path / "own.json",
        "--dtype",
        "bfloat16",
        "--output_dir",
        tmp_path / "run",
    )
    message = user_error(sft_probe("train", *tiny_flags, *flags, process=True))
    assert (
        "--dtype bfloat16: the weights are float32 once they are prepared, and trained in float32"
        in message
    )
    assert not (tmp_path / "run/weights").exists()
    assert not (tmp_path / "run/started.json").exists()


def test_a_lora_on_a_16_bit_base_is_trained_in_float32_and_says_so(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = ("--dtype", "bfloat16", "--lora_r", 4, "--max_steps", 1, "--probe_steps", "last")
    result = sft_probe("train", *tiny_flags, *flags, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    meta = json.loads((tmp_path / "run/weights/step_000001/meta.json").read_text())
    row = json.loads((tmp_path / "run/probe/step_000001.jsonl").read_text().splitlines()[0])
    stored = load_file(tmp_path / "run/weights/step_000001/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert manifest["trained_dtype"] == meta["dtype"] == row["weights_dtype"] == "float32"
    assert row["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "bfloat16", "--fp16", "true"), "--dtype bfloat16 and --fp16 contradict"),
        (("--dtype", "float16", "--bf16", "true"), "--dtype float16 and --bf16 contradict"),
        (
            ("--dtype", "float16", "--fp16", "true"),
            "--fp16 without DeepSpeed scales the gradients of float32 weights",
        ),
        (
            ("--dtype", "bfloat16", "--snapshot_dtype", "float32"),
            "training in bfloat16 keeps no float32 weights",
        ),
        pytest.param(
            ("--fp16", "true"),
            "fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_flags_of_precision_that_contradict_each_other_are_refused(
    flags: tuple[str, ...], words: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    assert words in user_error(
        sft_probe("train", *tiny_flags, *flags, "--output_dir", tmp_path / "run")
    )
