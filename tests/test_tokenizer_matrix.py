"""Every tokenizer x format of the matrix: nothing dropped, ids as in use, text recovered, the
terminator follows."""

import json
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fetch_tokenizers import NAMES, FetchError, fetch
from helpers import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_matrix import (
    FILES,
    MEMBERS,
    TEMPLATES,
    Member,
    save_model,
    spec_of,
    tokenizer_rows,
    write_mixed_set,
)
from transformers import AutoTokenizer

from sft_probe.probe_set import Doc, load_probe_set
from sft_probe.prompts import (
    EncodedDoc,
    PromptFormat,
    encode,
    encode_doc,
    encode_probe_set,
    resolve_format,
    terminator_id,
)
from sft_probe.train.examples import IGNORED_LABEL, assign, build_examples
from sft_probe.train.options import parse_mixture

DOCS = load_probe_set("helpful-mini").docs[::6]
SLICE = (
    "llama3 plain (<|begin_of_text|> A)",
    "o200k harmony",
    "prepend llama2 (<s> A)",
    "llama3 dash (<|begin_of_text|> A)",
)
all_members = pytest.mark.parametrize("member", MEMBERS, ids=[member.name for member in MEMBERS])
slice_of_members = pytest.mark.parametrize(
    "member",
    [
        pytest.param(m, id=m.name, marks=() if m.name in SLICE else pytest.mark.full)
        for m in MEMBERS
    ],
)


def test_the_matrix_holds_at_least_25_different_tokenizers() -> None:
    assert len(MEMBERS) >= 25
    assert len({member.name for member in MEMBERS}) == len(MEMBERS)
    assert set(SLICE) <= {member.name for member in MEMBERS}


def check_ids(
    doc: Doc, prompt_format: PromptFormat, tokenizer: Any, *, is_exact: bool
) -> EncodedDoc:
    """The promises of docs/data.md for one doc."""
    encoded = encode_doc(doc, prompt_format, tokenizer, 10**6)
    assert isinstance(encoded, EncodedDoc), encoded
    text = "".join(encoded.prompt) if prompt_format.in_use else encoded.prompt.text
    assert encoded.prompt_ids == encode(tokenizer, text)
    for category, response in doc.responses.items():
        ids = encoded.continuation_ids[category]
        whole = encode(tokenizer, "".join(encoded.prompt) + response)
        if not prompt_format.in_use or whole[: len(encoded.prompt_ids)] == encoded.prompt_ids:
            assert encoded.prompt_ids + ids == whole
        if is_exact:
            assert tokenizer.decode(ids).strip() == response
            assert tokenizer.decode(encoded.prompt_ids + ids).endswith(response)
    return encoded


def check_against_template(encoded: EncodedDoc, tokenizer: Any, terminator: int) -> None:
    """Context, continuation and terminator are, token by token, what transformers makes of the
    whole conversation."""
    for category, response in encoded.doc.responses.items():
        turns = [*encoded.doc.messages, {"role": "assistant", "content": response}]
        rendered = tokenizer.apply_chat_template(turns, return_dict=False)
        ours = encoded.prompt_ids + encoded.continuation_ids[category]
        ours = (
            ours if ours[0] == rendered[0] else ours[1:]
        )  # a BOS that the tokenizer adds and the template does not
        if (
            terminator not in rendered
        ):  # no token ends a turn: what does may share one with the end of the response
            assert rendered[: len(ours) - 1] == ours[:-1]
            continue
        assert rendered[: len(ours)] == ours
        after = [token for token in rendered[len(ours) :] if tokenizer.decode([token]).strip()]
        assert after[:1] in (
            [terminator],
            [],
        )  # nothing where a template ends only turns that others follow


@all_members
def test_ids_and_terminator_of_each_tokenizer_are_right(member: Member, tmp_path: Path) -> None:
    tokenizer = member.make()
    prompt_format = resolve_format(spec_of(member, tmp_path), tokenizer, DOCS)
    name = re.sub(r"^jinja:\w+\.j2@\w+|^[a-z]+", "", prompt_format.name)
    assert re.sub(r"@[\dT:-]+", "@", name) == member.chosen
    terminator = terminator_id(prompt_format.name, tokenizer)
    assert tokenizer.decode([terminator]) == member.terminator
    for doc in DOCS:
        encoded = check_ids(doc, prompt_format, tokenizer, is_exact=member.is_exact)
        if (
            member.format == "chat" and "T" not in prompt_format.name
        ):  # a day is still that of the rendering
            check_against_template(encoded, tokenizer, terminator)


LETTERS = (
    string.ascii_letters + string.digits + string.punctuation + " \n\t.?!:" * 4 + "éßдж漢字🙂’"
)
TEXTS = st.text(LETTERS, min_size=1, max_size=40).map(str.strip).filter(bool)


@slice_of_members
def test_any_prompt_and_response_have_the_right_ids_under_each_tokenizer(
    member: Member, tmp_path: Path
) -> None:
    tokenizer = member.make()
    spec = spec_of(member, tmp_path)

    @settings(max_examples=60)
    @given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
    def check(pairs: list[tuple[str, str]]) -> None:
        docs = [
            Doc(
                doc_id=str(number),
                conversation_id=str(number),
                split="train",
                random_doc_id=None,
                messages=({"role": "user", "content": question},),
                responses={"chosen": response},
            )
            for number, (question, response) in enumerate(pairs)
        ]
        prompt_format = resolve_format(spec, tokenizer, docs)
        for doc in docs:
            check_ids(doc, prompt_format, tokenizer, is_exact=member.is_exact)

    check()


