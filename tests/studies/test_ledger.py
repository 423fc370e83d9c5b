"""The ledger: parts add up, contexts are scored right, planted truths come out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Run, user_error
from transformers import AutoModelForCausalLM

from sft_probe.analysis.studies.ledger import MEASURES, Ledger, ledger
from sft_probe.analysis.sweep.contexts import NUM_FAR
from sft_probe.errors import UserError
from sft_probe.files import read_jsonl, write_jsonl
from sft_probe.models import load_tokenizer
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, encode_pair


@pytest.fixture(scope="session")
def contexts_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], sft_probe: Run
) -> Path:
    """A run whose responses were scored under all contexts."""
    run = tmp_path_factory.mktemp("contexts") / "run"
    flags = ["--snapshot_steps", "0,last", "--max_steps", "2", "--output_dir", run]
    assert sft_probe("train", *tiny_flags, *flags).returncode == 0
    result = sft_probe("sweep", run, "--contexts", "own,near,far,none")
    assert result.returncode == 0, result.stderr
    return run


def rows_of(run: Path, step: int) -> pd.DataFrame:
    (path,) = run.glob(f"sweep/step_{step:06d}/contexts_*/contexts.jsonl")
    return pd.DataFrame(read_jsonl(path))


def test_contexts_lend_prompts_of_other_conversations(contexts_run: Path) -> None:
    rows = rows_of(contexts_run, 2)
    conversation = {doc.doc_id: doc.conversation_id for doc in load_probe_set("helpful-mini").docs}
    per_doc = rows[rows["category"] == "chosen"].groupby("doc_id")["context"].value_counts()
    for context, number in {"own": 1, "near": 1, "far": NUM_FAR, "none": 1}.items():
        assert (per_doc.xs(context, level="context") == number).all()
    assert (rows["context_doc_id"].isna() == (rows["context"] == "none")).all()
    lent = rows[rows["context"].isin(["near", "far"])]
    assert (lent["conversation_id"] != lent["context_doc_id"].map(conversation)).all()
    far = rows[(rows["context"] == "far") & (rows["category"] == "chosen")]
    assert far.groupby("doc_id")["context_doc_id"].nunique().mean() > NUM_FAR / 2


def test_scores_under_other_prompts_equal_a_plain_forward(contexts_run: Path) -> None:
    rows = rows_of(contexts_run, 2)
    folder = contexts_run / "weights/step_000002"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = load_tokenizer(str(folder))
    docs = {doc.doc_id: doc for doc in load_probe_set("helpful-mini").docs}
    prompt_format = PromptFormat("hh", tokenizer)
    for _, row in rows.groupby(["context", "category"]).head(1).iterrows():
        doc = docs[row["doc_id"]]
        own = prompt_format.render(doc.messages)
        pair: Any = encode_pair(tokenizer, own, doc.responses[row["category"]])
        if row["context"] == "none":
            prefix = [tokenizer.eos_token_id]
        else:
            lender = prompt_format.render(docs[row["context_doc_id"]].messages)
            prefix = encode_pair(tokenizer, lender, "x")[0]  # type: ignore[index]
        ids = torch.tensor([[*prefix, *pair[1]]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[len(prefix) - 1 :].sum()
        assert row["logprob"] == pytest.approx(float(expected), abs=2e-3)


def test_own_context_scores_are_those_of_the_sweep(contexts_run: Path) -> None:
    own = rows_of(contexts_run, 2).query("context == 'own'")
    swept = pd.read_parquet(contexts_run / "scores.parquet").query("step == 2")
    keys = ["doc_id", "category"]
    both = own.merge(swept[swept["split"] == "heldout"], on=keys, suffixes=("", "_swept"))
    assert len(both) == len(own) > 0
    np.testing.assert_allclose(both["logprob"], both["logprob_swept"], atol=2e-3)
    np.testing.assert_allclose(both["logprob_eos"], both["logprob_eos_swept"], atol=2e-3)


def test_parts_add_up_to_the_whole_and_pieces_of_the_response_to_the_total(
    contexts_run: Path,
) -> None:
    parts = ledger(contexts_run).parts
    for _, own in parts.groupby(["category", "measure", "step"]):
        change = own.set_index("part")["change"]
        assert change.drop("whole").sum() == pytest.approx(change["whole"], abs=1e-6)
    wide = parts.pivot(index=["category", "part", "step"], columns="measure", values="change")
    np.testing.assert_allclose(wide[list(MEASURES[1:])].sum(axis=1), wide[MEASURES[0]], atol=1e-6)


def planted(folder: Path, gains: dict[str, float], noise: float = 0.0, seed: int = 0) -> Path:
    """Write contexts of 24 docs in which each context adds its gain, at one place of a response."""
    rng = np.random.default_rng(seed)
    places = {"none": "eos", "far": "first", "near": "body", "own": "body"}
    order = list(places)
    lengths = rng.normal(-40, 10, size=24)
    rows = []
    for step in (0, 8):
        for doc, length in enumerate(lengths):
            for context in order:
                for far in range(NUM_FAR if context == "far" else 1):
                    sums = {"first": -2.0, "body": length, "eos": -1.0}
                    for name in order[: order.index(context) + 1]:
                        if step:
                            sums[places[name]] += gains[name] + noise * rng.normal()
                    rows.append(
                        {
                            "run": "run",
                            "step": step,
                            "category": "chosen",
                            "split": "heldout",
                            "doc_id": f"d{doc}",
                            "conversation_id": f"c{doc}",
                            "context": context,
                            "context_doc_id": f"{context}{far}",
                            "logprob": sums["first"] + sums["body"],
                            "logprob_first": sums["first"],
                            "logprob_eos": sums["eos"],
                        }
                    )
    for step in (0, 8):
        part = folder / f"sweep/step_{step:06d}/contexts_all"
        part.mkdir(parents=True)
        write_jsonl(part / "contexts.jsonl", [row for row in rows if row["step"] == step])
    return folder


@pytest.fixture
def with_scores(swept_run: Path) -> Any:
    """Put score rows beside planted contexts, from which the run's name and texts are read."""

    def add(folder: Path) -> Path:
        (folder / "scores.parquet").write_bytes((swept_run / "scores.parquet").read_bytes())
        return folder

    return add


