"""The training driver: what is kept, what is counted, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run, make_docs, torchrun, user_error
from processes import TIMEOUT_S, Forked
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from sft_probe import ds_configs
from sft_probe.files import make_dir
from sft_probe.models import cache_dir
from sft_probe.train.model import disable_dropout
from sft_probe.train.run_dir import latest_state, remove_after

WriteSet = Callable[[list[dict[str, Any]]], Path]


def meta(run: Path, step: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / f"weights/step_{step:06d}/meta.json").read_text())
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"weights/step_{step:06d}/model.safetensors")


def test_a_run_leaves_its_snapshots_and_a_manifest(tiny_run: Path, tiny_model: Path) -> None:
    assert sorted(path.name for path in (tiny_run / "weights").iterdir()) == [
        "step_000000",
        "step_000001",
        "step_000004",
    ]
    assert [meta(tiny_run, step)["examples_seen"] for step in (0, 1, 4)] == [0, 4, 16]
    assert meta(tiny_run, 0)["loss"] is None
    assert 5 < meta(tiny_run, 1)["loss"] < 8  # a random model knows nothing: about ln(600) = 6.4
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert manifest["train_category"] == "chosen"
    assert manifest["prompt_format"] == "hh"
    assert manifest["num_examples"] == 64
    assert manifest["snapshot_steps"] == [0, 1, 4]
    assert manifest["versions"]["lm_eval"]
    assert manifest["arguments"]["lr_scheduler_type"] == "constant_with_warmup"
    before, start, end = (
        load_file(tiny_model / "model.safetensors"),
        weights(tiny_run, 0),
        weights(tiny_run, 4),
    )
    assert before.keys() == start.keys() == end.keys()
    assert all(torch.equal(before[name], start[name]) for name in before)
    assert not any(
        torch.equal(start[name], end[name])
        for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    )
    assert not list(tiny_run.rglob("*.bin")), "no pickles"


def test_tokens_seen_counts_the_labels(tiny_run: Path, tiny_model: Path) -> None:
    from sft_probe.models import load_tokenizer
    from sft_probe.probe_set import load_probe_set

    tokenizer = load_tokenizer(str(tiny_model))
    chosen = {doc.doc_id: doc.responses["chosen"] for doc in load_probe_set("helpful-mini").docs}
    rows = read_jsonl(tiny_run / "first_epoch.jsonl")
    for row in rows:  # in the hh format the separator, one space, belongs to the response
        assert row["num_tokens"] == len(tokenizer.encode(" " + chosen[row["doc_id"]])) + 1
        assert row["num_bytes"] == len(chosen[row["doc_id"]].encode())
    assert len({row["doc_id"] for row in rows}) == len(rows) == 16
    for step in (1, 4):
        tokens = sum(row["num_tokens"] for row in rows if row["step"] <= step)
        assert meta(tiny_run, step)["tokens_seen"] == tokens


def test_the_logged_loss_is_the_mean_over_labelled_tokens(
    tiny_run: Path, tiny_model: Path, tmp_path: Path, sft_probe: Run, write_set: WriteSet
) -> None:
    """With all docs in one batch, step 1's loss is that of the input model: a float64 reference
    gives it."""
    path = write_set(make_docs(8))
    result = sft_probe(
        "train",
        "--model_name_or_path",
        tiny_model,
        "--probe_set",
        path,
        "--max_steps",
        1,
        "--deepspeed",
        "none",
        "--per_device_train_batch_size",
        4,
        "--train_category",
        "other",
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    from sft_probe.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    total, count = 0.0, 0
    for doc in make_docs(8)[1::2]:
        prompt = f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:"
        ids = [*tokenizer.encode(f"{prompt} {doc['other']}"), tokenizer.eos_token_id]
        start = len(tokenizer.encode(prompt))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
        count += len(ids) - start
    assert meta(tmp_path / "run", 1)["loss"] == pytest.approx(total / count, abs=1e-5)
    assert meta(tmp_path / "run", 1)["tokens_seen"] == count


def test_accumulation_does_not_change_the_loss(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    """Two micro-batches of two responses, of unequal lengths, as one batch of four."""
    flags = (
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--output_dir",
        tmp_path / "run",
    )
    assert sft_probe("train", *tiny_flags, *flags).returncode == 0
    whole, halves = (read_jsonl(run / "losses.jsonl") for run in (tiny_run, tmp_path / "run"))
    assert [row["tokens_seen"] for row in halves] == [row["tokens_seen"] for row in whole]
    assert [row["loss"] for row in halves] == pytest.approx(
        [row["loss"] for row in whole], abs=1e-5
    )
    assert len(halves) == 4
    for name, value in weights(tmp_path / "run", 4).items():
        torch.testing.assert_close(value, weights(tiny_run, 4)[name], rtol=0, atol=1e-5)


def test_snapshots_load_in_plain_transformers(tiny_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "weights/step_000004", dtype="auto")
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_same_command_leaves_a_complete_run_alone(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    result = sft_probe("train", *tiny_flags, "--output_dir", tiny_run)
    assert result.returncode == 0
    assert "is complete" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_files_that_a_killed_run_left_are_cleared(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    """As if killed between the manifest and the removal of the states."""
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    (run / "checkpoint-2").mkdir()
    (run / "started.json").write_text(
        json.dumps(json.loads((run / "manifest.json").read_text())["request"])
    )
    result = sft_probe("train", *tiny_flags, "--output_dir", run)
    assert "is complete" in result.stderr
    assert not (run / "checkpoint-2").exists()
    assert not (run / "started.json").exists()


def test_states_other_than_the_one_resumed_from_are_removed(tmp_path: Path) -> None:
    """The others may be half-removed, with a new time that makes them the last to be rotated
    out."""
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-12"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name / "sft_probe_state.json").write_text("{}")
    state = latest_state(tmp_path)
    remove_after(tmp_path, state)
    assert state == tmp_path / "checkpoint-10"
    assert list(tmp_path.iterdir()) == [state]


def test_a_killed_run_is_locked_while_it_lives_and_resumed_by_the_same_command(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    command = ["train", *tiny_flags, "--output_dir", str(tmp_path / "tiny")]
    process = Forked(command, log=tmp_path / "log")
    while not (tmp_path / "tiny/weights/step_000000").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    message = user_error(sft_probe("train", *tiny_flags, "--output_dir", tmp_path / "tiny"))
    assert f"another process is training in {tmp_path / 'tiny'}" in message
    assert (tmp_path / "tiny/weights/step_000000").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny/manifest.json").exists()
    result = sft_probe("train", *tiny_flags, "--output_dir", tmp_path / "tiny")
    assert result.returncode == 0, result.stderr
    assert "was interrupted" in result.stderr
    for step in (0, 1, 4):
        assert meta(tmp_path / "tiny", step)["sha256"] == meta(tiny_run, step)["sha256"]


@pytest.mark.slow
def test_deepspeed_gives_the_same_weights_as_plain_pytorch(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    for name in ("cpu",):
        result = sft_probe(
            "train", *tiny_flags, "--deepspeed", name, "--output_dir", tmp_path / name, process=True
        )
        assert result.returncode == 0, result.stderr
        assert weights(tmp_path / name, 4).keys() == weights(tiny_run, 4).keys()
        assert all(
            torch.equal(value, weights(tiny_run, 0)[key])
            for key, value in weights(tmp_path / name, 0).items()
        )
        for key, value in weights(tmp_path / name, 4).items():
            torch.testing.assert_close(value, weights(tiny_run, 4)[key], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_refuse_to_show_a_doc_twice(tiny_flags: list[str], tmp_path: Path) -> None:
    result = torchrun(
        *tiny_flags,
        "--per_device_train_batch_size",
        5,
        "--output_dir",
        tmp_path / "run",
        "--dry_run",
    )
    assert result.returncode != 0
    assert "64 examples do not fill batches of 10 (2 processes)" in result.stderr


@pytest.mark.parametrize("name", ds_configs.available())
def test_deepspeed_accepts_each_config(name: str, tmp_path: Path) -> None:
    """As the Trainer fills it in, through DeepSpeed's own config class."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(str(ds_configs.path_of(name)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=2
    )
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(
        arguments, GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)), 10
    )
    loaded = DeepSpeedConfig(config.config)
    assert loaded.zero_optimization_stage == {"cpu": 1, "zero1": 1, "zero2": 2}.get(name, 3)
    assert loaded.gradient_accumulation_steps == 2
    offload = loaded.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == (name == "zero3_offload")
    if name.startswith("zero3"):
        assert loaded.zero_config.gather_16bit_weights_on_model_save


