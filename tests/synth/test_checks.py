"""Splits share nothing, and faulty texts are seen for what they are."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasketch import MinHash, MinHashLSH
from helpers import SHARED, needs_shared
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc, LeftOut
from sft_probe.synth import duplicates
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.categories import (
    KINDS,
    load_templates,
    make_requests,
    permuted,
    read_topics,
    topic_of,
)
from sft_probe.synth.checks import fault_of, has_length, is_near_copy
from sft_probe.synth.duplicates import count_words, near_duplicates, shingles
from sft_probe.synth.splits import (
    choose_threshold,
    clusters,
    split_docs,
    split_of,
)
from sft_probe.synth.writers.offline import OfflineWriter

CHOSEN = (
    "You could rinse the rice first, use a little less water, and let it stand for ten minutes "
    "with the lid on."
)
REJECTED = (
    "Rice is hard to cook and many people buy a machine for it, so maybe you should look at one in "
    "a shop."
)
TEMPLATES = load_templates(KINDS, None)


def pair(number: int, prompt: str, *, split: str = "", **texts: str) -> Doc:
    return Doc(
        doc_id=f"d{number}",
        conversation_id=prompt,
        split=split,
        messages=({"role": "user", "content": prompt},),
        responses={
            side: texts.get(side, f"{side.capitalize()} answer {number}.")
            for side in ("chosen", "rejected")
        },
    )


def fault(
    text: str | None, category: str = "paraphrase", status: str = "ok", rejected: str = REJECTED
) -> str | None:
    doc = pair(1, "How do I cook rice?", chosen=CHOSEN, rejected=rejected)
    request = make_requests(doc, {category: TEMPLATES[category]}, "a bee at dawn")[0]
    return fault_of(request, Answer(status=status, raw="{}", text=text), doc, TEMPLATES[category])


GOOD = (
    "Cooking rice is difficult, which is why a lot of folks purchase a cooker; perhaps visit a "
    "store and see."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, None),
        (f"Here is a paraphrase: {GOOD}", "leak"),
        (f"Sure, here is a random sentence with 20 words: {GOOD}", "leak"),
        (f"Certainly! Here's the rewritten text:\n\n{GOOD}", "leak"),
        (f"**Paraphrase:** {GOOD}", "leak"),
        (f"<text>{GOOD}</text>", "leak"),
        (f"{GOOD} (20 words)", "leak"),
        (f"Rewrite the text between the tags in other words. {GOOD}", "leak"),
        (
            "I'm sorry, but I cannot rewrite this text, because it goes against the rules of my "
            "use.",
            "refusal",
        ),
        (
            "As an AI language model, my knowledge of cooking rice is small, so do ask a cook "
            "about it.",
            "refusal",
        ),
        (
            "I apologize, but rice is a subject that would be better left to people who cook it "
            "often.",
            "refusal",
        ),
        (GOOD.removesuffix("see.") + "then you could", "cut off"),
        (REJECTED.replace("machine", "cooker"), "near-copy"),
        (CHOSEN.upper(), "near-copy"),
        ("Buy one.", "length"),
        (f"{GOOD} " * 3, "length"),
        (
            f"Some ways that people cook rice well at home:\n- {GOOD[:50]}\n- with a machine from "
            "a shop",
            None,
        ),
        (
            "Sure! Here are some ideas: rinse it, soak it, steam it, or simply buy the cooked sort "
            "at a shop.",
            None,
        ),
        (" ", "empty"),
        (None, "empty"),
    ],
)
def test_each_fault_of_a_paraphrase_is_found(text: str | None, expected: str | None) -> None:
    assert fault(text) == expected


DATA = Path(__file__).parents[1] / "data"


def labelled(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def found_in(row: dict[str, str]) -> str | None:
    """The fault of a labelled text, written for another question, in the length that was asked
    for."""
    chosen = "Ask somebody who has done it before, and take your time over every single step of it."
    doc = pair(1, "What would you do?", chosen=chosen, rejected=row.get("source", REJECTED))
    request = make_requests(doc, {row["category"]: TEMPLATES[row["category"]]}, "a bee at dawn")[0]
    request = replace(request, num_words=count_words(row["text"]))
    return fault_of(
        request, Answer(status="ok", raw="{}", text=row["text"]), doc, TEMPLATES[row["category"]]
    )


@pytest.mark.parametrize("name", ["check_texts", "check_texts_heldout"])
@pytest.mark.parametrize("kind", ["good", "leak", "refusal", "near-copy", "cut-off"])
def test_at_most_a_tenth_of_labelled_texts_is_missed_or_wrongly_refused(
    name: str, kind: str
) -> None:
    """Texts in 25 languages; those of the second file were written before the checks, and no check
    was made for one."""
    rows = [row for row in labelled(name) if row["kind"] == kind]
    expected = {"good": None, "cut-off": "cut off"}.get(kind, kind)
    wrong = {row["text"]: found for row in rows if (found := found_in(row)) != expected}
    assert len(rows) >= (60 if name == "check_texts" else 17)
    assert len(wrong) <= 0.1 * len(rows), wrong


@needs_shared
def test_texts_of_a_real_model_pass_unless_they_have_a_fault() -> None:
    """Published rewrites of GPT-3.5: few are refused; what starts with "Sure! Here is a random
    sentence" is seen."""
    lines = (SHARED / "data/helpful-base/probe_train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for column, source in (("reject_gptsemantic", "rejected"), ("chosen_gptsemantic", "chosen")):
        faults = Counter(
            found_in({"category": "paraphrase", "text": row[column], "source": row[source]})
            for row in rows
            if row[source].strip()
        )
        assert faults[None] >= 0.95 * faults.total(), faults
    missed = [
        text
        for row in rows
        if re.search(r"random sentence with|\bI am unable|output sentence", text := row["irr_hum"])
        and found_in({"category": "non_response", "text": text}) not in ("leak", "refusal")
    ]
    assert len(missed) <= 8, missed


words_of_a_text = st.lists(st.integers(0, 400), min_size=20, max_size=80, unique=True)


@given(words_of_a_text, st.data())
def test_a_copy_is_one_with_a_few_words_changed_and_no_more(
    numbers: list[int], data: st.DataObject
) -> None:
    text = [f"word{number}" for number in numbers]
    places = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4, unique=True))
    changed = [f"other{i}" if i in places else word for i, word in enumerate(text)]
    assert is_near_copy(" ".join(changed), " ".join(text))
    assert is_near_copy(" ".join(text), " ".join(changed))
    half = [f"other{i}" if i % 2 else word for i, word in enumerate(text)]
    assert not is_near_copy(" ".join(half), " ".join(text))