@slice_of_members
def test_training_labels_are_the_scored_ids(member: Member, tmp_path: Path) -> None:
    tokenizer = member.make()
    prompt_format = resolve_format(spec_of(member, tmp_path), tokenizer, DOCS)
    docs = [replace(doc, split="train") for doc in DOCS]
    pairs = assign(docs, parse_mixture("rejected", ["rejected"], "the set"), 0)
    examples = build_examples(
        pairs, prompt_format, tokenizer, max_length=4096, max_prompt_tokens=None, dropped=[]
    )
    assert not examples.dropped
    end = terminator_id(prompt_format.name, tokenizer)
    for doc, example in zip(docs, examples.examples, strict=True):
        encoded = encode_doc(doc, prompt_format, tokenizer, 4096)
        assert isinstance(encoded, EncodedDoc)
        assert example.input_ids == [
            *encoded.prompt_ids,
            *encoded.continuation_ids["rejected"],
            end,
        ]
        assert [label for label in example.labels if label != IGNORED_LABEL] == example.input_ids[
            len(encoded.prompt_ids) :
        ]


@slice_of_members
def test_live_probe_sweep_and_training_agree(
    member: Member, sft_probe: Run, tmp_path: Path
) -> None:
    """Rows and losses of real runs: the loss before the first update is that of the scored ids."""
    model = save_model(member.make(), tmp_path / "model")
    result = sft_probe(
        "train",
        "--model_name_or_path",
        model,
        "--probe_set",
        write_mixed_set(tmp_path / "set.jsonl"),
        "--prompt_format",
        spec_of(member, tmp_path),
        "--max_length",
        512,
        "--max_steps",
        1,
        "--per_device_train_batch_size",
        4,
        "--learning_rate",
        "1e-3",
        "--deepspeed",
        "none",
        "--snapshot_steps",
        "0,last",
        "--probe_steps",
        "0,last",
        "--probe_train",
        4,
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    result = sft_probe("sweep", tmp_path / "run", "--splits", "heldout,train")
    assert result.returncode == 0, result.stderr
    scores = pd.read_parquet(tmp_path / "run/scores.parquet").set_index(
        ["step", "split", "category", "doc_id"]
    )
    live, swept = (
        scores[scores["source"] == source].sort_index() for source in ("live", "lm_eval")
    )
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert set(scores["prompt_format"]) == {manifest["prompt_format"]}
    assert len(live) == len(swept) == 2 * 2 * 8
    assert live["num_tokens"].equals(swept["num_tokens"])
    assert (live["logprob"] - swept["logprob"]).abs().max() < 1e-3
    assert (live["logprob_eos"] - swept["logprob_eos"]).abs().max() < 1e-3
    rows = [
        json.loads(line) for line in (tmp_path / "run/first_epoch.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4
    trained = (
        live.reset_index()
        .query("step == 0 and split == 'train' and category == 'chosen'")
        .set_index("doc_id")
    )
    for row in rows:
        scored: Any = trained.loc[str(row["doc_id"])]
        assert row["num_tokens"] == scored["num_tokens"] + 1
        assert row["loss_sum"] == pytest.approx(
            -(scored["logprob"] + scored["logprob_eos"]), abs=2e-3
        )


@pytest.mark.full
def test_every_tokenizer_in_the_table_of_the_docs_is_right() -> None:
    rows = tokenizer_rows()
    assert [result for _, result, _ in rows] == ["right"] * len(MEMBERS)


@pytest.fixture(params=NAMES)
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    try:
        folder = fetch(request.param)
    except FetchError as error:
        pytest.skip(f"the real tokenizer is not here: {error}")
    return AutoTokenizer.from_pretrained(folder)


REAL_END = {
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "gemma": "<eos>",
    "gemma3": "<end_of_turn>",
    "mistral_v3": "</s>",
    "tekken": "</s>",
}
"""What ends an answer in a chat; the package of the first Gemma spells `<end_of_turn>` out, so that
EOS does."""
OWN_TEMPLATES = {
    "llama2": "llama2",
    "gptoss": "harmony",
    "gemma": "gemma",
    "mistral_v3": "mistral",
    "tekken": "mistral",
}
"""For packages without a chat template: the one of their family in the matrix."""


@pytest.mark.full
@pytest.mark.parametrize("format_name", ["plain", "hh", "chat", "alpaca"])
def test_tokenizers_of_published_models_give_the_expected_result(
    format_name: str, real_tokenizer: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name = request.node.callspec.params["real_tokenizer"]
    if name in OWN_TEMPLATES:
        assert not real_tokenizer.chat_template
        real_tokenizer.chat_template = TEMPLATES[OWN_TEMPLATES[name]]
    spec = format_name
    if format_name == "alpaca":
        spec = str(tmp_path / "alpaca.j2")
        Path(spec).write_text(FILES["alpaca"])
    probe_set = load_probe_set("helpful-mini")
    prompt_format = resolve_format(spec, real_tokenizer, probe_set.docs)
    kept, dropped = encode_probe_set(probe_set, prompt_format, real_tokenizer, 2048)
    assert (len(kept), dropped) == (96, [])
    spans = name not in ("llama2", "mistral_v3", "gemma", "gemma3")
    assert prompt_format.in_use == (spans and format_name in ("plain", "alpaca"))
    terminator = terminator_id(prompt_format.name, real_tokenizer)
    for doc in probe_set.docs[::6]:
        encoded = check_ids(doc, prompt_format, real_tokenizer, is_exact=True)
        if format_name == "chat":
            assert real_tokenizer.decode([terminator]) == REAL_END[name]
            check_against_template(encoded, real_tokenizer, terminator)
    before = PromptFormat(spec + "+prefix", real_tokenizer)
    if (
        format_name == "plain" and spans
    ):  # only the prompts that end in no question mark were kept under that rule
        assert len(encode_probe_set(probe_set, before, real_tokenizer, 2048)[0]) == 21
