"""`sft-probe simplicity`: code lengths that are known beforehand."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Run, user_error
from score_files import CURVES, NUM_TOKENS, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.analysis.stats.curves import half_bracket
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, encode

NUM_TRAIN = 32


def _losses(run: Path, losses: list[float], category: str = "chosen", **changes: Any) -> Path:
    rows = [
        {
            "run": run.name,
            "step": 1 + n // 4,
            "doc_id": f"d{n}",
            "category": category,
            "split": "train",
            "loss_sum": loss,
            "num_tokens": NUM_TOKENS + 1,
            "num_bytes": 160,
            "order": n,
            **changes,
        }
        for n, loss in enumerate(losses)
    ]
    (run / "first_epoch.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in reversed(rows))
    )
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
    half = CURVES["chosen"](8) / 2
    assert CURVES["chosen"](1) < half < CURVES["chosen"](4), "four examples a step"
    assert (row["half_gain_after_examples"], row["half_gain_by_examples"]) == (4, 16)
    assert " 4-16" in text
    assert "surplus" not in text
    assert "step-0 scores of 0 of 32 training texts" in text
    assert "a claim needs at least 3" in text


def test_learned_bits_are_the_loss_at_the_start_minus_the_code_length(
    sft_probe: Run, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0, 1, 2, 4], (4, 8)),
        ([0, -1, -3, -4], (4, 8)),
        ([0, 5, 5, 4], (0, 4)),
        ([3, 3, 3, 3], (0, 0)),
        ([0, 1, 2, 0], (math.nan, math.nan)),
        ([0, 1, 2, math.nan], (math.nan, math.nan)),
    ],
)
def test_half_of_a_gain_lies_between_two_probed_steps(
    changes: list[float], expected: tuple[float, float]
) -> None:
    assert half_bracket([0, 4, 8, 16], changes) == pytest.approx(expected, nan_ok=True)


def test_categories_are_contrasted_on_the_same_texts(sft_probe: Run, tmp_path: Path) -> None:
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
            noise = [
                (text % 3 - 1 + 0.1 * (seed - 1)) * (category == "random") for text in order
            ]  # of mean 0
            losses = [
                100.0 + text + extra + seed + own for text, own in zip(order, noise, strict=True)
            ]
            runs.append(_losses(run, losses, category))
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    table = pd.read_csv(tmp_path / "out/simplicity_contrasts.csv").iloc[0].to_dict()
    assert table["num_texts"] == 24
    assert table["num_runs"] == 3
    assert table["difference_bits"] == pytest.approx(12.0 * 24 / math.log(2))
    assert "random costs +415 bits" in text
    assert (
        table["low"]
        <= table["low_orders"]
        <= 12.0 * 24 / math.log(2)
        <= table["high_orders"]
        <= table["high"]
    )
    assert "for other orders and texts" in text
    assert "! 3 runs: intervals for other runs and prompts hold the truth in 92%" in text


def _swept_at_the_start(run: Path) -> Path:
    """Give the trained texts their step-0 scores, those of the held-out docs of the same names."""
    path = run / "probe/step_000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [{**row, "split": "train"} for row in rows if row["category"] == "chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *trained]))
    starts = [-(row["logprob"] + row["logprob_eos"]) for row in trained]
    return _losses(run, [loss - 0.5 for loss in starts])


def test_excess_description_length_takes_three_orders_and_the_start_of_all_texts(
    sft_probe: Run, tmp_path: Path
) -> None:
    curves = {"chosen": CURVES["chosen"]}
    runs = [
        _swept_at_the_start(
            write_run(tmp_path / f"order{seed}", seed=seed, curves=curves, steps=(0, 1, 4, 6))
        )
        for seed in range(3)
    ]
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    table = pd.read_csv(tmp_path / "out/simplicity_excess.csv")
    assert list(table["examples_seen"]) == [4, 16, 24]
    gain = 1.25 * CURVES["chosen"](6)  # with the terminator, nats per response
    last = table.iloc[-1]
    assert last["low"] < 24 * (gain - 0.5) / math.log(2) < last["high"]
    assert last["low"] > 0
    assert "chosen: excess description length +" in text
    assert "after 24 of 24 examples, 3 orders" in text
    assert (tmp_path / "out/simplicity_excess.png").stat().st_size > 10_000
    _, text = _table(sft_probe, tmp_path / "two", *runs[:2])
    assert "no excess description length: 2 data order(s), and it takes 3" in text
    _losses(runs[0], [100.0] * NUM_TRAIN)
    _, text = _table(sft_probe, tmp_path / "more", *runs)
    assert "not all texts of order0 were scored at step 0" in text


def test_there_is_no_description_length_where_held_out_loss_rises(
    sft_probe: Run, tmp_path: Path
) -> None:
    falling = {"chosen": lambda step: -float(step)}
    runs = [
        _swept_at_the_start(
            write_run(tmp_path / f"order{seed}", seed=seed, curves=falling, steps=(0, 1, 6))
        )
        for seed in range(3)
    ]
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    assert "chosen: held-out loss rose: no description length" in text


def test_runs_without_prompts_gain_on_their_responses(sft_probe: Run, tmp_path: Path) -> None:
    run = _losses(
        write_run(tmp_path / "bare", train_category="chosen_no_prompt"), [100.0] * NUM_TRAIN
    )
    table, text = _table(sft_probe, tmp_path / "out", run)
    assert table["half_gain_by_examples"].notna().all()
    assert "sweep RUN --splits" not in text, "no sweep scores them without their prompts"


def test_texts_of_several_models_are_not_compared(sft_probe: Run, tmp_path: Path) -> None:
    runs = [
        _losses(
            write_run(tmp_path / f"{model}_{name}", model=model, train_category=name),
            [100.0] * NUM_TRAIN,
            name,
        )
        for model in ("a", "b")
        for name in ("chosen", "chosen_no_prompt")
    ]
    _, text = _table(sft_probe, tmp_path / "out", *runs)
    assert "the runs are of several models or probe sets" in text
    assert "chosen_no_prompt costs" not in text
    twice = sft_probe(
        "simplicity",
        runs[0],
        runs[1],
        _losses(write_run(tmp_path / "two", model="a"), [90.0] * NUM_TRAIN),
    )
    assert "two runs on chosen have order seed 0" in user_error(twice)


def test_simplicity_refuses_what_it_cannot_measure(sft_probe: Run, tmp_path: Path) -> None:
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


def test_the_divergence_at_matched_gain_equals_plain_transformers(
    sft_probe: Run, swept_run: Path, referred_run: Path, tmp_path: Path
) -> None:
    result = sft_probe("simplicity", referred_run, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/simplicity.csv").iloc[0]
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(referred_run / f"weights/step_{step:06d}").double()
        for step in (0, 4)
    ]
    tokenizer: Any = AutoTokenizer.from_pretrained(referred_run / "weights/step_000000")
    total, count = 0.0, 0
    for doc in load_probe_set("helpful-mini").of_split("heldout"):
        prompt = encode(tokenizer, PromptFormat("hh").render(doc.messages).text)
        ids = [*prompt, *tokenizer.encode(" " + doc.responses["chosen"])]
        with torch.no_grad():
            old, new = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] for model in models
            )
        start, last = (torch.distributions.Categorical(logits=logits) for logits in (old, new))
        total += float(torch.distributions.kl_divergence(start, last).sum())
        count += len(ids) - len(prompt)
    assert total > 0
    assert (table["kl_step_before"], table["kl_step_at"]) == (1, 4), (
        "the two snapshots, half of the gain between them"
    )
    assert table["kl_gain_before"] < table["matched_gain"] <= table["kl_gain_at"]
    assert 0 < table["kl_before"] < table["kl_at"]
    assert table["kl_at"] == pytest.approx(total / count, rel=1e-3)
    assert "forward KL of tiny from its reference" in result.stdout
    without = sft_probe("simplicity", swept_run)
    assert without.returncode == 0, without.stderr
    assert "forward KL" not in without.stdout
