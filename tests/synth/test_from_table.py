"""A probe set from a table: nothing is lost without a word."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.probe_set import load_probe_set
from sft_probe.synth.hh import parse_prompt
from sft_probe.synth.table import write_probe_set


def table(path: Path, num_rows: int = 12) -> Path:
    rows = [
        {
            "q": f"\n\nHuman: Question {i}?\n\nAssistant: Which?\n\nHuman: That one, {i}.\n\n"
            "Assistant:",
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
def test_every_kind_of_table_becomes_a_valid_probe_set(
    suffix: str, tmp_path: Path, sft_probe: Run
) -> None:
    source = table(tmp_path / f"t.{suffix}")
    result = sft_probe(
        "probe-set",
        "--from-table",
        source,
        "--prompt",
        "q",
        "--category",
        "chosen=good",
        "--category",
        "rejected=bad",
        "--heldout",
        4,
        "--out",
        tmp_path / "set",
    )
    assert result.returncode == 0, result.stderr
    assert "t-00004): empty rejected" in result.stderr
    assert "t-00006): an empty prompt" in result.stderr
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
    flags = ("--from-table", source, "--prompt", "q", "--category", "chosen=good", "--heldout", 4)
    for name, seed in (("a/set", 1), ("b/set", 1), ("c/set", 2)):
        assert (
            sft_probe("probe-set", *flags, "--seed", seed, "--out", tmp_path / name).returncode == 0
        )
    first, second, third = (
        (tmp_path / name / "set" / "train.jsonl").read_bytes() for name in "abc"
    )
    assert first == second != third
    hashes = [json.loads((tmp_path / name / "set" / "probe_set.json").read_text()) for name in "ab"]
    assert hashes[0] == hashes[1]


def test_rows_of_one_conversation_stay_in_one_split(tmp_path: Path, sft_probe: Run) -> None:
    frame = pd.DataFrame(
        {"q": [f"Question {i // 3}?" for i in range(30)], "a": [f"Answer {i}." for i in range(30)]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    result = sft_probe(
        "probe-set",
        "--from-table",
        tmp_path / "t.csv",
        "--prompt",
        "q",
        "--category",
        "chosen=a",
        "--heldout",
        10,
        "--out",
        tmp_path / "set",
    )
    assert result.returncode == 0, result.stderr
    probe_set = load_probe_set(str(tmp_path / "set"))
    assert len(probe_set.of_split("heldout")) == 12


def test_bad_tables_are_user_errors(tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / "t.csv")
    base = ("probe-set", "--from-table", source, "--out", tmp_path / "set")
    assert "has no column nope" in user_error(
        sft_probe(*base, "--prompt", "nope", "--category", "chosen=good")
    )
    assert "--from-table needs" in user_error(sft_probe(*base, "--prompt", "q"))
    assert "--heldout 50: only" in user_error(
        sft_probe(*base, "--prompt", "q", "--category", "chosen=good", "--heldout", 50)
    )
    missing = ("probe-set", "--from-table", tmp_path / "no.csv", "--out", tmp_path / "set")
    assert "no.csv does not exist" in user_error(
        sft_probe(*missing, "--prompt", "q", "--category", "chosen=good")
    )


CASES = SHARED / "cases/synth"
SIDES = ("--category", "chosen=chosen", "--category", "rejected=rejected")


def write_csv(path: Path, rows: list[str], header: str = "prompt,chosen,rejected") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return path


def csv_rows(num_rows: int = 20) -> list[str]:
    return [f'"Question {i}, and {i * i}?","Good\n{i}.",Bad {i}.' for i in range(num_rows)]


@pytest.mark.parametrize(
    ("place", "row", "message"),
    [
        (0, "Question, unquoted?,Good.,Bad.", "line 2: 4 fields, but the header has 3"),
        (7, "Question?,Good.", "line 16: 2 fields, but the header has 3"),
        (19, "Question?,Good.,Bad.,", "line 40: 4 fields, but the header has 3"),
        (19, '"Never closed,Good.,Bad.', "not valid CSV"),
        (3, 'A "quote"?,"Good" or not,Bad.', "line 8: not valid CSV"),
    ],
)
def test_a_row_with_other_fields_than_the_header_is_refused(
    place: int, row: str, message: str, tmp_path: Path, sft_probe: Run
) -> None:
    """Nothing is shifted, and nothing written. Rows of two lines each stand before: lines are
    counted, not rows."""
    rows = csv_rows()
    rows[place] = row
    flags = (
        "--from-table",
        write_csv(tmp_path / "t.csv", rows),
        "--prompt",
        "prompt",
        *SIDES,
        "--heldout",
        5,
    )
    assert message in user_error(sft_probe("probe-set", *flags, "--out", tmp_path / "set"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("encoding", "separator", "message"),
    [
        ("utf-16", ",", "line 1: not UTF-8"),
        ("utf-16-le", ",", "line 1: not UTF-8"),
        ("utf-8", ";", "line 1: no commas between the columns"),
        ("utf-8", "\t", "line 1: no commas between the columns"),
    ],
)
def test_a_table_of_another_encoding_or_separator_is_named_as_such(
    encoding: str, separator: str, message: str, tmp_path: Path, sft_probe: Run
) -> None:
    rows = [
        separator.join(("prompt", "chosen")),
        *(separator.join((f"Q, {i}?", f"Good {i}.")) for i in range(20)),
    ]
    (tmp_path / "t.csv").write_bytes("\n".join(rows).encode(encoding))
    result = sft_probe(
        "probe-set",
        "--from-table",
        tmp_path / "t.csv",
        "--prompt",
        "prompt",
        "--category",
        "chosen=chosen",
        "--out",
        tmp_path / "set",
    )
    assert message in user_error(result)
    assert not (tmp_path / "set").exists()


def test_cells_without_text_are_named_with_their_line(tmp_path: Path, sft_probe: Run) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Q {i}?", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(16)
    ]
    rows[2]["chosen"] = 7
    rows[3]["rejected"] = True
    rows[4]["chosen"] = "half \ud83d"
    rows[5]["prompt"] = "\n\nHuman: Human: Q?\n\nAssistant:"
    rows[6]["rejected"] = "No.\n\nHuman: And?\n\nAssistant: No."
    rows[7]["prompt"] = [
        {"role": "user", "content": [{"type": "text", "text": "In "}, {"text": "parts?"}]}
    ]
    rows[8]["chosen"] = "Assistant: labelled"
    del rows[9]["prompt"]
    rows[10]["prompt"] = "Question: who?\n\nAssistant:"
    text = "\ufeff" + "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "t.jsonl").write_text(text.replace("\n", "\n\n", 1) + "\n[1]\n{\n", "utf-8")
    flags = ("--from-table", tmp_path / "t.jsonl", "--prompt", "prompt", *SIDES, "--heldout", 3)
    result = sft_probe("probe-set", *flags, "--out", tmp_path / "set")
    assert result.returncode == 0, result.stderr
    for line, reason in [
        (4, "t-00003): chosen is a number, not text"),
        (5, "t-00004): rejected is true or false, not text"),
        (6, "t-00005): half a surrogate pair"),
        (7, "t-00006): a user's turn still starts with `Human:`"),
        (8, "t-00007): more turns follow inside a text"),
        (11, "t-00010): the prompt is missing"),
        (12, "t-00011): a user's turn still starts with `Human:` or ends with `Assistant:`"),
        (18, "t-00017): not a JSON object"),
        (19, "t-00018): not valid JSON"),
    ]:
        assert f"line {line} ({reason}" in result.stderr
    docs = {doc.doc_id: doc for doc in load_probe_set(str(tmp_path / "set")).docs}
    assert len(docs) == 9
    assert docs["t-00008"].messages[0]["content"] == "In parts?"
    assert docs["t-00009"].responses["chosen"] == "labelled"


def chat_rows(form: str) -> list[dict[str, Any]]:
    """Rows whose columns hold chat messages in one of the forms in which they are published."""
    rows = []
    for i in range(12):
        system = {"role": "system", "content": "Be brief."}
        question = {"role": "user", "content": f"Question {i}?"}
        sides = {
            side: {"role": "assistant", "content": f"{side} {i}."}
            for side in ("chosen", "rejected")
        }
        whole = {side: [system, question, answer] for side, answer in sides.items()}
        forms: dict[str, dict[str, Any]] = {
            "prompt and answers": {
                "prompt": [system, question],
                **{side: [answer] for side, answer in sides.items()},
            },
            "whole conversations": {"prompt": whole["chosen"], **whole},
            "prompt and conversations": {"prompt": [system, question], **whole},
            "texts as answers": {
                "prompt": [system, question],
                **{side: answer["content"] for side, answer in sides.items()},
            },
        }
        rows.append(forms[form])
    return rows


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize(
    "form",
    [
        "prompt and answers",
        "whole conversations",
        "prompt and conversations",
        "texts as answers",
    ],
)
def test_chat_messages_in_a_table_are_turns_and_responses(
    form: str, suffix: str, tmp_path: Path
) -> None:
    path, rows = tmp_path / f"t.{suffix}", chat_rows(form)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:  # a list is written as JSON
        as_text = [
            {
                name: json.dumps(value) if isinstance(value, list) else value
                for name, value in row.items()
            }
            for row in rows
        ]
        pd.DataFrame(as_text).to_csv(path, index=False)
    left_out = write_probe_set(
        path,
        tmp_path / "set",
        prompt_column="prompt",
        categories={"chosen": "chosen", "rejected": "rejected"},
        prompt_format="chat",
        heldout=4,
        limit=None,
        seed=0,
    )
    assert not left_out
    docs = {doc.doc_id: doc for doc in load_probe_set(str(tmp_path / "set")).docs}
    assert len(docs) == 12
    assert [turn["role"] for turn in docs["t-00003"].messages] == ["system", "user"]
    assert docs["t-00003"].messages[1]["content"] == "Question 2?"
    assert docs["t-00003"].responses["rejected"] == "rejected 2."


def test_a_response_to_another_prompt_is_left_out(tmp_path: Path) -> None:
    rows = chat_rows("whole conversations")
    rows[3]["rejected"] = rows[4]["rejected"]
    rows[5]["chosen"] = rows[5]["chosen"][:-1]
    rows[6]["chosen"] = [{"role": "robot", "content": "Beep."}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    left_out = write_probe_set(
        path,
        tmp_path / "set",
        prompt_column="prompt",
        categories={"chosen": "chosen", "rejected": "rejected"},
        prompt_format="chat",
        heldout=3,
        limit=None,
        seed=0,
    )
    assert list(map(str, left_out)) == [
        "t.jsonl, line 4 (t-00004): the messages of rejected before its last one are not the "
        "prompt's",
        "t.jsonl, line 6 (t-00006): the last message is not the assistant's",
        't.jsonl, line 7 (t-00007): not a list of messages {"role", "content"}',
    ]


def test_bytes_that_are_not_utf8_leave_out_their_row(tmp_path: Path, sft_probe: Run) -> None:
    path = write_csv(tmp_path / "t.csv", csv_rows(12))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"Bad 4", b"Bad \xe9"))
    result = sft_probe(
        "probe-set",
        "--from-table",
        path,
        "--prompt",
        "prompt",
        *SIDES,
        "--heldout",
        4,
        "--out",
        tmp_path / "set",
    )
    assert result.returncode == 0, result.stderr
    assert "line 10 (t-00005): bytes that are not UTF-8" in result.stderr
    assert len(load_probe_set(str(tmp_path / "set")).docs) == 11


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (("doc_id=chosen",), "--category doc_id: a probe set has a column of this name"),
        (("split=chosen",), "--category split: a probe set has a column of this name"),
        (("meta=chosen",), "--category meta: a probe set has a column of this name"),
        (("chosen=chosen", "chosen=rejected"), "names a category twice"),
        (("Chosen=chosen",), "use lower-case letters"),
        (("train_chosen=chosen",), "do not start with `train_`"),
        (("a-b=chosen",), "use lower-case letters"),
    ],
)
def test_names_that_a_set_cannot_have_are_refused(
    categories: tuple[str, ...], message: str, tmp_path: Path, sft_probe: Run
) -> None:
    named = [flag for category in categories for flag in ("--category", category)]
    flags = (
        "--from-table",
        write_csv(tmp_path / "t.csv", csv_rows()),
        "--prompt",
        "prompt",
        *named,
        "--heldout",
        5,
    )
    assert message in user_error(sft_probe("probe-set", *flags, "--out", tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_an_output_directory_that_exists_is_refused(tmp_path: Path, sft_probe: Run) -> None:
    """A finished set, somebody's files and a file are left as they are; an empty directory will
    do."""
    flags = (
        "--from-table",
        write_csv(tmp_path / "t.csv", csv_rows()),
        "--prompt",
        "prompt",
        *SIDES,
        "--heldout",
        5,
    )
    (tmp_path / "set").mkdir()
    assert sft_probe("probe-set", *flags, "--out", tmp_path / "set").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    assert {path.name for path in before} == {"train.jsonl", "heldout.jsonl", "probe_set.json"}
    assert "is not empty (it holds heldout.jsonl" in user_error(
        sft_probe("probe-set", *flags, "--seed", 1, "--out", tmp_path / "set")
    )
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert "is not empty" in user_error(sft_probe("probe-set", *flags, "--out", tmp_path))
    assert "is a file" in user_error(sft_probe("probe-set", *flags, "--out", tmp_path / "t.csv"))


def test_a_table_of_one_conversation_is_refused(tmp_path: Path, sft_probe: Run) -> None:
    rows = [f"same prompt,good {i},bad {i}" for i in range(20)] + ["another,good,bad"]
    flags = (
        "--from-table",
        write_csv(tmp_path / "t.csv", rows),
        "--prompt",
        "prompt",
        *SIDES,
        "--heldout",
        5,
    )
    message = user_error(sft_probe("probe-set", *flags, "--out", tmp_path / "set"))
    assert (
        "each split needs 2. Whole conversations are held out, and the 21 docs are of 2" in message
    )
    assert not (tmp_path / "set").exists()


def test_appended_moved_and_missing_rows_leave_every_doc_in_its_split(
    tmp_path: Path, sft_probe: Run
) -> None:
    rows = csv_rows(60)

    def splits(name: str, rows: list[str], *flags: object) -> dict[str, str]:
        path = write_csv(tmp_path / f"{name}.csv", rows)
        result = sft_probe(
            "probe-set",
            "--from-table",
            path,
            "--prompt",
            "prompt",
            *SIDES,
            *flags,
            "--out",
            tmp_path / name,
        )
        assert result.returncode == 0, result.stderr
        return {
            doc.messages[0]["content"]: doc.split
            for doc in load_probe_set(str(tmp_path / name)).docs
        }

    counted = splits("counted", rows, "--heldout", 12)
    assert list(counted.values()).count("heldout") == 12
    threshold = json.loads((tmp_path / "counted/probe_set.json").read_text())["provenance"][
        "split"
    ]["threshold"]
    assert splits("limited", rows, "--heldout", 12, "--limit", 30).items() <= counted.items()
    assert splits("reversed", rows[::-1], "--heldout", 12) == counted
    grown = splits("grown", csv_rows(90)[30:][::-1] + rows[:30], "--heldout", threshold)
    assert counted.items() <= grown.items()
    assert len(grown) == 90
    assert (
        splits("few", rows[::2], "--heldout", threshold, "--limit", 25).items() <= counted.items()
    )


@needs_shared
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t_first_row_extra.csv", "line 2: 5 fields, but the header has 4"),
        ("t_one_conv_plus.csv", "each split needs 2"),
        (
            "t_jsonl_surrogate.jsonl",
            "half a surrogate pair, which is no Unicode text (20, first in t_jsonl",
        ),
        (
            "t_jsonl_num.jsonl",
            "chosen is a number, not text (20, first in t_jsonl_num.jsonl, line 1)",
        ),
        ("helpsteer.jsonl", "has no column chosen, rejected; it has prompt, response"),
        ("t_jsonl_bom.jsonl", None),
        ("t_crlf_hh.csv", None),
        ("prompt_hh_stripped.jsonl", None),
        ("resp_label.jsonl", None),
    ],
)
def test_tables_that_an_earlier_version_read_wrongly_are_read_right_or_refused(
    name: str, message: str | None, tmp_path: Path, sft_probe: Run
) -> None:
    result = sft_probe(
        "probe-set",
        "--from-table",
        CASES / name,
        "--prompt",
        "prompt",
        *SIDES,
        "--heldout",
        5,
        "--out",
        tmp_path / "set",
    )
    if message:
        assert message in user_error(result)
        assert not (tmp_path / "set").exists()
        return
    assert result.returncode == 0, result.stderr
    for doc in load_probe_set(str(tmp_path / "set")).docs:
        assert not any(
            "Human:" in turn["content"] or "Assistant:" in turn["content"] for turn in doc.messages
        )
        assert not any("Assistant:" in text for text in doc.responses.values())
        if "hh" in name:
            assert [turn["role"] for turn in doc.messages] == ["user", "assistant", "user"]


turns = (
    st.text(st.characters(codec="utf-8"), min_size=1)
    .map(str.strip)
    .filter(
        lambda text: (
            text and not any(part in text for part in ("\n\nHuman:", "\n\nAssistant:", "\r\n"))
        )
    )
)


@given(st.lists(turns, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2 == 1))
def test_hh_prompts_come_back_as_their_turns(texts: list[str]) -> None:
    names = ("Human", "Assistant")
    prompt = (
        "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(texts)) + "\n\nAssistant:"
    )
    assert [turn["content"] for turn in parse_prompt(prompt)] == texts
    assert [turn["role"] for turn in parse_prompt(prompt)] == [
        ("user", "assistant")[i % 2] for i in range(len(texts))
    ]


@given(st.text())
def test_any_other_prompt_is_one_turn_or_none(text: str) -> None:
    parsed = parse_prompt(text)
    assert not parsed or parsed[-1]["role"] == "user"


@needs_shared
def test_real_prompts_are_rendered_back_to_what_was_published() -> None:
    from sft_probe.prompts import PromptFormat

    lines = (SHARED / "data/helpful-base/probe_train.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    same = sum(
        PromptFormat("hh").render(parse_prompt(prompt)).text == prompt.rstrip()
        for prompt in prompts
    )
    assert len(prompts) == 500
    assert same >= 480  # the others have stray white space inside a turn, which is stripped


def test_a_small_table_holds_out_a_fifth_by_default(tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / "t.csv", 22)
    flags = ("--from-table", source, "--prompt", "q", "--out", tmp_path / "set")
    result = sft_probe("probe-set", *flags, "--category", "chosen=good", "rejected=bad")
    assert result.returncode == 0, result.stderr
    assert len(load_probe_set(str(tmp_path / "set")).of_split("heldout")) == 4
    assert f"wrote {tmp_path / 'set'}; next: sft-probe train --probe_set" in result.stderr


def test_a_set_without_chosen_says_what_it_cannot_do(tmp_path: Path, sft_probe: Run) -> None:
    source = table(tmp_path / "t.csv")
    flags = ("--from-table", source, "--prompt", "q", "--out", tmp_path / "set")
    result = sft_probe("probe-set", *flags, "--category", "good=good", "bad=bad")
    assert "! no category `chosen`" in result.stdout
    assert "next: sft-probe train --probe_set" in result.stderr
    assert "--train_category good" in result.stderr
