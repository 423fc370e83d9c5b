"""Argmax mass, entropy, energy, p_e and A_o: against the definitions, and what is said of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Run
from score_files import CURVES, NUM_TOKENS, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.analysis.report.html import browser
from sft_probe.analysis.stats.distribution import distribution_table
from sft_probe.analysis.stats.runs import load_recording
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, encode

FALLING: dict[str, Callable[[int], float]] = {
    "chosen": lambda step: -4.0 * step,
    "rejected": lambda step: 2.0 * step,
}


def test_every_measure_equals_its_definition_in_float64(swept_run: Path) -> None:
    table = distribution_table(load_recording(swept_run), ["chosen"])
    own = table[(table["split"] == "heldout") & (table["step"] == 4)].set_index("measure")
    model: Any = AutoModelForCausalLM.from_pretrained(swept_run / "weights/step_000004").double()
    tokenizer: Any = AutoTokenizer.from_pretrained(swept_run / "weights/step_000004")
    parts: dict[str, list[np.ndarray]] = {"argmax": [], "entropy": [], "energy": [], "p_e": []}
    a_o, vocab_size = [], model.config.vocab_size
    for doc in load_probe_set("helpful-mini").of_split("heldout"):
        prompt = encode(tokenizer, PromptFormat("hh").render(doc.messages).text)
        answer = tokenizer.encode(" " + doc.responses["chosen"])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        p = logits.softmax(-1)
        one_hot = torch.nn.functional.one_hot(torch.tensor(answer), vocab_size)
        parts["argmax"].append(p.log().amax(-1).numpy())
        parts["entropy"].append(-(p * p.log()).sum(-1).numpy())
        parts["energy"].append((1 - p[one_hot.bool()]).numpy())
        parts["p_e"].append((p - one_hot).norm(dim=-1).numpy())
        # of I - 1 p^T: V^2 entries, all rows alike but for the diagonal
        mean_norm = float(p.norm(dim=-1).mean())
        a_o.append(np.sqrt(vocab_size * mean_norm**2 + vocab_size - 2))
    assert own["level"]["argmax"] == pytest.approx(
        np.mean([x.sum() for x in parts["argmax"]]), abs=1e-3
    )
    assert own["level"]["A_o"] == pytest.approx(np.mean(a_o), rel=1e-5)
    for name in ("entropy", "energy", "p_e"):
        whole = np.concatenate(parts[name])
        assert own["level"][name] == pytest.approx(whole.mean(), abs=2e-4), name
        some = np.concatenate([values[4:16] for values in parts[name]])
        assert own["level"][f"{name}_tokens_5_16"] == pytest.approx(some.mean(), abs=2e-4), name
    sums = own["level"][[name for name in own.index if name.startswith("argmax_tokens")]].sum()
    assert sums == pytest.approx(own["level"]["argmax"]), "positions add up to the response"


def test_changes_have_the_known_size_and_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", argmax=lambda step: 2.0 * step)
    table = distribution_table(load_recording(run))
    own = table[table["measure"] == "argmax"]
    assert set(own["category"]) == set(CURVES)
    last = own[own["step"] == 8]
    assert last["change"].to_numpy() == pytest.approx(16.0, abs=0.15)
    assert ((last["low"] < 16.1) & (last["high"] > 15.9)).all()
    assert (last["band_low"] < last["low"]).all()
    first = table[(table["measure"] == "argmax_tokens_1") & (table["step"] == 8)]
    assert first["change"].to_numpy() == pytest.approx(16.0 / NUM_TOKENS, abs=0.01)
    assert "A_o" not in set(table["measure"]), "without the size of the vocabulary"


def test_a_sentence_names_the_categories_that_are_squeezed_and_no_others(
    sft_probe: Run, tmp_path: Path
) -> None:
    squeezed = write_run(tmp_path / "run", curves=FALLING, argmax=lambda step: 2.0 * step)
    shown = sft_probe("analyze", squeezed).stdout
    sentence = next(line for line in shown.splitlines() if "squeezing" in line)
    assert "chosen (-3" in sentence
    assert ", argmax mass +1" in sentence
    assert "rejected" not in sentence, "it rose"
    assert "argmax mass" in shown.split("squeezing")[1], "the table of distributions"
    flat = write_run(tmp_path / "flat", curves=FALLING, argmax=lambda step: -2.0 * step)
    assert "squeezing" not in sft_probe("analyze", flat).stdout
    table = pd.read_csv(squeezed / "analysis/distribution.csv")
    assert {"argmax", "entropy", "energy", "p_e", "entropy_tokens_2_4"} <= set(table["measure"])


def test_rows_without_the_columns_are_analysed_as_before(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shown = sft_probe("analyze", run)
    assert shown.returncode == 0, shown.stderr
    assert "argmax" not in shown.stdout
    assert not (run / "analysis/distribution.csv").exists()
    mixed = write_run(tmp_path / "mixed", argmax=lambda _: 0.0)
    older = (run / "probe/step_000004.jsonl").read_text().replace('"run": "run"', '"run": "mixed"')
    (mixed / "probe/step_000004.jsonl").write_text(older)
    table = distribution_table(load_recording(mixed))
    missing = table[table["measure"] == "entropy"].set_index("step")["level"].isna()
    assert set(missing.index[missing]) == {4}, "the other steps keep their numbers"


def test_the_browser_of_docs_is_given_rank_and_entropy_at_both_ends(swept_run: Path) -> None:
    recording = load_recording(swept_run)
    docs = browser(recording, "logprob", 10_000_000)["docs"]
    own = docs[0]["tokens"]["chosen"]
    assert recording.tokens is not None
    places = recording.rows.reset_index().set_index(["split", "doc_id", "category", "step"])
    for end, step in enumerate((0, 4)):
        index = int(places.loc[("heldout", docs[0]["id"], "chosen", step), "index"])
        assert own["ranks"][end] == recording.tokens["token_ranks"][index].as_py()
        entropies = recording.tokens["token_entropies"][index].as_py()
        assert own["entropies"][end] == [round(100 * value) for value in entropies]