@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: text.translate(
            str.maketrans("aeopcxy", "\u0430\u0435\u043e\u0440\u0441\u0445\u0443")
        ),
        lambda text: text.translate(str.maketrans("ov", "\u03bf\u03bd")),
        "\u200b".join,
        lambda text: "".join(
            chr(0x1D41A + ord(c) - 97) if c.isascii() and c.islower() else c for c in text
        ),
        lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text),
        lambda text: text.upper().replace(",", ""),
        lambda text: text.replace("e", "e\u0301"),
    ],
)
def test_a_disguised_copy_is_a_copy(disguise: Callable[[str], str]) -> None:
    assert disguise(CHOSEN) != CHOSEN
    assert is_near_copy(disguise(CHOSEN), CHOSEN)
    assert not is_near_copy(disguise(CHOSEN), REJECTED)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A text of six plain words.", 6),
        ("\u8fd9\u662f\u4e00\u4e2a\u5f88\u957f\u7684\u53e5\u5b50\u3002", 10),
        ("\u3053\u308c\u306f\u30c6\u30b9\u30c8\u3067\u3059", 8),
        ("\uc774\uac83\uc740 \uc2dc\ud5d8 \uc785\ub2c8\ub2e4.", 3),
        ("\u0e01" * 50, 10),
        ("The word \u6c34 means water.", 5),
    ],
)
def test_lengths_are_characters_where_a_script_has_no_blanks(text: str, number: int) -> None:
    assert count_words(text) == number
    assert has_length(text * 3, 3 * number)
    if number > 5:
        assert not has_length(text * 3, number)


@pytest.mark.parametrize("status", ["blocked", "truncated", "refused", "invalid", "error"])
def test_a_status_other_than_ok_is_the_fault(status: str) -> None:
    assert fault(GOOD, status=status) == status


def test_a_paraphrase_of_a_refusal_may_refuse() -> None:
    refusal = (
        "I can't help with rice, so ask somebody who cooks it every day and who has the time to "
        "explain it."
    )
    text = (
        "I cannot assist you where rice is concerned; a daily cook with some spare minutes should "
        "be asked instead."
    )
    assert fault(text, rejected=refusal) is None
    assert fault(text) == "refusal"
    assert fault(text, "variant", rejected=refusal) == "refusal"


