"""Raw preference rows: every one becomes exactly what it says, or is named with its reason."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc, LeftOut, Place
from sft_probe.prompts import PromptFormat
from sft_probe.synth.build import finish_docs, plan_set, write_texts
from sft_probe.synth.hh import Parsed, RowRejectedError, parse_prompt, parse_row, parse_turns
from sft_probe.synth.options import SynthRun
from sft_probe.synth.sources import read_pairs

text = (
    st.text(st.characters(codec="utf-8"))
    .map(str.strip)
    .filter(
        lambda value: (
            value
            and "\n\nHuman:" not in value
            and "\n\nAssistant:" not in value
            and "\r\n" not in value
        )
    )
)
turns = st.lists(text, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1)


def transcript(texts: list[str], answer: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {part}" for i, part in enumerate([*texts, answer]))


def read(path: Path) -> tuple[list[Doc], list[LeftOut]]:
    left_out: list[LeftOut] = []
    return read_pairs(str(path), left_out), left_out


def line_of(item: Doc | LeftOut) -> int:
    assert item.place is not None
    return item.place.line


def reason(row: dict[str, Any]) -> str:
    with pytest.raises(RowRejectedError) as error:
        parse_row(row)
    return str(error.value)


@given(turns, text, text)
def test_a_transcript_comes_back_as_its_turns_and_two_responses(
    texts: list[str], chosen: str, rejected: str
) -> None:
    row = {"chosen": transcript(texts, chosen), "rejected": transcript(texts, rejected)}
    if chosen == rejected:
        assert reason(row) == "both responses are the same"
        return
    pair = parse_row(row)
    assert [turn["content"] for turn in pair.messages] == texts
    assert [turn["role"] for turn in pair.messages] == [
        ("user", "assistant")[i % 2] for i in range(len(texts))
    ]
    assert pair.responses == {"chosen": chosen, "rejected": rejected}


@given(turns, text)
def test_windows_line_ends_and_a_stripped_start_change_nothing(
    texts: list[str], answer: str
) -> None:
    row = {
        "chosen": transcript(texts, answer),
        "rejected": transcript(texts, answer + " And more."),
    }
    plain = parse_row(row)
    windows = parse_row({name: side.replace("\n\n", "\r\n\r\n") for name, side in row.items()})
    stripped = parse_row({name: side.strip() for name, side in row.items()})
    assert stripped == plain
    assert [turn["role"] for turn in windows.messages] == [turn["role"] for turn in plain.messages]
    assert windows.responses["chosen"].replace("\r\n", "\n") == plain.responses["chosen"]


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4),
    st.text(),
    st.text(),
)
def test_any_row_gives_a_usable_pair_or_a_reason(prompt: Any, chosen: str, rejected: str) -> None:
    try:
        pair = parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except RowRejectedError:
        return
    assert pair.messages[-1]["role"] == "user"
    chosen, rejected = pair.responses.values()
    assert chosen == chosen.strip() != rejected == rejected.strip()


def test_a_side_with_more_turns_is_no_preference_pair() -> None:
    shared = "\n\nHuman: Hi\n\nAssistant:"
    assert "more turns follow" in reason(
        {"chosen": shared + " Hello\n\nHuman: Bye\n\nAssistant: Bye", "rejected": shared + " Yes?"}
    )
    assert "share no prompt" in reason(
        {"chosen": shared + " Hello", "rejected": shared.replace("Hi", "Ho") + " Yes?"}
    )
    assert "more turns follow" in reason(
        {"chosen": shared + " Well\n\nHuman: what", "rejected": shared + " Yes?"}
    )
    # what a speaker says inside a line is text, and so is a marker after one newline
    pair = parse_row(
        {"chosen": shared + " As in\nHuman: no", "rejected": shared + " Say Assistant: yes"}
    )
    assert list(pair.responses.values()) == ["As in\nHuman: no", "Say Assistant: yes"]


def test_odd_rows_of_a_source_are_left_out_and_named() -> None:
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
    assert len(huge.responses["chosen"]) > 2_000_000


def test_sources_with_messages_or_with_text_columns_are_read() -> None:
    question = {"role": "user", "content": "Why?"}
    chosen, rejected = (
        {"role": "assistant", "content": content} for content in ("Because.", "No idea.")
    )
    expected = Parsed([question], {"chosen": "Because.", "rejected": "No idea."})
    # UltraFeedback: a text prompt beside whole conversations
    assert (
        parse_row(
            {"prompt": "Why?", "chosen": [question, chosen], "rejected": [question, rejected]}
        )
        == expected
    )
    assert parse_row({"prompt": [question], "chosen": [chosen], "rejected": [rejected]}) == expected
    assert parse_row({"prompt": "Why?", "chosen": [chosen], "rejected": [rejected]}) == expected
    assert parse_row({"prompt": "Why?", "chosen": " Because.", "rejected": "No idea. "}) == expected
    assert (
        parse_row({"prompt": [question], "chosen": "Because.", "rejected": "No idea."}) == expected
    )
    assert (
        parse_row(
            {
                "prompt": "\n\nHuman: Why?\n\nAssistant:",
                "chosen": "Because.",
                "rejected": "No idea.",
            }
        )
        == expected
    )
    other = {"role": "user", "content": "How?"}
    assert "earlier messages differ" in reason(
        {"chosen": [question, chosen], "rejected": [other, rejected]}
    )
    assert "not the assistant's" in reason({"chosen": [question], "rejected": [question, rejected]})
    assert "not a list of messages" in reason(
        {"chosen": [question, {"role": "bot"}], "rejected": [question, rejected]}
    )


MULTI = transcript(["First?", "Middle.", "Second?"], "")
FORMS: dict[str, Callable[[str], str]] = {
    "published": lambda text: text,
    "stripped": str.strip,
    "blank lines before": lambda text: "\n\n" + text,
    "windows": lambda text: text.replace("\n", "\r\n"),
    "windows, stripped": lambda text: text.strip().replace("\n", "\r\n"),
    "single line ends": lambda text: text.strip().replace("\n\n", "\n"),
    "single before the assistant": lambda text: text.replace("\n\nAssistant", "\nAssistant"),
    "three line ends": lambda text: text.replace("\n\n", "\n\n\n"),
    "blanks in the empty line": lambda text: text.replace("\n\n", "\n \n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_prompt_in_any_form_is_the_same_turns(form: str) -> None:
    """As a prompt beside texts or messages, as a transcript, and as a prompt to train on."""
    write = FORMS[form]
    prompt = MULTI.rstrip()
    expected = parse_row({side: f"{prompt} {side}" for side in ("chosen", "rejected")})
    assert [turn["content"] for turn in expected.messages] == ["First?", "Middle.", "Second?"]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert (
        parse_row({side: write(f"{prompt} {side}") for side in ("chosen", "rejected")}) == expected
    )
    assert (
        parse_row({"prompt": write(prompt), "chosen": "chosen", "rejected": "rejected"}) == expected
    )
    assert parse_row({"prompt": write(prompt), **answers}) == expected
    assert parse_turns(write(prompt)) == parse_prompt(write(prompt)) == expected.messages
    assert parse_turns(write(prompt.removesuffix("Assistant:"))) == expected.messages


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Human: Human: Hi\n\nAssistant:", "still starts with `Human:`"),
        ("Who?\n\nAssistant:", "ends with `Assistant:`"),
        ("A story.\n\nHuman: Hi\n\nAssistant:", "ends with `Assistant:`"),
        ("A story.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Ha", "more turns follow inside a text"),
        ([{"role": "user", "content": "Human: Hi"}], "still starts with `Human:`"),
        ([{"role": "user", "content": "Hi Assistant:"}], "ends with `Assistant:`"),
        ([{"role": "user", "content": "Hi\n\nHuman: Ho"}], "more turns follow inside a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "not a list of messages",
        ),
        (7, "the prompt is a number"),
        (["Hi"], "not a list of messages"),
        ([], "not a list of messages"),
    ],
)
def test_a_label_that_is_left_in_a_text_is_a_fault(prompt: Any, words: str) -> None:
    assert words in reason({"prompt": prompt, "chosen": "a", "rejected": "b"})
    assistant = [{"role": "assistant", "content": text} for text in ("a", "b")]
    if isinstance(prompt, list):
        assert (
            words
            in reason({"chosen": [*prompt, assistant[0]], "rejected": [*prompt, assistant[1]]})
            or not prompt
        )


def test_a_turn_inside_a_reply_is_a_fault_in_every_form() -> None:
    reply = "Yes.\n\nHuman: And?\n\nAssistant: No."
    question = {"role": "user", "content": "Q?"}
    for row in (
        {"prompt": "Q?", "chosen": reply, "rejected": "b"},
        {"prompt": "Human: Q?\n\nAssistant:", "chosen": "b", "rejected": reply},
        {"prompt": [question], "chosen": reply.replace("\n", "\r\n"), "rejected": "b"},
        {
            side: [question, {"role": "assistant", "content": text}]
            for side, text in (("chosen", reply), ("rejected", "b"))
        },
        {
            "chosen": f"\n\nHuman: Q?\n\nAssistant: {reply}",
            "rejected": "\n\nHuman: Q?\n\nAssistant: b",
        },
    ):
        assert "more turns follow" in reason(row)


def test_messages_are_compared_by_role_and_content() -> None:
    system, question = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Why?"},
    )
    answers = [{"role": "assistant", "content": text} for text in ("Because.", "No idea.")]
    expected = Parsed([system, question], {"chosen": "Because.", "rejected": "No idea."})
    marked = {
        **question,
        "id": 7,
        "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y? "}],
    }
    for prompt, before in (
        ([system, question], []),
        ([system, question], [marked]),
        ([system, question], [system, marked]),
        ([system], [marked]),
        (None, [system, marked]),
        ("Why?", [system, question]),
    ):
        row = {"prompt": prompt, "chosen": [*before, answers[0]], "rejected": [*before, answers[1]]}
        assert parse_row(row) == expected, (prompt, before)


def test_missing_columns_are_named() -> None:
    words = reason({"prompt": "Q?", "response": "A.", "helpfulness": 3})
    assert "missing: `chosen`, `rejected`. The columns are prompt, response, helpfulness" in words
    assert "--category NAME=COLUMN" in words
    assert "`chosen` is a number" in reason({"prompt": "Q?", "chosen": 1, "rejected": "b"})
    reason({"half \ud83d": 1}).encode()


def rows_of(num: int) -> list[dict[str, str]]:
    return [
        {side: f"\n\nHuman: Q{i}?\n\nAssistant: {side} {i}." for side in ("chosen", "rejected")}
        for i in range(num)
    ]


def test_every_line_of_a_file_is_used_or_named(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_of(4)]
    path = tmp_path / "raw.jsonl"
    path.write_bytes(
        "\n".join(
            [lines[0], "{broken", "[1]", lines[1], "", lines[0], "[" * 200_000, lines[2]]
        ).encode()
        + b'\n"\xff"\n'
        + lines[3].encode()
    )
    pairs, rejected = read(path)
    assert [(line_of(pair), pair.responses["chosen"]) for pair in pairs] == [
        (i, f"chosen {n}.") for n, i in enumerate((1, 4, 8, 10))
    ]
    assert [(line_of(row), row.reason) for row in rejected] == [
        (2, "not valid JSON in UTF-8"),
        (3, "not a JSON object"),
        (6, "the same as an earlier row"),
        (7, "not valid JSON in UTF-8"),
        (9, "not valid JSON in UTF-8"),
    ]
    assert rejected[2].detail == "raw.jsonl, line 1"


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


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("test", "heldout"),
        ("heldout", "heldout"),
        ("validation", "heldout"),
        ("test-00000-of-00002", "heldout"),
        ("testimonials", ""),
        ("evaluations", ""),
        ("trains", ""),
        ("device", ""),
        ("trained_by_hand", ""),
        ("validity", ""),
    ],
)
def test_a_file_is_a_split_by_its_whole_name(name: str, split: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(2)))
    assert {pair.split for pair in read(tmp_path)[0]} == {split}


def test_broken_text_in_parquet_costs_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {side: [row[side].encode() for row in rows_of(5)] for side in ("chosen", "rejected")}
    columns["chosen"][2] += b"\xff"
    arrays = {
        name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
        for name, values in columns.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(arrays), tmp_path / "raw.parquet")
    pairs, rejected = read(tmp_path / "raw.parquet")
    assert [line_of(pair) for pair in pairs] == [1, 2, 4, 5]
    assert rejected == [LeftOut(place=Place("raw.parquet", 3), reason="bytes that are not UTF-8")]
    assert str(rejected[0]) == "raw.parquet, row 3: bytes that are not UTF-8"


def test_sources_that_cannot_be_read_are_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows_of(500)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("cut.jsonl.gz", "cannot read"),
        ("bad.parquet", "cannot read"),
        ("notes.txt", "a source is a"),
        ("empty", "a source is a"),
        ("missing file", "no source"),
        ("owner/missing", "no source"),
    ):
        source = name if name == "owner/missing" else str(tmp_path / name)
        with pytest.raises(UserError, match=message):
            read_pairs(source, [])


@needs_shared
def test_published_transcripts_come_back_exactly(tmp_path: Path) -> None:
    lines = (SHARED / "data/helpful-base/probe_train.jsonl").read_text("utf-8").splitlines()
    published = [json.loads(line) for line in lines]
    path = tmp_path / "raw.jsonl"
    rows = [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in published
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pairs, rejected = read(path)
    assert [(line_of(row), row.reason) for row in rejected] == [
        (248, "an empty response"),
        (366, "the sides part before the last turn: more turns follow in one of them"),
    ]
    assert len(pairs) + len(rejected) == len(published) == 500
    rendered = PromptFormat("hh")
    same = 0
    for pair in pairs:
        row = published[line_of(pair) - 1]
        assert pair.responses == {side: row[side].strip() for side in ("chosen", "rejected")}
        same += rendered.render(pair.messages).text == row["prompt"].rstrip()
    assert same >= 478  # the others have stray white space inside a turn, which is stripped


def recount(path: Path) -> dict[int, str]:
    """By line: what an HH file holds, read by the shortest rule that can be written down, without
    our parser."""
    seen: dict[tuple[str, ...], int] = {}
    kinds = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            sides = [
                "\n\n" + row[name].replace("\r\n", "\n").lstrip() for name in ("chosen", "rejected")
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            kinds[number] = "no pair"
            continue
        cut = 0  # the last label of the assistant up to which the sides are equal
        while (after := sides[0].find("\n\nAssistant:", cut) + 12) > 11 and sides[1].startswith(
            sides[0][:after]
        ):
            cut = after
        prompt, answers = sides[0][:cut], [side[cut:] for side in sides]
        turns = [part.strip() for part in prompt.split("\n\nHuman:")[1:]]
        last_turn = turns[-1].removesuffix("Assistant:").strip() if turns else ""
        is_fault = (
            not last_turn
            or not all(map(str.strip, answers))
            or answers[0].strip() == answers[1].strip()
            or any("\n\nHuman:" in side or "\n\nAssistant:" in side for side in answers)
            or any(turn.startswith("Human:") for turn in turns)
            or last_turn.endswith("Assistant:")
            or any("\ud800" <= letter <= "\udfff" for side in sides for letter in side)
        )
        key = (prompt, *map(str.strip, answers))
        kinds[number] = "no pair" if is_fault else "repeated" if key in seen else "pair"
        if not is_fault:
            seen.setdefault(key, number)
    return kinds


def dirty_rows(num_rows: int) -> list[str]:
    """HH rows as they come: most are sound, and there is one of each fault that was ever seen,
    again and again."""
    generator = random.Random(5)
    lines = []
    for i in range(num_rows):
        texts = [
            f"Question {i} of {generator.randrange(9)}?",
            f"Which one, {i}?",
            f"The {i % 7}th.",
        ][: 1 + 2 * (i % 2)]
        row = {side: transcript(texts, f"{side} {i}") for side in ("chosen", "rejected")}
        fault = generator.randrange(40)
        lines.append(
            json.dumps(
                {
                    0: {**row, "rejected": row["chosen"]},
                    1: {**row, "chosen": transcript(texts, "")},
                    2: {**row, "rejected": row["rejected"] + "\n\nHuman: More?\n\nAssistant: No."},
                    3: {side: transcript(["Human: " + texts[0]], side) for side in row},
                    4: {side: text.replace("\n", "\r\n") for side, text in row.items()},
                    5: {side: text.strip() for side, text in row.items()},
                    6: {**row, "chosen": row["chosen"] + " \ud83d"},
                    7: {"prompt": "x"},
                    8: {**row, "chosen": None},
                    9: {**row, "chosen": i},
                    10: [row],
                    11: {side: transcript(["  "], side) for side in row},
                    12: {side: transcript([f"Only {side}?"], side) for side in row},
                }.get(fault, row)
            )
        )
        if fault in (13, 14, 15):
            lines[-1] = {13: lines[-1][:-5], 14: "", 15: lines[generator.randrange(len(lines))]}[
                fault
            ]
    return lines


@pytest.mark.parametrize("kind", ["made up", "published"])
def test_every_row_is_a_doc_or_named_by_an_independent_count(kind: str, tmp_path: Path) -> None:
    """Line by line, all the way through the plan of a set: nothing is lost and nothing is counted
    twice."""
    path = tmp_path / "raw.jsonl"
    if kind == "made up":
        path.write_text("\n".join(dirty_rows(2312)) + "\n", "utf-8")
    else:
        published = SHARED / "data/helpful-base/probe_train.jsonl"
        if not published.is_file():
            pytest.skip("the development data in ../shared is not here")
        rows = [json.loads(line) for line in published.read_text("utf-8").splitlines()]
        path.write_text(
            "".join(
                json.dumps(
                    {
                        side: row["prompt"] + row[name]
                        for side, name in (("chosen", first), ("rejected", second))
                    }
                )
                + "\n"
                for row in rows
                for first, second in (("chosen", "rejected"), ("rejected", "chosen_initial"))
            )
        )
    expected = recount(path)
    pairs, rejected = read(path)
    assert {line_of(pair) for pair in pairs} == {
        line for line, what in expected.items() if what == "pair"
    }
    assert {line_of(row) for row in rejected if row.reason == "the same as an earlier row"} == {
        line for line, what in expected.items() if what == "repeated"
    }
    options = SynthRun(source=str(path), out=path.parent, categories=("random",), heldout_frac=0.2)
    plan = plan_set(options, [])
    docs = finish_docs(plan, write_texts(plan, lambda *_: iter(())))
    used, left_out = (
        [line_of(doc) for doc in docs],
        [line_of(item) for item in plan.left_out],
    )
    assert sorted(used + left_out) == sorted(expected)
    assert all(
        item.reason and item.place and item.place.file == "raw.jsonl" for item in plan.left_out
    )
    assert plan.num_rows == len(expected)
    assert len(used) > 0.6 * len(expected)
