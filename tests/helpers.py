"""Makers and checks that the tests share."""

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TIMEOUT_S
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sft_probe.cli import main
from sft_probe.probe_set import load_probe_set

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAGE_OF_DATA = Path(__file__).resolve().parents[1] / "docs/data.md"
reads_task_index = pytest.mark.usefixtures("task_index")
"""For tests that have lm-eval read all its tasks: they and those that link ours into its package
take turns."""
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the development data in ../shared is not here"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2, GPT-NeoX and SmolLM2 use it, trained on the embedded set."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    docs = load_probe_set("helpful-mini").docs
    tokenizer.train_from_iterator(
        [text for doc in docs for text in doc.responses.values()], trainer
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        bos_token="<|bos|>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


def run_here(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Runs the command line in this process; an exception other than `SystemExit` fails the
    test."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(command)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def make_docs(num_docs: int = 6) -> list[dict[str, Any]]:
    """Valid docs with the categories `chosen` and `other`, half of them held out."""
    return [
        {
            "doc_id": f"d{i}",
            "conversation_id": f"c{i}",
            "split": "train" if i % 2 else "heldout",
            "messages": [{"role": "user", "content": f"What is {i} plus {i}?"}],
            "chosen": f"I think that is {2 * i}, or so my teacher told me.",
            "other": f"The number {i} has always been a friend of mine.",
        }
        for i in range(num_docs)
    ]


def torchrun(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Trains on two ranks, each started as a user starts it, which takes half a minute."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sft_probe.train.sft", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def user_error(result: "subprocess.CompletedProcess[str]") -> str:
    """The message of a run that failed as it should: exit code 2, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr


def blimp_task(folder: Path, data: Path = SHARED / "data/blimp/adjunct_island.jsonl") -> Path:
    """lm-eval's own BLiMP definition, its data replaced by a local file."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent / "blimp/_template_yaml"
    path = folder / "blimp_adjunct_island.yaml"
    path.write_text(
        f"include: {stock}\ntask: blimp_adjunct_island\ndataset_path: json\ndataset_kwargs:\n  "
        "data_files:\n"
        f"    train: {data}\n"
    )
    return path


def make_checkpoint(folder: Path, tiny_model: Path, seed: int) -> Path:
    """A copy of the tiny model with its own weights; seed 0 is the model itself."""
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed * 0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def documented_columns(table: str) -> set[str]:
    """Return the columns that docs/data.md lists for a table, by the heading that names it."""
    for section in PAGE_OF_DATA.read_text("utf-8").split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        if f"`{table}`" in heading:
            rows = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
            return set(re.findall(r"`(\w+)`", " ".join(rows)))
    raise AssertionError(f"docs/data.md has no section on {table}")