def test_a_paraphrase_is_compared_with_rejected_and_its_length_with_chosen() -> None:
    doc = pair(1, "How do I cook rice?", chosen=CHOSEN, rejected=REJECTED)
    requests = {
        request.category: request for request in make_requests(doc, TEMPLATES, "a bee at dawn")
    }
    assert {request.num_words for request in requests.values()} == {len(CHOSEN.split())}
    assert REJECTED in requests["paraphrase"].prompt
    assert CHOSEN not in requests["paraphrase"].prompt
    assert CHOSEN in requests["chosen_paraphrase"].prompt
    assert CHOSEN in requests["format_flip"].prompt
    assert "Human: How do I cook rice?" in requests["variant"].prompt
    assert CHOSEN not in requests["variant"].prompt
    assert "a bee at dawn" in requests["non_response"].prompt
    assert "rice" not in requests["non_response"].prompt


def test_a_topic_fits_its_own_doc_and_hardly_ever_another(tmp_path: Path) -> None:
    parts = read_topics(None, 50_000)
    topics = [topic_of(parts, f"doc {i}".encode()) for i in range(5000)]
    assert len(set(topics)) >= 4980
    assert topics[17] == topic_of(parts, b"doc 17")
    for number in range(len(parts)):  # every entry of every list is used
        assert {topic.count(part) > 0 for topic in topics for part in parts[number][-1:]} == {
            True,
            False,
        }
    (tmp_path / "topics.yaml").write_text("subjects: [a, b]\nplaces: [c]\nangles: [d, e]\n")
    assert topic_of(read_topics(tmp_path, 4), b"doc") in {"a c d", "a c e", "b c d", "b c e"}
    with pytest.raises(UserError, match="4 topics but 5 are needed"):
        read_topics(tmp_path, 5)


@given(st.text(min_size=1).map(str.strip).filter(bool))
def test_permuted_keeps_the_words_and_changes_their_order(chosen: str) -> None:
    shuffled = permuted(chosen, "0 d1")
    if len(set(chosen.split())) < 2:
        assert shuffled is None
    else:
        assert shuffled is not None
        assert sorted(shuffled.split()) == sorted(chosen.split())
        assert shuffled.split() != chosen.split()
        assert shuffled == permuted(chosen, "0 d1")


def test_the_offline_writer_keeps_to_the_length_and_repeats_itself() -> None:
    writer = OfflineWriter()

    def write(**changes: Any) -> str | None:
        fields = {
            "doc_id": "d",
            "category": "variant",
            "template": "variant@1",
            "template_sha256": "",
            "prompt": "p",
            "source_text": "s",
            "num_words": 60,
        }
        return asyncio.run(writer.write(Request(**{**fields, **changes}))).text

    for num_words in (5, 20, 60, 300):
        written = len(str(write(num_words=num_words)).split())
        assert 0.8 * num_words <= written <= 1.2 * num_words, num_words
    assert write() == write(doc_id="other")
    assert (
        len({write(), write(sample_index=1), write(prompt="q"), write(category="paraphrase")}) == 4
    )


def groups(num_texts: int, links: list[tuple[int, int]]) -> set[frozenset[int]]:
    """What is joined by the links, directly or through others."""
    group = {number: frozenset({number}) for number in range(num_texts)}
    for first, second in links:
        joined = group[first] | group[second]
        group.update(dict.fromkeys(joined, joined))
    return set(group.values())


def drifting_texts(num_texts: int) -> list[str]:
    """Texts each of which is a little further from one before."""
    generator = random.Random(0)
    vocabulary = [f"w{i}" for i in range(60)]
    texts = [" ".join(vocabulary)]
    for _ in range(num_texts - 1):
        copied = generator.choice(texts).split()
        copied[generator.randrange(60)] = generator.choice(vocabulary)
        texts.append(" ".join(copied))
    return texts


def test_near_duplicates_are_joined_as_those_of_datasketch() -> None:
    texts = drifting_texts(150)
    index, expected = MinHashLSH(threshold=0.7, num_perm=128), []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        expected += [(other, number) for other in sorted(index.query(sketch))]
        index.insert(number, sketch)
    found = near_duplicates(texts)
    assert set(found) <= set(expected)
    assert groups(150, found) == groups(150, expected)
    assert {second for _, second in found} == {second for _, second in expected}
    assert len(groups(150, found)) < 150