@pytest.mark.slow
def test_a_compilation_that_was_killed_does_not_block_the_next(tmp_path: Path) -> None:
    from filelock import FileLock
    from torch.utils.cpp_extension import _get_build_directory

    with FileLock(make_dir(cache_dir()) / "extensions.lock"):  # nobody else is building
        Path(_get_build_directory("deepspeed_shm_comm", verbose=False), "lock").touch()
    subprocess.run([sys.executable, "-m", "sft_probe.train.launch"], check=True, timeout=TIMEOUT_S)


def test_dropout_is_off_in_every_kind_of_model() -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(**small, intermediate_size=32, attention_dropout=0.5, hidden_dropout=0.5)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    for model in (neox, gpt2):
        disable_dropout(model.train())
        ids = torch.arange(12)[None]
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_docs_that_are_too_long_or_empty_are_left_out_and_named(
    write_set: WriteSet, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    docs = make_docs(12)
    docs[1]["chosen"] = "word " * 2000 + "end."
    docs[3]["other"] = ""
    flags = [
        *tiny_flags,
        "--probe_set",
        str(write_set(docs)),
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    result = sft_probe("train", *flags)
    assert result.returncode == 0, result.stderr
    assert "not trained on: d1: over max_length 1024 tokens" in result.stderr
    assert "not trained on: d3" in result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["doc_ids"] == ["d5", "d7", "d9", "d11"]
    assert [drop["doc_id"] for drop in manifest["dropped"]] == ["d3", "d1"]
    shutil.rmtree(tmp_path / "run")
