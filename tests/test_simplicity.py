"""`sft-probe simplicity`: code lengths that are known beforehand."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Run, user_error
from score_files import CURVES, NUM_TOKENS, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.analysis.simplicity import surplus
from sft_probe.prompts import PromptFormat, encode
from sft_probe.records import load_probe_set

NUM_TRAIN = 32


def _losses(run: Path, losses: list[float], category: str = "chosen", **changes: Any) -> Path:
    rows = [
        {
            "run": run.name, "step": 1 + n // 4, "doc_id": f"d{n}", "category": category, "split": "train",
            "loss_sum": loss, "num_tokens": NUM_TOKENS + 1, "num_bytes": 160, "order": n, **changes,
        }
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    (run / "first_epoch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return run


def _table(sft_probe: Run, out: Path, *runs: Path) -> tuple[pd.DataFrame, str]:
    result = sft_probe("simplicity", *runs, "--out", out)
    assert result.returncode == 0, result.stderr
    return pd.read_csv(out / "simplicity.csv"), result.stdout


def test_code_length_and_half_gain(sft_probe: Run, tmp_path: Path) -> None:
    losses = [120.0 - n for n in range(NUM_TRAIN)]
    run = _losses(write_run(tmp_path / "known"), losses)
    table, text = _table(sft_probe, tmp_path / "out", run)
    row = table.iloc[0].to_dict()
    assert row["code_length"] == pytest.approx(sum(losses))
    assert row["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / (160 * NUM_TRAIN))
    half = np.interp(CURVES["chosen"](8) / 2, [CURVES["chosen"](step) for step in (1, 4)], [4, 16])  # 4 examples a step
    assert row["half_gain_examples"] == pytest.approx(half, abs=1.0)
    assert math.isnan(row["surplus"])
    assert "not estimable: no converged run (under two epochs)" in text
    assert "step-0 scores of 0 of 32 training texts" in text
    assert "a claim needs at least 3" in text
    assert set(pd.read_csv(tmp_path / "out/simplicity_ranks.csv")["what"]) == {"prequential", "half gain"}
    assert "examples to half gain" in (tmp_path / "out/simplicity_ranks.svg").read_text()


def test_learned_bits(sft_probe: Run, tmp_path: Path) -> None:
    run = _losses(write_run(tmp_path / "known"), [100.0] * NUM_TRAIN)
    path = run / "probe/step_000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [{**row, "split": "train"} for row in rows if row["category"] == "chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *trained]))
    table, _ = _table(sft_probe, tmp_path / "out", run)
    start = -sum(row["logprob"] + row["logprob_eos"] for row in trained)
    row = table.iloc[0].to_dict()
    assert row["num_at_start"] == len(trained) == 24
    assert row["learned_bits"] == pytest.approx((start - 100.0 * 24) / math.log(2))


@pytest.mark.parametrize(("rate", "converged"), [(0.0, True), (3.0, False)])
def test_the_surplus_needs_a_converged_run(sft_probe: Run, tmp_path: Path, rate: float, converged: bool) -> None:
    curves = {"chosen": lambda step: 20.0 * min(step, 4) / 4 + rate * max(step - 4, 0)}
    run = _losses(write_run(tmp_path / "run", curves=curves, steps=(0, 4, 8, 16, 24)), [140.0] * NUM_TRAIN)
    table, text = _table(sft_probe, tmp_path / "out", run)
    value = float(table["surplus"].iloc[0])
    assert math.isnan(value) != converged
    if converged:
        limit = float(text.partition("limit: ")[2].partition(" nats")[0])
        assert value == pytest.approx(NUM_TRAIN * (140 - limit * (NUM_TOKENS + 1)), rel=0.01)
    else:
        assert "still fell by over 1 % in the last epoch" in text


def test_surplus_counts_blocks_not_examples() -> None:
    noise = np.random.default_rng(0).normal(0, 20, size=512)
    learned = np.where(np.arange(512) < 64, 50.0, 0.0)
    losses = pd.DataFrame({"loss_sum": 100 + noise - noise.mean() + learned, "num_tokens": 50})
    truth = 64 * 50.0
    assert surplus(losses, 2.0) == pytest.approx(truth, rel=0.4)
    assert surplus(losses, 2.0, block=1) > 1.5 * truth, "the floor that single examples have"
    assert surplus(losses, 2.0) < surplus(losses, 2.0, block=1)


def test_the_contrast_is_on_the_same_texts(sft_probe: Run, tmp_path: Path) -> None:
    runs = []
    for seed in range(3):
        for category, extra in (("chosen", 0.0), ("random", 12.0)):
            run = write_run(
                tmp_path / f"{category}_{seed}",
                seed=seed,
                train_category=category,
                texts={"chosen": "text", "random": "text"},
            )
            docs = [json.loads(line) for line in (run / "set.jsonl").read_text().splitlines()]
            for number, doc in enumerate(docs):
                owner = docs[(number + 1) % len(docs)]
                doc |= {"random_doc_id": owner["doc_id"], "random": owner["chosen"]}
            (run / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
            order = [
                (number + (category == "random")) % 24 for number in range(24)
            ]  # the text, not the prompt, has a cost
            runs.append(_losses(run, [100.0 + text + extra + seed for text in order], category))
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    table = pd.read_csv(tmp_path / "out/simplicity_contrasts.csv").iloc[0].to_dict()
    assert table["num_texts"] == 24
    assert table["num_runs"] == 3
    assert table["difference_bits"] == pytest.approx(12.0 * 24 / math.log(2))
    assert "random costs +415 bits" in text


def test_runs_without_prompts_gain_on_their_responses(sft_probe: Run, tmp_path: Path) -> None:
    run = _losses(write_run(tmp_path / "bare", train_category="chosen_no_prompt"), [100.0] * NUM_TRAIN)
    table, text = _table(sft_probe, tmp_path / "out", run)
    assert table["half_gain_examples"].notna().all()
    assert "sweep RUN --splits" not in text, "no sweep scores them without their prompts"


def test_texts_of_several_models_are_not_compared(sft_probe: Run, tmp_path: Path) -> None:
    runs = [
        _losses(write_run(tmp_path / f"{model}_{name}", model=model, train_category=name), [100.0] * NUM_TRAIN, name)
        for model in ("a", "b")
        for name in ("chosen", "chosen_no_prompt")
    ]
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    assert "the runs are of several models or probe sets" in text
    assert "chosen_no_prompt costs" not in text
    twice = sft_probe(
        "simplicity", runs[0], runs[1], _losses(write_run(tmp_path / "two", model="a"), [90.0] * NUM_TRAIN)
    )
    assert "two runs on chosen have order seed 0" in user_error(twice)


def test_what_is_refused(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "no first_epoch.jsonl" in user_error(sft_probe("simplicity", run))
    (run / "first_epoch.jsonl").write_text('{"run": "x"}\n')
    assert "line 1: no row of a first-epoch loss" in user_error(sft_probe("simplicity", run))
    _losses(run, [1.0, math.nan])
    assert "the loss of d1 is nan" in user_error(sft_probe("simplicity", run))
    _losses(run, [1.0, 2.0], doc_id="same")
    assert "stands there twice" in user_error(sft_probe("simplicity", run))
    (run / "first_epoch.jsonl").write_text("")
    assert "is empty" in user_error(sft_probe("simplicity", run))


def test_the_kl_against_plain_transformers(sft_probe: Run, swept_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    result = sft_probe("simplicity", run, "--kl", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/simplicity.csv").iloc[0]
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(run / f"weights/step_{step:06d}").double() for step in (0, 4)
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "weights/step_000000")
    total, count = 0.0, 0
    for doc in load_probe_set("helpful-mini").of_split("heldout"):
        prompt = encode(tokenizer, PromptFormat("hh").render(doc.messages).text)
        ids = [*prompt, *tokenizer.encode(" " + doc.responses["chosen"]), tokenizer.eos_token_id]
        with torch.no_grad():
            old, new = (model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] for model in models)
        start, last = torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=new)
        total += float(torch.distributions.kl_divergence(start, last).sum())
        count += len(ids) - len(prompt)
    assert total > 0
    assert table["kl_per_token"] == pytest.approx(total / count, rel=1e-4), "one run: at its last step"
    assert "forward KL of tiny from its start" in result.stdout
    rows = [json.loads(line) for line in (run / "kl/step_000000.jsonl").read_text().splitlines()]
    assert max(abs(row["kl_sum"]) for row in rows) == 0.0
    before = {path: path.stat().st_mtime_ns for path in (run / "kl").iterdir()}
    assert sft_probe("simplicity", run, "--kl").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "kl").iterdir()} == before, "what is there stays"
    shutil.rmtree(run / "weights/step_000000")
    assert "needs every snapshot, and that of step 0" in user_error(sft_probe("simplicity", run, "--kl"))
