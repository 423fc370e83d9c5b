"""A tiny real model, and ways to run the program as a user does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import Run, make_tokenizer, run_here
from hypothesis import settings
from processes import TIMEOUT_S, run_forked
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["HF_HUB_OFFLINE"] = "1"
# a shell starts what runs in the background with Ctrl-C ignored, and programs inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# a machine that is busy is no fault
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with random weights and tied embeddings, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def task_index() -> Iterator[None]:
    """Hold lm-eval's package still: another process may link tasks into it, or take them out, at
    any moment."""
    with FileLock(Path(tempfile.gettempdir(), "sft-probe-tests-task-index.lock")):
        yield


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let `datasets` keep what it prepares for these tests out of the user's cache."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    os.environ["HF_DATASETS_CACHE"] = folder
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = folder


@pytest.fixture(scope="session")
def sft_probe() -> Run:
    """Runs `sft-probe ARGS...` in this process; with `process=True` or an environment in a forked
    one, and with `HF_*` in the environment in a new one, which takes ten seconds longer."""

    def run(
        *arguments: object, process: bool = False, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        command = [str(argument) for argument in arguments]
        if not process and not environment:
            return run_here(command)
        if not any(name.startswith("HF_") for name in environment):
            return run_forked(*command, environment=environment)
        return subprocess.run(
            [sys.executable, "-m", "sft_probe", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture(scope="session")
def tiny_flags(tiny_model: Path) -> list[str]:
    """Flags of a training run that takes seconds."""
    return (
        f"--model_name_or_path {tiny_model} --probe_set helpful-mini --max_length 1024 --max_steps "
        "4 --seed 0 --per_device_train_batch_size 4 --learning_rate 1e-3 --snapshot_steps 0,1,last "
        "--deepspeed none"
    ).split()


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, sft_probe: Run, tiny_flags: list[str]
) -> Path:
    """A finished tiny run with snapshots 0, 1 and 4. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("run") / "tiny"
    result = sft_probe("train", *tiny_flags, "--output_dir", directory)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def swept_run(tmp_path_factory: pytest.TempPathFactory, sft_probe: Run, tiny_run: Path) -> Path:
    """A copy of the tiny run, swept on held-out prompts. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("swept") / "tiny"
    shutil.copytree(tiny_run, directory)
    result = sft_probe("sweep", directory)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def referred_run(tmp_path_factory: pytest.TempPathFactory, sft_probe: Run, swept_run: Path) -> Path:
    """A copy of the swept run, swept again beside its first step. Copy it before you change it."""
    directory = tmp_path_factory.mktemp("referred") / "tiny"
    shutil.copytree(swept_run, directory)
    result = sft_probe("sweep", directory, "--reference", "first")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes docs as a bare JSONL probe set."""

    def write(docs: list[dict[str, Any]]) -> Path:
        path = tmp_path / "set.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        return path

    return write