@pytest.mark.parametrize("kind", ["equal", "alike"])
def test_near_duplicates_cost_a_sketch_and_some_links_each(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 texts that are equal, or all alike, have 2 million pairs; that many are neither
    compared nor listed."""
    base = " ".join(f"w{i}" for i in range(200))
    texts = [base if kind == "equal" else f"{base} {i}" for i in range(2000)]
    sketches: list[str] = []
    real = duplicates.shingles

    def counted(text: str) -> set[str]:
        sketches.append(text)
        return real(text)

    monkeypatch.setattr(duplicates, "shingles", counted)
    links = near_duplicates(texts)
    assert len(sketches) <= len(texts)
    assert len(links) <= 14 * len(texts)
    assert {second for _, second in links} == set(range(1, 2000))


def test_clusters_join_conversations_and_near_duplicates_transitively() -> None:
    words = [f"w{i}" for i in range(40)]
    first, second, third = (" ".join(["Tell", "me", *words[i : i + 30]]) for i in (0, 3, 6))
    pairs = [
        pair(i, prompt)
        for i, prompt in enumerate([first, "Quite another thing", second, third, first])
    ]
    follow_up = (
        *pairs[1].messages,
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "And?"},
    )
    pairs.append(replace(pairs[1], doc_id="d9", messages=follow_up))
    labels = clusters(pairs)
    assert labels[0] == labels[2] == labels[3] == labels[4] != labels[1] == labels[5]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 99), st.integers(0, 99)),
        min_size=12,
        max_size=30,
    ),
    st.integers(0, 5),
    st.sampled_from([0.2, 0.5, None]),
)
def test_splits_share_nothing_and_no_pair_is_lost(
    numbers: list[tuple[int, int, int]], seed: int, heldout_frac: float | None
) -> None:
    pairs = [
        pair(
            i,
            f"question {prompt} " * 4,
            split="heldout" if i % 3 == 0 else "train",
            chosen=f"answer {chosen}",
            rejected=f"answer {other}",
        )
        for i, (prompt, chosen, other) in enumerate(numbers)
    ]
    left_out: list[LeftOut] = []
    try:
        kept = split_docs(pairs, heldout_frac, seed, left_out)
    except UserError:  # one of them is empty
        reject()
    assert {p.doc_id for p in kept} | {item.doc_id for item in left_out} == {
        p.doc_id for p in pairs
    }
    assert len(kept) + len(left_out) == len(pairs)
    train, heldout = ([p for p in kept if p.split == split] for split in ("train", "heldout"))
    assert not {p.conversation_id for p in train} & {p.conversation_id for p in heldout}
    assert not {t for p in train for t in p.responses.values()} & {
        t for p in heldout for t in p.responses.values()
    }


def test_the_splits_of_the_source_are_kept_unless_a_fraction_is_asked_for() -> None:
    pairs = [
        pair(i, f"Prompt number {i} about {i * i}?", split="heldout" if i < 6 else "train")
        for i in range(40)
    ]
    own = split_docs(pairs, None, 0, [])
    assert [p.doc_id for p in own if p.split == "heldout"] == [f"d{i}" for i in range(6)]
    drawn = split_docs(pairs, 0.5, 0, [])
    assert 12 <= sum(p.split == "heldout" for p in drawn) <= 28
    assert [p.split for p in drawn] == [p.split for p in split_docs(pairs, 0.5, 0, [])]
    assert [p.split for p in drawn] != [p.split for p in split_docs(pairs, 0.5, 1, [])]


conversations = st.lists(st.integers(0, 40).map(str), min_size=3, max_size=60)


@given(conversations, conversations, st.floats(0.05, 0.9), st.integers(0, 9))
def test_a_share_keeps_every_doc_in_its_split(
    rows: list[str], appended: list[str], share: float, seed: int
) -> None:
    """Appended, reordered, limited: the split of a conversation is what it was."""

    def splits(of: list[str]) -> dict[str, str]:
        threshold = choose_threshold(of, share, seed)
        return {row: split_of(row, threshold, seed) for row in of}

    before, after = splits(rows), splits([*rows, *appended])
    assert splits(rows[::-1]) == before
    counts = Counter(before[row] for row in rows)
    if (
        min(counts["train"], counts["heldout"]) >= 2
    ):  # else the threshold is moved, until there are enough docs
        assert choose_threshold(rows, share, seed) != share or before.items() <= after.items()


@given(conversations, st.integers(1, 30), st.integers(0, 9))
def test_a_number_is_reached_by_whole_conversations_and_has_a_threshold(
    rows: list[str], number: int, seed: int
) -> None:
    threshold = choose_threshold(rows, number, seed)
    held = [row for row in rows if split_of(row, threshold, seed) == "heldout"]
    assert len(held) >= min(number, len(rows))
    assert any(len(held) - held.count(row) < number for row in held)
    if 2 <= len(held) <= len(rows) - 2:
        assert choose_threshold([*rows, "a", "b"], threshold, seed) == threshold