def test_each_part_is_found_at_its_own_place_alone(with_scores: Any, tmp_path: Path) -> None:
    gains = {"none": 1.0, "far": 2.0, "near": 4.0, "own": 8.0}
    found = ledger(with_scores(planted(tmp_path / "run", gains))).parts
    change = found.set_index(["measure", "part"])["change"]
    expected = {
        "eos": {"text": 1.0},
        "first": {"register": 2.0},
        "body": {"topic": 4.0, "prompt": 8.0},
    }
    for measure, parts in expected.items():
        for part in ("text", "register", "topic", "prompt"):
            assert change[measure, part] == pytest.approx(parts.get(part, 0.0), abs=1e-9)
    assert change[MEASURES[0], "whole"] == pytest.approx(15.0)


def test_the_interval_of_a_prompt_part_that_is_nothing_holds_nothing(
    with_scores: Any, tmp_path: Path
) -> None:
    gains = {"none": 1.0, "far": 2.0, "near": 1.0, "own": 0.0}
    held = 0
    for seed in range(40):
        run = with_scores(planted(tmp_path / str(seed), gains, noise=1.0, seed=seed))
        parts = ledger(run).parts.query("measure == 'body' and part == 'prompt'")
        held += bool((parts["low"] < 0).all() and (parts["high"] > 0).all())
    assert held >= 34  # of 40 at 95 %: under 34 in 1 of 1,000 series


def test_contexts_that_were_not_scored_join_two_parts(with_scores: Any, tmp_path: Path) -> None:
    run = with_scores(planted(tmp_path / "run", dict.fromkeys(("none", "far", "near", "own"), 1.0)))
    for path in run.glob("sweep/*/*/contexts.jsonl"):
        kept = [row for row in read_jsonl(path) if row["context"] in ("far", "own")]
        write_jsonl(path, kept)
    found: Ledger = ledger(run)
    assert set(found.parts["part"]) == {"text + register", "topic + prompt", "whole"}


def test_the_command_prints_sentences_and_draws(
    contexts_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe("ledger", contexts_run, "--categories", "chosen", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "only with its own prompt" in result.stdout
    assert "not what in the training data caused it" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"ledger.csv", "ledger_parts.pdf"}


def test_what_has_no_ledger_is_refused_with_the_command_that_makes_one(
    swept_run: Path, sft_probe: Run, with_scores: Any, tmp_path: Path
) -> None:
    assert "--contexts own,near,far,none" in user_error(sft_probe("ledger", swept_run))
    assert "there is no context 'wide'" in user_error(
        sft_probe("sweep", swept_run, "--contexts", "wide,own")
    )
    assert "compares own" in user_error(sft_probe("sweep", swept_run, "--contexts", "far,near"))
    run = with_scores(planted(tmp_path / "run", dict.fromkeys(("none", "far", "near", "own"), 1.0)))
    for path in run.glob("sweep/*/*/contexts.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [row for row in rows if row["doc_id"] in ("d1", "d2")])
    with pytest.raises(UserError, match="contexts of 2 docs; a ledger needs 10"):
        ledger(run)
