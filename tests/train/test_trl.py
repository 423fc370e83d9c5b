"""The probe in TRL's trainers, which know nothing of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import Run, make_docs
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sft_probe import ProbeCallback

WriteSet = Callable[[list[dict[str, Any]]], Path]


def preferences() -> Dataset:
    rows = [
        {
            "prompt": f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:",
            "chosen": f" {doc['chosen']}",
            "rejected": f" {doc['other']}",
        }
        for doc in make_docs(8)
    ]
    return Dataset.from_list(rows)


def sft(
    model: Any, tokenizer: Any, arguments: dict[str, Any], callbacks: list[ProbeCallback]
) -> Any:
    data = preferences().remove_columns("rejected").rename_column("chosen", "completion")
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        callbacks=callbacks,
    )


def dpo(
    model: Any, tokenizer: Any, arguments: dict[str, Any], callbacks: list[ProbeCallback]
) -> Any:
    return DPOTrainer(
        model=model,
        args=DPOConfig(**arguments),
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("make", [sft, dpo], ids=["SFTTrainer", "DPOTrainer"])
def test_trls_trainer_with_a_lora_is_probed(
    make: Callable[..., Any], tiny_model: Path, write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    arguments = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "learning_rate": 1e-2,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    callback = ProbeCallback(str(write_set(make_docs())), out=tmp_path / "run", steps="log2")
    trainer = make(model, tokenizer, arguments, [callback])
    trainer.train()
    rows = [
        json.loads(line)
        for path in sorted((tmp_path / "run/probe").glob("step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [step for step in (0, 1, 2, 4) for _ in range(6)]
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    trained = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    for step, reference in ((0, plain), (4, trained)):
        mine = {
            (row["doc_id"], row["category"]): row["logprob"] for row in rows if row["step"] == step
        }
        for doc in make_docs()[::2]:
            for category in ("chosen", "other"):
                assert mine[doc["doc_id"], category] == pytest.approx(
                    reference_logprob(reference, tokenizer, doc, category), abs=1e-3
                )
    assert sft_probe("plot", tmp_path / "run").returncode == 0


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_accumulation_steps": 2, "logging_steps": 3}], ids=["each", "mean"]
)
@pytest.mark.parametrize("make", [sft, dpo], ids=["SFTTrainer", "DPOTrainer"])
def test_what_trl_logs_is_the_same_with_a_probe(
    make: Callable[..., Any],
    flags: dict[str, Any],
    tiny_model: Path,
    write_set: WriteSet,
    tmp_path: Path,
) -> None:
    """Its trainers average metrics between two calls of `log` and empty them there."""
    arguments = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "learning_rate": 1e-2,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        **flags,
    }
    logged = []
    for is_probed in (False, True):
        torch.manual_seed(0)
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
        callback = ProbeCallback(str(write_set(make_docs())), out=tmp_path / "run", steps="0,+1")
        trainer = make(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            tokenizer,
            arguments,
            [callback] * is_probed,
        )
        callback.trainer = trainer
        trainer.train()
        logged.append(trainer.state.log_history)
    plain, probed = logged
    assert [entry["step"] for entry in probed if "probe/chosen" in entry] == list(range(7))
    assert without_times(probed) == without_times(plain)
    assert len(without_times(plain)) == 1 + 6 // arguments["logging_steps"]
    assert "rewards/margins" in plain[0] or "mean_token_accuracy" in plain[0]


def without_times(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All entries but those of the probe."""
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    entries = [entry for entry in log_history if "probe/chosen" not in entry]
    return [
        {name: value for name, value in entry.items() if name not in times} for entry in entries
    ]


def reference_logprob(model: Any, tokenizer: Any, doc: dict[str, Any], category: str) -> float:
    prompt = f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:"
    ids = tokenizer.encode(f"{prompt} {doc[category]}")
    with torch.no_grad():
        logprobs = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(
        float(logprobs[i - 1, ids[i]]) for i in range(len(tokenizer.encode(prompt)), len(ids))
    )
