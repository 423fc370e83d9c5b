"""Raw preference rows: every one becomes exactly what it says, or is named with its reason."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.prompts import PromptFormat
from sft_probe.synth.hh import Pair, RowRejectedError, parse_row
from sft_probe.synth.sources import Rejected, SourcePair, read_pairs

text = st.text(st.characters(codec="utf-8")).map(str.strip).filter(
    lambda value: value and "\n\nHuman:" not in value and "\n\nAssistant:" not in value and "\r\n" not in value
)  # fmt: skip
turns = st.lists(text, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1)


def transcript(texts: list[str], answer: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {part}" for i, part in enumerate([*texts, answer]))


def read(path: Path) -> tuple[list[SourcePair], list[dict[str, Any]]]:
    rejected = Rejected()
    return read_pairs(str(path), rejected), rejected.rows


def reason(row: dict[str, Any]) -> str:
    with pytest.raises(RowRejectedError) as error:
        parse_row(row)
    return str(error.value)


@given(turns, text, text)
def test_a_transcript_comes_back_as_its_turns_and_two_responses(texts: list[str], chosen: str, rejected: str) -> None:
    row = {"chosen": transcript(texts, chosen), "rejected": transcript(texts, rejected)}
    if chosen == rejected:
        assert reason(row) == "both responses are the same"
        return
    pair = parse_row(row)
    assert [turn["content"] for turn in pair.messages] == texts
    assert [turn["role"] for turn in pair.messages] == [("user", "assistant")[i % 2] for i in range(len(texts))]
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


@given(turns, text)
def test_windows_line_ends_and_a_stripped_start_change_nothing(texts: list[str], answer: str) -> None:
    row = {"chosen": transcript(texts, answer), "rejected": transcript(texts, answer + " And more.")}
    plain = parse_row(row)
    windows = parse_row({name: side.replace("\n\n", "\r\n\r\n") for name, side in row.items()})
    stripped = parse_row({name: side.strip() for name, side in row.items()})
    assert stripped == plain
    assert [turn["role"] for turn in windows.messages] == [turn["role"] for turn in plain.messages]
    assert windows.chosen.replace("\r\n", "\n") == plain.chosen.replace("\r\n", "\n")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4), st.text(), st.text())
def test_any_row_gives_a_usable_pair_or_a_reason(prompt: Any, chosen: str, rejected: str) -> None:
    try:
        pair = parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except RowRejectedError:
        return
    assert pair.messages[-1]["role"] == "user"
    assert pair.chosen == pair.chosen.strip() != pair.rejected == pair.rejected.strip()


def test_a_side_that_goes_on_with_more_turns_is_no_pair() -> None:
    shared = "\n\nHuman: Hi\n\nAssistant:"
    assert "more turns follow" in reason(
        {"chosen": shared + " Hello\n\nHuman: Bye\n\nAssistant: Bye", "rejected": shared + " Yes?"}
    )
    assert "share no prompt" in reason({"chosen": shared + " Hello", "rejected": shared.replace("Hi", "Ho") + " Yes?"})
    assert "more turns follow" in reason({"chosen": shared + " Well\n\nHuman: what", "rejected": shared + " Yes?"})
    # what a speaker says inside a line is text, and so is a marker after one newline
    pair = parse_row({"chosen": shared + " As in\nHuman: no", "rejected": shared + " Say Assistant: yes"})
    assert (pair.chosen, pair.rejected) == ("As in\nHuman: no", "Say Assistant: yes")


def test_hostile_rows_are_named() -> None:
    shared = "\n\nHuman: Hi\n\nAssistant:"
    assert "must both be text" in reason({"chosen": shared + " a"})
    assert "must both be text" in reason({"chosen": 3, "rejected": None})
    assert reason({"chosen": shared + " ", "rejected": shared + " a"}) == "an empty response"
    assert "does not end with a user's turn" in reason(
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"}
    )
    assert "surrogate" in reason({"chosen": shared + " \ud800", "rejected": shared + " b"})
    assert "no `prompt`" in reason({"chosen": "a", "rejected": "b"})
    assert reason({"prompt": " ", "chosen": "a", "rejected": "b"}) == "an empty prompt"
    huge = parse_row({"chosen": shared + " \n\nHuma" * 300_000, "rejected": shared + " b"})
    assert len(huge.chosen) > 2_000_000


def test_messages_and_columns() -> None:
    question = {"role": "user", "content": "Why?"}
    chosen, rejected = ({"role": "assistant", "content": content} for content in ("Because.", "No idea."))
    expected = Pair(messages=[question], chosen="Because.", rejected="No idea.")
    # UltraFeedback: a text prompt beside whole conversations
    assert parse_row({"prompt": "Why?", "chosen": [question, chosen], "rejected": [question, rejected]}) == expected
    assert parse_row({"prompt": [question], "chosen": [chosen], "rejected": [rejected]}) == expected
    assert parse_row({"prompt": "Why?", "chosen": [chosen], "rejected": [rejected]}) == expected
    assert parse_row({"prompt": "Why?", "chosen": " Because.", "rejected": "No idea. "}) == expected
    assert parse_row({"prompt": [question], "chosen": "Because.", "rejected": "No idea."}) == expected
    assert (
        parse_row({"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Because.", "rejected": "No idea."}) == expected
    )
    other = {"role": "user", "content": "How?"}
    assert "earlier messages differ" in reason({"chosen": [question, chosen], "rejected": [other, rejected]})
    assert "not the assistant's" in reason({"chosen": [question], "rejected": [question, rejected]})
    assert "not a list of messages" in reason({"chosen": [question, {"role": "bot"}], "rejected": [question, rejected]})


def rows_of(num: int) -> list[dict[str, str]]:
    return [
        {side: f"\n\nHuman: Q{i}?\n\nAssistant: {side} {i}." for side in ("chosen", "rejected")} for i in range(num)
    ]


def test_every_line_of_a_file_is_used_or_named(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_of(4)]
    path = tmp_path / "raw.jsonl"
    path.write_bytes("\n".join([lines[0], "{broken", "[1]", lines[1], "", lines[0], "[" * 200_000, lines[2]]).encode()
                     + b'\n"\xff"\n' + lines[3].encode())  # fmt: skip
    pairs, rejected = read(path)
    assert [(pair.line, pair.chosen) for pair in pairs] == [(i, f"chosen {n}.") for n, i in enumerate((1, 4, 8, 10))]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (2, "not valid JSON in UTF-8"),
        (3, "not a JSON object"),
        (6, "the same as an earlier row"),
        (7, "not valid JSON in UTF-8"),
        (9, "not valid JSON in UTF-8"),
    ]
    assert rejected[2]["earlier"] == "raw.jsonl, line 1"


def test_gzip_parquet_and_directories_hold_the_same_rows(tmp_path: Path) -> None:
    rows = rows_of(6)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:4])
    pd.DataFrame(rows[4:]).to_parquet(tmp_path / "test.parquet")
    pairs, rejected = read(tmp_path)
    assert not rejected
    assert [(pair.doc_id, pair.split) for pair in pairs] == [
        ("test-000001", "heldout"),
        ("test-000002", "heldout"),
        *[(f"train-{i:06d}", "train") for i in range(1, 5)],
    ]


def test_what_cannot_be_read_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows_of(500)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("cut.jsonl.gz", "cannot read"), ("bad.parquet", "cannot read"), ("notes.txt", "a source is a"),
        ("empty", "a source is a"), ("missing file", "no source"), ("owner/missing", "no source"),
    ):  # fmt: skip
        source = name if name == "owner/missing" else str(tmp_path / name)
        with pytest.raises(UserError, match=message):
            read_pairs(source, Rejected())


@needs_shared
def test_published_transcripts_come_back_exactly(tmp_path: Path) -> None:
    lines = (SHARED / "data/helpful-base/probe_train.jsonl").read_text("utf-8").splitlines()
    published = [json.loads(line) for line in lines]
    path = tmp_path / "raw.jsonl"
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in published]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pairs, rejected = read(path)
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (248, "an empty response"),
        (366, "the sides part before the last turn: more turns follow in one of them"),
    ]
    assert len(pairs) + len(rejected) == len(published) == 500
    rendered = PromptFormat("hh")
    same = 0
    for pair in pairs:
        row = published[pair.line - 1]
        assert (pair.chosen, pair.rejected) == (row["chosen"].strip(), row["rejected"].strip())
        same += rendered.render(pair.messages).text == row["prompt"].rstrip()
    assert same >= 478  # the others have stray white space inside a turn, which is stripped
