"""The embedded set keeps its promises, and a faulty set is told apart, line by line."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Run, make_docs, user_error
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.probe_set import CATEGORIES, load_probe_set, read_probe_set
from sft_probe.synth.duplicates import near_duplicates
from sft_probe.synth.splits import derangement

WriteSet = Callable[[list[dict[str, Any]]], Path]


def test_the_embedded_set_has_64_train_and_32_held_out_docs_in_6_categories() -> None:
    probe_set = load_probe_set("helpful-mini")
    assert not probe_set.faults
    assert probe_set.categories == CATEGORIES
    assert (len(probe_set.of_split("train")), len(probe_set.of_split("heldout"))) == (64, 32)
    assert sum(len(doc.messages) > 1 for doc in probe_set.docs) == 20
    for doc in probe_set.docs:
        for text in doc.responses.values():
            assert 15 <= len(text.split()) <= 80


@pytest.mark.parametrize(
    "length", [lambda text: len(text.split()), lambda text: len(text.encode())]
)
def test_the_embedded_categories_have_similar_lengths(length: Callable[[str], int]) -> None:
    docs = load_probe_set("helpful-mini").docs
    means = [sum(length(doc.responses[name]) for doc in docs) / len(docs) for name in CATEGORIES]
    assert max(means) / min(means) < 1.15


def test_embedded_set_has_no_near_duplicates_and_no_leakage() -> None:
    docs = load_probe_set("helpful-mini").docs
    prompts = ["\n".join(turn["content"] for turn in doc.messages) for doc in docs]
    assert near_duplicates(prompts) == []
    own = [doc.responses[name] for doc in docs for name in CATEGORIES if name != "random"]
    assert near_duplicates(own) == []
    openings = [" ".join(doc.responses["non_response"].split()[:2]) for doc in docs]
    assert len(set(openings)) >= 90


def test_embedded_splits_have_disjoint_topics() -> None:
    from importlib import resources

    topics = {}
    for split in ("train", "heldout"):
        path = Path(str(resources.files("sft_probe.data") / "helpful-mini" / f"{split}.jsonl"))
        topics[split] = {
            json.loads(line)["meta"]["topic"] for line in path.read_text().splitlines()
        }
    assert len(topics["train"]) == 16
    assert not topics["train"] & topics["heldout"]


def test_random_of_the_embedded_set_is_the_seeded_derangement_of_chosen() -> None:
    probe_set = load_probe_set("helpful-mini")
    for split in ("train", "heldout"):
        docs = probe_set.of_split(split)
        order = derangement(
            [doc.responses["chosen"] for doc in docs], seed=probe_set.manifest["provenance"]["seed"]
        )
        assert [doc.random_doc_id for doc in docs] == [docs[j].doc_id for j in order]
        assert [doc.responses["random"] for doc in docs] == [
            docs[j].responses["chosen"] for j in order
        ]


@given(st.lists(st.sampled_from("aaaabcdefgh"), max_size=40), st.integers(0, 2**31))
def test_random_pairs_no_doc_with_its_own_text_unless_one_text_is_over_half(
    texts: list[str], seed: int
) -> None:
    if len(texts) < 2 or max(map(texts.count, texts)) * 2 > len(texts):
        with pytest.raises(UserError, match="cannot be drawn"):
            derangement(texts, seed)
        return
    order = derangement(texts, seed)
    assert sorted(order) == list(range(len(texts)))
    assert all(texts[i] != texts[j] for i, j in enumerate(order))
    assert order == derangement(texts, seed)


@pytest.mark.parametrize("num_equal", [0, 60, 100])
def test_random_pairs_each_doc_with_every_other_about_as_often(num_equal: int) -> None:
    """Over seeds, a doc gets each of the others about as often, also where equal texts leave few to
    choose from."""
    texts = ["same"] * num_equal + [f"text {i}" for i in range(200 - num_equal)]
    orders = [derangement(texts, seed) for seed in range(300)]
    assert len(set(map(tuple, orders))) == 300
    for doc in (0, 199):
        partners = Counter(order[doc] for order in orders)
        assert len(partners) > 60
        assert max(partners.values()) < 20


def test_a_planted_near_duplicate_is_found() -> None:
    texts = [
        "one two three four five six seven eight nine ten",
        "a wholly different text that shares no words at all",
    ]
    assert near_duplicates([*texts, texts[0] + " eleven"]) == [(0, 2)]


def test_a_valid_set_is_reported_with_its_counts(sft_probe: Run) -> None:
    result = sft_probe("probe-set", "helpful-mini")
    assert result.returncode == 0
    assert "64 train, 32 heldout; 20 with several turns" in result.stdout
    assert "no faults" in result.stdout


def test_all_text_columns_of_a_bare_jsonl_file_become_categories(write_set: WriteSet) -> None:
    assert load_probe_set(str(write_set(make_docs()))).categories == ("chosen", "other")


def test_each_fault_of_a_probe_set_is_reported_with_its_line(
    write_set: WriteSet, sft_probe: Run
) -> None:
    docs = make_docs(12)
    del docs[2]["other"]
    docs[4]["doc_id"] = "d0"
    docs[6]["chosen"] = " padded"
    docs[8]["conversation_id"] = "c1"
    docs[9]["messages"] = [{"role": "assistant", "content": "no"}]
    docs[10]["split"] = "test"
    path = write_set(docs)
    with path.open("a") as file:
        file.write('\n{"doc_id": \n')
    result = sft_probe("probe-set", path)
    user_error(result)
    for line, words in [
        (3, "`other` is missing"),
        (5, "duplicate doc_id 'd0', first used in line 1"),
        (7, "`chosen` has white space around it"),
        (9, "'c1' is in both splits"),
        (10, "`messages` must be"),
        (11, "`split` must be one of train, heldout, not 'test'"),
        (14, "not valid JSON"),
    ]:
        assert any(
            f"line {line}" in text and words in text for text in result.stdout.splitlines()
        ), (line, words)


def test_random_must_be_the_chosen_response_of_the_doc_it_names(write_set: WriteSet) -> None:
    docs = make_docs(4)
    for doc, partner in zip(docs, (2, 3, 0, 1), strict=True):
        doc["random"], doc["random_doc_id"] = docs[partner]["chosen"], f"d{partner}"
    assert not read_probe_set(str(write_set(docs))).faults
    docs[0]["random_doc_id"], docs[1]["random"], docs[2]["random_doc_id"] = (
        "d0",
        "Something else.",
        "nobody",
    )
    messages = [str(fault) for fault in read_probe_set(str(write_set(docs))).faults]
    assert len(messages) == 3
    assert "names the doc itself" in messages[0]
    assert "is not the chosen response of 'd3'" in messages[1]
    assert "names no doc" in messages[2]


def test_an_empty_response_leaves_out_its_doc_and_keeps_the_set(write_set: WriteSet) -> None:
    docs = make_docs()
    docs[3]["other"] = "  "
    probe_set = load_probe_set(str(write_set(docs)))
    assert [doc.doc_id for doc in probe_set.docs] == ["d0", "d1", "d2", "d4", "d5"]
    assert "line 4 (d3): the response `other` is empty" in str(probe_set.faults[0])


@pytest.mark.parametrize("name", ["train_chosen", "Chosen", "a-b"])
def test_a_category_name_that_no_lm_eval_task_can_have_is_refused(
    name: str, write_set: WriteSet
) -> None:
    docs = [doc | {name: "text"} for doc in make_docs()]
    with pytest.raises(UserError, match="cannot name a category"):
        load_probe_set(str(write_set(docs)))


def test_an_unknown_probe_set_is_a_user_error(sft_probe: Run, tmp_path: Path) -> None:
    assert "no probe set" in user_error(sft_probe("probe-set", tmp_path / "missing"))
    assert "helpful-mini" in user_error(sft_probe("probe-set", "no-such-set"))
    assert "the hub did not give it" in user_error(sft_probe("probe-set", "nobody/no-such-set"))
