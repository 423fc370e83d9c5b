"""A probe set from a table: nothing is lost without a word."""

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.records import load_probe_set
from sft_probe.synth.hh import parse_prompt


def table(path: Path, num_rows: int = 12) -> Path:
    rows = [
        {
            "q": f"\n\nHuman: Question {i}?\n\nAssistant: Which?\n\nHuman: That one, {i}.\n\nAssistant:",
            "good": f" Answer {i}, with a\u2028leading\x85space.",
            "bad": f"No answer {i}.",
        }
        for i in range(num_rows)
    ]
    rows[3]["bad"] = " "
    rows[5]["q"] = ""
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_makes_a_valid_set_of_every_kind_of_table(suffix: str, tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / f"t.{suffix}")
    result = sft_probe(
        "probe-set", "--from-csv", source, "--prompt", "q", "--category", "chosen=good", "--category", "rejected=bad",
        "--heldout", 4, "--out", tmp_path / "set",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "row 4: empty rejected" in result.stderr
    assert "row 6: the prompt does not end with a user's turn" in result.stderr
    assert "2 rows left out" in result.stderr
    probe_set = load_probe_set(str(tmp_path / "set"))
    assert probe_set.categories == ("chosen", "rejected", "random")
    assert (len(probe_set.of_split("train")), len(probe_set.of_split("heldout"))) == (6, 4)
    doc = next(doc for doc in probe_set.docs if doc.doc_id == "t-00002")
    assert doc.responses["chosen"] == "Answer 1, with a\u2028leading\x85space."
    assert [turn["role"] for turn in doc.messages] == ["user", "assistant", "user"]
    assert doc.messages[-1]["content"] == "That one, 1."


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / "t.csv")
    flags = ("--from-csv", source, "--prompt", "q", "--category", "chosen=good", "--heldout", 4)
    for name, seed in (("a/set", 1), ("b/set", 1), ("c/set", 2)):
        assert sft_probe("probe-set", *flags, "--seed", seed, "--out", tmp_path / name).returncode == 0
    first, second, third = ((tmp_path / name / "set" / "train.jsonl").read_bytes() for name in "abc")
    assert first == second != third
    hashes = [json.loads((tmp_path / name / "set" / "probe_set.json").read_text()) for name in "ab"]
    assert hashes[0] == hashes[1]


def test_rows_of_one_conversation_stay_in_one_split(tmp_path: Path, sft_probe: Run) -> None:
    frame = pd.DataFrame({"q": [f"Question {i // 3}?" for i in range(30)], "a": [f"Answer {i}." for i in range(30)]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    result = sft_probe(
        "probe-set", "--from-csv", tmp_path / "t.csv", "--prompt", "q", "--category", "chosen=a", "--heldout", 10,
        "--out", tmp_path / "set",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    probe_set = load_probe_set(str(tmp_path / "set"))
    assert len(probe_set.of_split("heldout")) == 12


def test_bad_tables_are_user_errors(tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / "t.csv")
    base = ("probe-set", "--from-csv", source, "--out", tmp_path / "set")
    assert "has no column nope" in user_error(sft_probe(*base, "--prompt", "nope", "--category", "chosen=good"))
    assert "--from-csv needs" in user_error(sft_probe(*base, "--prompt", "q"))
    assert "leaves one of the splits empty" in user_error(
        sft_probe(*base, "--prompt", "q", "--category", "chosen=good", "--heldout", 50)
    )
    missing = ("probe-set", "--from-csv", tmp_path / "no.csv", "--out", tmp_path / "set")
    assert "cannot read the table" in user_error(sft_probe(*missing, "--prompt", "q", "--category", "chosen=good"))


turns = (
    st.text(st.characters(codec="utf-8"), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
)


@given(st.lists(turns, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1))
def test_hh_prompts_come_back_as_their_turns(texts: list[str]) -> None:
    names = ("Human", "Assistant")
    prompt = "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(texts)) + "\n\nAssistant:"
    assert [turn["content"] for turn in parse_prompt(prompt)] == texts
    assert [turn["role"] for turn in parse_prompt(prompt)] == [("user", "assistant")[i % 2] for i in range(len(texts))]


@given(st.text())
def test_any_other_prompt_is_one_turn_or_none(text: str) -> None:
    parsed = parse_prompt(text)
    assert not parsed or parsed[-1]["role"] == "user"


@needs_shared
def test_real_prompts_are_rendered_back_to_what_was_published() -> None:
    from sft_probe.prompts import PromptFormat

    lines = (SHARED / "data/helpful-base/probe_train.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    same = sum(PromptFormat("hh").render(parse_prompt(prompt)).text == prompt.rstrip() for prompt in prompts)
    assert len(prompts) == 500
    assert same >= 480  # the others have stray white space inside a turn, which is stripped
