"""The ledger by example: it is the path, it is the formula in float64, and its run is the run."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Run, user_error
from processes import run_forked
from transformers import AutoModelForCausalLM

from sft_probe.analysis.studies import ledger_examples
from sft_probe.analysis.studies.ledger_examples import ExampleLedger, example_ledger
from sft_probe.files import read_json, read_jsonl, write_json
from sft_probe.models import load_tokenizer
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, encode_pair

CLOSE = ["--max_steps", "3", "--learning_rate", "1e-4", "--snapshot_steps", "0,1,2,3"]


@pytest.fixture(scope="session")
def close_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], sft_probe: Run
) -> Path:
    """A run with accumulation, clipping and weight decay, and a snapshot at every step."""
    run = tmp_path_factory.mktemp("examples") / "run"
    flags = [*CLOSE, *["--weight_decay", "0.1", "--gradient_accumulation_steps", "2"]]
    flags += ["--max_grad_norm", "0.3", "--train_category", "chosen:0.5,rejected:0.5"]
    assert sft_probe("train", *tiny_flags, *flags, "--output_dir", run).returncode == 0
    return run


@pytest.fixture(scope="session")
def close_ledger(close_run: Path) -> ExampleLedger:
    return example_ledger(close_run, ["chosen", "random"], num_docs=10)


def encoded(run: Path) -> tuple[list[tuple[list[int], list[int]]], Any]:
    """Prompt and chosen response of ten held-out docs, and a function for those of a row that was
    trained on, as token ids."""
    tokenizer = load_tokenizer(str(run / "weights/step_000000"))
    prompt_format = PromptFormat("hh", tokenizer)
    docs = {doc.doc_id: doc for doc in load_probe_set("helpful-mini").docs}

    def pair(doc_id: str, category: str, end: list[int]) -> tuple[list[int], list[int]]:
        doc = docs[doc_id]
        prompt = prompt_format.render(doc.messages)
        found: Any = encode_pair(tokenizer, prompt, doc.responses[category])
        return found[0], [*found[1], *end]

    held = [doc.doc_id for doc in docs.values() if doc.split == "heldout"][:10]
    terminator = read_json(run / "manifest.json")["terminator_id"]
    return [pair(name, "chosen", []) for name in held], lambda row: pair(
        row["doc_id"], row["category"], [terminator]
    )


def logprob(model: Any, pair: tuple[list[int], list[int]]) -> torch.Tensor:
    prompt, response = pair
    ids = torch.tensor([[*prompt, *response]])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    total: torch.Tensor = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
    return total


def gradient(model: Any, value: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def by_hand(run: Path, *, adam: bool) -> tuple[list[str], np.ndarray]:
    """The double sum over steps of the formula, in float64 and from the log of what was shown: doc
    ids in order, nats. Weights are those of the snapshots, one for each step."""
    arguments = read_json(run / "manifest.json")["arguments"]
    held, pair_of = encoded(run)
    shown = pd.DataFrame(read_jsonl(run / "first_epoch.jsonl"))
    models = [
        AutoModelForCausalLM.from_pretrained(
            run / f"weights/step_{step:06d}", dtype=torch.float64
        ).eval()
        for step in range(4)
    ]
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    ids, grads, clips, kinds = [], [], [], []
    second = torch.zeros_like(flat[0])
    ahead = []
    for step in (1, 2, 3):
        rows = shown[shown["step"] == step]
        model, num_tokens = models[step - 1], rows["num_tokens"].sum()
        own = [
            gradient(model, -logprob(model, pair_of(row)) / num_tokens)
            for _, row in rows.iterrows()
        ]
        total = torch.stack(own).sum(0)
        clip = min(1.0, arguments["max_grad_norm"] / (float(total.norm()) + 1e-6))
        ids += list(rows["doc_id"])
        grads += own
        clips += [clip] * len(own)
        kinds += [step] * len(own)
        second = 0.999 * second + 0.001 * (clip * total) ** 2
        nodes = [gradient_of_mean(m, held) for m in (model, middle(models, step))]
        last = gradient_of_mean(models[step], held)
        mean = (nodes[0] + 4 * nodes[1] + last) / 6
        root = ((second / (1 - 0.999**step)).sqrt() + 1e-8) if adam else 1.0
        ahead.append(-arguments["learning_rate"] * mean / root)
    nats = []
    for k, clip, grad in zip(kinds, clips, grads, strict=True):
        factors = [
            0.1 * 0.9 ** (t - k) / (1 - 0.9**t) if adam else float(t == k) for t in range(k, 4)
        ]
        u = sum(factor * ahead[t - 1] for factor, t in zip(factors, range(k, 4), strict=True))
        nats.append(float((u * grad).sum()) * clip)
    return ids, np.array(nats)


def gradient_of_mean(model: Any, pairs: list[Any]) -> torch.Tensor:
    values = [logprob(model, pair) for pair in pairs]
    return gradient(model, torch.stack(values).mean())


def middle(models: list[Any], step: int) -> Any:
    """The model in the middle of a step."""
    model = AutoModelForCausalLM.from_config(models[0].config).double().eval()
    sides = zip(models[step - 1].parameters(), models[step].parameters(), strict=True)
    with torch.no_grad():
        for weight, (one, other) in zip(model.parameters(), sides, strict=True):
            weight.copy_((one + other) / 2)
    return model


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_what_each_example_carried_is_the_formula_in_float64(
    optim: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*CLOSE, "--optim", optim, "--max_grad_norm", "0.3"]
    if optim == "sgd":
        flags += ["--learning_rate", "0.3"]  # a step of float32 weights is rounded less
    assert sft_probe("train", *tiny_flags, *flags, "--output_dir", run).returncode == 0
    found = example_ledger(run, ["chosen"], num_docs=10).examples
    ids, nats = by_hand(run, adam=optim != "sgd")
    assert list(found["doc_id"]) == ids
    np.testing.assert_allclose(found["change"], nats, rtol=1e-3, atol=2e-3 * np.abs(nats).max())


def test_examples_and_weight_decay_are_the_path_of_the_run_bit_by_bit(
    close_run: Path, close_ledger: ExampleLedger
) -> None:
    assert close_ledger.weights_off == 0
    assert close_ledger.sum_error < 1e-6
    assert close_ledger.too_long == []
    closure = close_ledger.closure
    moved = closure["path"].abs().sum()
    np.testing.assert_allclose(closure["path"], closure["measured"], atol=1e-3 * moved)
    assert (closure["weight_decay"] != 0).all()
    shares = close_ledger.examples.groupby("category")["share"].sum()
    decay = closure.groupby("category")["weight_decay"].sum()
    path = closure.groupby("category")["path"].sum()
    np.testing.assert_allclose(shares + decay / path, 1, atol=1e-5)
    shown = pd.DataFrame(read_jsonl(close_run / "first_epoch.jsonl"))
    own = close_ledger.examples.query("category == 'chosen'")
    for name, logged in {"doc_id": "doc_id", "train_category": "category", "step": "step"}.items():
        assert list(own[name]) == list(shown[logged])


@pytest.mark.parametrize("growth", [1.0, 1.2, 1.3])
def test_chunks_of_any_length_give_the_same(
    growth: float, close_run: Path, close_ledger: ExampleLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_examples, "_MAX_GROWTH", growth)  # 1, 1 and 2 steps of 3
    found = example_ledger(close_run, ["chosen", "random"], num_docs=10)
    expected = close_ledger.examples["change"]
    np.testing.assert_allclose(found.examples["change"], expected, rtol=1e-6, atol=1e-9)


def test_groups_and_extremes_are_sums_of_the_examples_with_their_texts(
    close_ledger: ExampleLedger,
) -> None:
    found = close_ledger
    for (category, _), own in found.groups.groupby(["category", "by"]):
        examples = found.examples[found.examples["category"] == category]
        assert own["change"].sum() == pytest.approx(examples["change"].sum())
        assert own["times_shown"].sum() == len(examples)
    assert set(found.groups.query("by == 'train_category'")["group"]) == {"chosen", "rejected"}
    docs = {doc.doc_id: doc for doc in load_probe_set("helpful-mini").docs}
    for _, own in found.extremes.groupby(["category", "end"]):
        steps = list(pairwise(own["change"]))
        assert all(a >= b for a, b in steps) or all(a <= b for a, b in steps)
    for _, row in found.extremes.iterrows():
        doc = docs[row["doc_id"]]
        assert row["response"].strip() == doc.responses[row["train_category"]].strip()
        assert doc.messages[-1]["content"] in row["prompt"]


@pytest.mark.parametrize(
    "flags", [["--lora_r", "2"], pytest.param(["--deepspeed", "cpu"], marks=pytest.mark.full)]
)
def test_a_lora_and_a_run_under_deepspeed_are_repeated_bit_by_bit(
    flags: list[str], tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    start = run_forked if "--deepspeed" in flags else sft_probe  # it is set once per process
    run = tmp_path / "run"
    trained = start("train", *tiny_flags, *CLOSE, *flags, "--output_dir", run)
    assert trained.returncode == 0, trained.stderr
    result = start("ledger", run, "--examples", "--categories", "chosen", "--docs", "10")
    assert result.returncode == 0, result.stderr
    assert "bit by bit" in result.stdout
    closure = pd.read_csv(run / "analysis/example_closure.csv")
    sums = closure[["path", "examples", "weight_decay"]].sum()
    missed = abs(sums["examples"] + sums["weight_decay"] - sums["path"])
    assert missed < 1e-5 * closure["path"].abs().sum()


def test_weights_that_are_not_those_of_the_run_are_named(
    close_run: Path, tmp_path: Path, sft_probe: Run
) -> None:
    run = tmp_path / "run"
    shutil.copytree(close_run, run)
    shutil.rmtree(run / "weights/step_000002")
    shutil.copytree(run / "weights/step_000001", run / "weights/step_000002")
    meta = read_json(run / "weights/step_000002/meta.json")
    write_json(run / "weights/step_000002/meta.json", {**meta, "step": 2})
    result = sft_probe(
        "ledger", run, "--examples", "--categories", "chosen", "--docs", 10, "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "! the weights of the repeated run are not those of the snapshots" in result.stdout


def test_runs_that_cannot_be_repeated_are_one_message(
    close_run: Path, tmp_path: Path, sft_probe: Run
) -> None:
    def message(**changes: Any) -> str:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(close_run, run)
        config = (run / "config.yaml").read_text()
        flags = "".join(f"{name}: {value}\n" for name, value in changes.pop("flags", {}).items())
        (run / "config.yaml").write_text(config + flags)
        manifest = read_json(run / "manifest.json")
        manifest["request"] |= changes.pop("request", {})
        write_json(run / "manifest.json", manifest)
        for name in changes.pop("without", ()):
            (run / name).unlink()
        return user_error(sft_probe("ledger", run, "--examples", *changes.pop("options", ())))

    assert "config.yaml" in message(without=["config.yaml"])
    assert "2 ranks" in message(request={"world_size": 2})
    assert "encoded data" in message(request={"encoded_data_sha256": "0"})
    assert "adafactor" in message(flags={"optim": "adafactor"})
    assert "adds noise" in message(flags={"neftune_noise_alpha": 5})
    assert "a path needs 10" in message(options=["--docs", "9"])
    assert "no 'nothing'" in message(options=["--categories", "nothing"])
    assert "two ledgers" in message(options=["--path"])
