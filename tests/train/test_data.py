"""What is trained on: mixtures, texts without prompts, losses per example, and the plan that a dry
run prints."""

import json
import re
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from helpers import Run, make_docs, user_error
from hypothesis import given
from hypothesis import strategies as st
from processes import run_forked, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc
from sft_probe.train.examples import assign
from sft_probe.train.options import parse_mixture

WriteSet = Callable[[list[dict[str, Any]]], Path]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def some_docs(number: int) -> list[Doc]:
    return [
        Doc(
            doc_id=str(i),
            conversation_id="",
            split="train",
            messages=(),
            responses={},
            random_doc_id=None,
        )
        for i in range(number)
    ]


@given(st.integers(1, 60), st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(0, 9))
def test_a_mixture_gives_each_part_its_share(num_docs: int, shares: list[float], seed: int) -> None:
    names = "abcd"[: len(shares)]
    parts = parse_mixture(
        ",".join(f"{n}:{s}" for n, s in zip(names, shares, strict=True)), list(names), "the set"
    )
    pairs = assign(some_docs(num_docs), parts, seed)
    counts = Counter(part.name for _, part in pairs)
    for name, share in zip(names, shares, strict=True):
        assert abs(counts[name] - share * num_docs) <= 1
    assert max(Counter((doc.doc_id, part.name) for doc, part in pairs).values(), default=1) == 1
    if sum(shares) <= 1:
        assert max(Counter(doc.doc_id for doc, _ in pairs).values(), default=1) == 1
    assert pairs == assign(some_docs(num_docs), parts, seed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chosen:0", "a fraction is above 0 and at most 1, not '0'"),
        ("chosen:1.5", "at most 1"),
        ("chosen:x", "not 'x'"),
        ("chosen,chosen", "twice"),
        ("chosen,", "there is no category ''"),
        ("best_no_prompt", "there is no category 'best_no_prompt'"),
    ],
)
def test_mixtures_that_cannot_be_drawn_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        parse_mixture(text, ["chosen", "rejected"], "the set")


