"""Changes by word: nothing is lost or made up, and what was planted is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers import Run
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.analysis.stats.runs import Recording, load_recording
from sft_probe.analysis.stats.tokens import token_ends, token_texts
from sft_probe.analysis.studies.lexicon import CLASSES, pieces, spread
from sft_probe.analysis.studies.words import words
from sft_probe.errors import UserError


@given(st.text(max_size=80))
def test_pieces_cover_a_text_without_a_gap(text: str) -> None:
    parts = pieces(text)
    assert "".join(text[part.start : part.end] for part in parts) == text
    assert all(part.kind in CLASSES for part in parts)
    assert sum(part.kind == "first" for part in parts) == bool(text.strip())


@given(text=st.text(min_size=1, max_size=60), data=st.data())
def test_spreading_over_pieces_keeps_the_sum(text: str, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=20)))
    values = data.draw(
        st.lists(st.floats(-50, 50), min_size=len(ends), max_size=len(ends)).map(np.array)
    )
    spread_out = spread(values, ends, pieces(text))
    assert spread_out.sum() == pytest.approx(values.sum(), abs=1e-9)


def test_a_token_across_two_pieces_is_divided_by_its_characters() -> None:
    parts = pieces("ab cde")
    assert [part.literal for part in parts] == ["ab", "cde"]
    np.testing.assert_allclose(spread(np.array([6.0]), [6], parts), [2.0, 4.0])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (
            "Yes, the dog barks.",
            "first|punctuation|function word|content word|content word|punctuation",
        ),
        ("# Hi\n\n42 **dogs**", "first|content word|white space|number|markup|content word|markup"),
        ("Well... don't!", "first|punctuation|function word|punctuation"),
        ("Tee 3.50% <b>", "first|number|markup"),
        ("我 你好", "first|content word|content word"),
    ],
)
def test_each_piece_of_a_text_has_its_class_of_word(text: str, kinds: str) -> None:
    assert "|".join(part.kind for part in pieces(text)) == kinds


@pytest.fixture(scope="session")
def recording(swept_run: Path) -> Recording:
    return load_recording(swept_run)


def test_token_ends_agree_with_the_texts_of_the_tokens(recording: Recording) -> None:
    for doc_id, texts in list(recording.texts.items())[:20]:
        for category, response in texts.items():
            ends = token_ends(recording, doc_id, category)
            parts = token_texts(recording, doc_id, category)
            if not parts:
                continue
            assert ends[-1] == len(response)
            joined = "".join(parts)
            assert joined.endswith(response)
            before = len(joined) - len(response)
            lengths = np.cumsum([len(part) for part in parts]) - before
            assert ends == list(np.maximum(lengths, 0))


def test_classes_add_up_to_the_change_with_the_terminator(recording: Recording) -> None:
    found = words(recording)
    table = recording.rows.query("split == 'heldout'")
    for category, part in found.pieces.groupby("category"):
        by_doc = part.groupby("doc_id")["change"].sum()
        cell = table[table["category"] == category].pivot(
            index="doc_id", columns="step", values="logprob_with_eos"
        )
        expected = cell[found.last_step] - cell[found.first_step]
        np.testing.assert_allclose(by_doc, expected.loc[by_doc.index], atol=1e-6)
        classes = found.classes[found.classes["category"] == category]
        assert classes["change"].sum() == pytest.approx(expected.mean(), abs=1e-6)
        assert list(classes["kind"]) == list(CLASSES)


def planted(recording: Recording, word: str, gain: float) -> Recording:
    """Return the recording with last-step rows like the first, but for a gain on one word."""
    rows = recording.rows[recording.rows["split"] == "heldout"].copy()
    assert recording.tokens is not None
    tokens = [list(values.as_py() or []) for values in recording.tokens["token_logprobs"]]
    last = rows["step"].max()
    first = rows[rows["step"] == rows["step"].min()].reset_index()
    at_first = first.set_index(["doc_id", "category"])["index"]
    for index, row in rows[rows["step"] == last].iterrows():
        doc_id, category = row["doc_id"], row["category"]
        start = int(at_first[(doc_id, category)])
        tokens[int(index)] = list(tokens[start])
        rows.loc[index, "logprob_eos"] = float(first.set_index("index")["logprob_eos"].loc[start])
        ends = token_ends(recording, doc_id, category)
        for part in pieces(recording.texts[doc_id][category]):
            if part.literal == word:
                for number, end in enumerate(ends):
                    begin = ends[number - 1] if number else 0
                    inside = min(end, part.end) - max(begin, part.start)
                    if inside > 0:
                        tokens[int(index)][number] += gain * inside / (part.end - part.start)
    return replace(recording, rows=rows, tokens=pa.table({"token_logprobs": tokens}))


def test_a_gain_on_one_word_alone_is_found_there_and_nowhere_else(recording: Recording) -> None:
    found = words(planted(recording, "the", 1.0))
    literals = found.literals[found.literals["category"] == "chosen"].set_index("literal")
    assert literals.index[0] == "the"
    assert literals.loc["the", "change"] == pytest.approx(1.0, abs=0.1)
    assert literals.drop("the")["change"].abs().max() < 0.1
    classes = found.classes[found.classes["category"] == "chosen"].set_index("kind")
    assert classes["change"].idxmax() == "function word"
    sequences = found.sequences[found.sequences["category"] == "chosen"]
    assert len(sequences)
    has_the = sequences["literal"].str.split().map(lambda names: "the" in names)
    assert (sequences.loc[~has_the, "change"].abs() < 0.1).all()


def test_runs_without_what_is_needed_are_refused(recording: Recording) -> None:
    with pytest.raises(UserError, match="no token log-probs of two steps"):
        words(replace(recording, tokens=None))
    with pytest.raises(UserError, match="step 3 was not scored"):
        words(recording, step=3)
    with pytest.raises(UserError, match="probe set or manifest is not here"):
        words(replace(recording, probe_set=None))


def test_the_command_prints_classes_and_writes_tables(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe("words", swept_run, "--categories", "chosen", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "chosen: +" in result.stdout
    assert "content word" in result.stdout
    classes = pd.read_csv(tmp_path / "words_classes.csv")
    assert set(classes["category"]) == {"chosen"}
    assert (tmp_path / "words_literals.csv").exists()