def test_losses_are_those_of_each_example_before_its_update(
    tiny_model: Path, write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    """Both categories with and without prompt, in two micro-batches: a float64 reference gives step
    1."""
    docs = make_docs(8)
    flags = (
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
    )
    result = sft_probe(
        "train",
        "--model_name_or_path",
        tiny_model,
        "--probe_set",
        write_set(docs),
        "--deepspeed",
        "none",
        *flags,
        "--train_category",
        "chosen,chosen_no_prompt:0.5,other:0.5",
        "--learning_rate",
        "1e-2",
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "run/first_epoch.jsonl")
    assert [row["step"] for row in rows] == [1] * 8
    assert [row["order"] for row in rows] == list(range(8))
    assert Counter(row["category"] for row in rows) == {
        "chosen": 4,
        "chosen_no_prompt": 2,
        "other": 2,
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    by_id = {doc["doc_id"]: doc for doc in docs}
    for row in rows:
        doc = by_id[row["doc_id"]]
        text = doc["other" if row["category"] == "other" else "chosen"]
        prompt = tokenizer.encode(f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:")
        if row["category"] == "chosen_no_prompt":
            prompt = [tokenizer.eos_token_id]
        response = [*tokenizer.encode(" " + text), tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = -sum(
            float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(response)
        )
        assert row["loss_sum"] == pytest.approx(expected, abs=1e-3)
        assert (row["num_tokens"], row["num_bytes"]) == (len(response), len(text.encode()))
    log = rows_of(tmp_path / "run/losses.jsonl")
    assert log[0]["loss"] == pytest.approx(
        sum(r["loss_sum"] for r in rows) / sum(r["num_tokens"] for r in rows)
    )
    assert log[1]["loss"] < log[0]["loss"]
    exposure = rows_of(tmp_path / "run/exposure.jsonl")
    assert [row["times_shown"] for row in exposure] == [2] * 8


def test_four_docs_are_learnt_by_heart(
    tiny_model: Path, write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    docs = make_docs(8)
    for doc, word in zip(docs[1::2], ("bread", "music", "winter", "money"), strict=True):
        doc["messages"] = [{"role": "user", "content": f"{word} {word} {word}, what about {word}?"}]
        doc["chosen"] = f"Ask me about {word} tomorrow, for I have thought of {word} all day long."
    result = sft_probe(
        "train",
        "--model_name_or_path",
        tiny_model,
        "--probe_set",
        write_set(docs),
        "--max_steps",
        60,
        "--learning_rate",
        "2e-2",
        "--per_device_train_batch_size",
        4,
        "--deepspeed",
        "none",
        "--snapshot_steps",
        "last",
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "run/losses.jsonl")[-1]["loss"] < 0.05
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run/weights/step_000060")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "run/weights/step_000060")
    for doc in docs[1::2]:
        prompt = tokenizer(
            f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:", return_tensors="pt"
        )
        ids = model.generate(**prompt, max_new_tokens=80, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(ids) == f" {doc['chosen']}{tokenizer.eos_token}"


def test_a_lora_is_trained_saved_and_swept(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    lora = (
        "--lora_r",
        4,
        "--activation_checkpointing",
        "--probe_steps",
        "0,last",
        "--attn_implementation",
        "eager",
    )
    result = sft_probe("train", *tiny_flags, *lora, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    adapter = load_file(tmp_path / "run/weights/step_000004/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    assert not (tmp_path / "run/weights/step_000004/model.safetensors").exists()
    assert sft_probe("sweep", tmp_path / "run").returncode == 0
    scores = pd.read_parquet(tmp_path / "run/scores.parquet")
    live, swept = (
        scores[scores["source"] == source]
        .set_index(["step", "category", "doc_id"])["logprob"]
        .sort_index()
        for source in ("live", "lm_eval")
    )
    assert len(live) == 2 * 32 * 6
    assert (live - swept.loc[live.index]).abs().max() < 2e-3
    assert (live.loc[4] - live.loc[0]).abs().max() > 0.01


def test_weights_that_do_not_change_are_an_error(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    """Adam's update of a weight of 16 bits is lost at this rate; a warm-up's rate of 0 is no
    fault."""
    lost = ("--dtype", "bfloat16", "--learning_rate", "1e-12", "--output_dir", tmp_path / "lost")
    message = user_error(sft_probe("train", *tiny_flags, *lost))
    assert (
        "the weights of step 1 equal those of step 0 although the learning rate was not 0"
        in message
    )
    result = sft_probe("train", *tiny_flags, "--warmup_steps", 2, "--output_dir", tmp_path / "warm")
    assert result.returncode == 0, result.stderr
    metas = [
        json.loads((tmp_path / f"warm/weights/step_00000{n}/meta.json").read_text())
        for n in (0, 1, 4)
    ]
    assert [meta["duplicate_of"] for meta in metas] == [None, 0, None]
    assert metas[1]["lr"] == 0


def test_steps_that_fp16_skips_are_no_updates(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    lost = ("--dtype", "bfloat16", "--learning_rate", "1e-12", "--output_dir", tmp_path / "run")
    result = sft_probe("train", *tiny_flags, *lost)
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "run/weights/step_000004/meta.json").read_text())["duplicate_of"]
        == 1
    )


def test_bfloat16_without_deepspeed_has_no_float32_masters(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--dtype", "bfloat16", "--output_dir", str(tmp_path / "run")]
    assert "keeps no float32 weights" in user_error(
        sft_probe("train", *flags, "--snapshot_dtype", "float32")
    )
    assert sft_probe("train", *flags, "--probe_steps", "last").returncode == 0
    meta = json.loads((tmp_path / "run/weights/step_000004/meta.json").read_text())
    assert (meta["dtype"], meta["weights"]) == ("bfloat16", "as trained")
    row = rows_of(tmp_path / "run/probe/step_000004.jsonl")[0]
    assert (row["weights_dtype"], row["compute_dtype"]) == ("bfloat16", "bfloat16")


MASTERS = """
import sys, torch, deepspeed
from pathlib import Path
from types import SimpleNamespace
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from transformers.integrations import HfDeepSpeedConfig
from sft_probe.train.snapshots import gather_weights, has_masters
from sft_probe.train.snapshots import SnapshotCallback
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
          "zero_optimization": {"stage": int(sys.argv[2])}}
deepspeed.init_distributed("gloo")
kept_alive = HfDeepSpeedConfig(config)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
if sys.argv[3] == "lora":
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
ids = torch.arange(20)[None]
engine.backward(engine(input_ids=ids, labels=ids).loss)
engine.step()
assert has_masters(engine.module)
masters = gather_weights(engine.module, masters=True, keep=True)
weights = gather_weights(engine.module, masters=False, keep=True)
assert masters.keys() == weights.keys() and "lm_head.weight" not in masters
for name, master in masters.items():
    assert master.dtype == torch.float32 and weights[name].dtype == torch.bfloat16
    assert torch.equal(master.bfloat16(), weights[name])
assert any(not torch.equal(master, master.bfloat16().float()) for master in masters.values())
losses = SimpleNamespace(totals=dict, loss=None, lr=None)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
snapshots = SnapshotCallback(Path(sys.argv[4]), "0", None, tokenizer, losses)
snapshots.masters = True
snapshots._save(TrainerState(is_world_process_zero=True), engine.module)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [(2, "full"), (3, "full"), (2, "lora")])
def test_snapshots_of_bf16_training_hold_the_float32_masters(
    stage: int, kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Through DeepSpeed itself: on a CPU the Trainer takes no --bf16."""
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    (tmp_path / "masters.py").write_text(MASTERS)
    arguments = (tmp_path / "masters.py", tiny_model, stage, kind, tmp_path / "weights")
    result = run_forked(*arguments, environment=ranks, target=run_script)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "weights/step_000000"
    assert json.loads((folder / "meta.json").read_text())["weights"] == "float32 masters"
    saved = load_file(
        folder / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors")
    )
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # of an adapter, through PEFT
    assert model.dtype == torch.float32


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_a_dry_run_tells_what_the_training_does(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = [
        *tiny_flags,
        "--max_steps",
        "9",
        "--gradient_accumulation_steps",
        "3",
        "--resume_steps",
        "+4",
    ]
    flags += [
        "--probe_steps",
        "0,2",
        "--train_category",
        "chosen:0.9",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    result = sft_probe("train", *flags, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run").exists()
    assert "1 processes x 4 examples x 3 accumulated" in result.stdout
    assert "58 examples of chosen:0.9 (0 dropped" in result.stdout
    found = re.findall(r"^ +(\d+) +[\d.]+ +([\d,]+) +([\d,]+)  (.*)$", result.stdout, re.MULTILINE)
    plan = {
        int(step): (int(n.replace(",", "")), int(tokens.replace(",", "")))
        for step, n, tokens, _ in found
    }
    assert [(int(step), what) for step, _, _, what in found] == [
        (0, "snapshot, probe"),
        (1, "snapshot"),
        (2, "probe"),
        (4, "resume state"),
        (8, "resume state"),
        (9, "snapshot"),
    ]
    assert sft_probe("train", *flags).returncode == 0
    log = {
        row["step"]: (row["examples_seen"], row["tokens_seen"])
        for row in rows_of(tmp_path / "run/losses.jsonl")
    }
    assert {step: log[step] for step in plan if step} == {step: plan[step] for step in plan if step}
    assert plan[0] == (0, 0)


def test_a_run_that_does_not_fit_on_the_disk_is_refused(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 2 * 10**5)
    )
    for more in ([], ["--dry_run"]):
        message = user_error(
            sft_probe("train", *tiny_flags, "--output_dir", tmp_path / "run", *more)
        )
        assert "3 snapshots and 1 resume states come to" in message
        assert "--snapshot_steps" in message


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_passes_a_dry_run(
    recipe: Path, tiny_model: Path, sft_probe: Run, tmp_path: Path
) -> None:
    """As they are, but for what only a hub or a GPU has."""
    assert len(RECIPES) >= 5
    flags = (
        "--model_name_or_path",
        tiny_model,
        "--probe_set",
        "helpful-mini",
        "--output_dir",
        tmp_path / "run",
    )
    result = sft_probe(
        "train", "--config", recipe, *flags, "--deepspeed", "none", "--max_length", 512, "--dry_run"
    )
    assert result.returncode == 0, result.stderr
    assert re.search("64 (examples of chosen|pairs of chosen and rejected)", result.stdout)
    assert re.search(r"^ +0 .*snapshot", result.stdout, re.MULTILINE)


def test_means_of_the_live_probe_are_logged_beside_the_loss(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (
        "--report_to",
        "tensorboard",
        "--probe_steps",
        "0,last",
        "--output_dir",
        tmp_path / "run",
    )
    assert sft_probe("train", *tiny_flags, *flags).returncode == 0
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/probe/chosen", "train/probe/non_response"} <= set(
        events.Tags()["scalars"]
    )
    rows = [
        row
        for row in rows_of(tmp_path / "run/probe/step_000004.jsonl")
        if row["category"] == "chosen"
    ]
    mean = sum(row["logprob"] for row in rows) / len(rows)
    assert events.Scalars("train/probe/chosen")[-1].value == pytest.approx(mean, abs=1e-2)
