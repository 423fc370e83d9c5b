"""Rendering, joins, and the identity of trained and scored tokens."""

from pathlib import Path
from typing import Any

import pytest
from helpers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tokenizer_matrix import make
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sft_probe.errors import UserError
from sft_probe.models import EMBEDDED_MODEL, load_tokenizer
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import (
    Prompt,
    PromptFormat,
    encode,
    encode_after,
    encode_pair,
    encode_probe_set,
)
from sft_probe.train.examples import (
    IGNORED_LABEL,
    Example,
    PadRight,
    TrainingExamples,
    assign,
    build_examples,
)
from sft_probe.train.options import parse_mixture

MESSAGES = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?\n"},
]


def test_hh_is_the_published_format() -> None:
    prompt = PromptFormat("hh").render(MESSAGES)
    assert prompt.text == "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    assert prompt.separator == " "


def test_no_rendered_prompt_ends_in_white_space(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<bot> \n"
    )
    tokenizer = make_tokenizer()
    separators = {}
    for name in ("hh", "plain", "chat", str(template)):
        prompt = PromptFormat(name, tokenizer).render(MESSAGES)
        assert prompt.text == prompt.text.rstrip()
        separators[name] = prompt.separator
    assert separators == {"hh": " ", "plain": "\n\n", "chat": "\n", str(template): " \n"}


def test_a_jinja_format_is_named_by_its_content(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[-1].content }}:")
    before = PromptFormat(str(template)).name
    template.write_text("{{ messages[-1].content }}>")
    assert before.startswith("jinja:own.jinja@")
    assert PromptFormat(str(template)).name != before


@pytest.mark.parametrize("name", ["nothing", "chat"])
def test_an_unusable_format_is_a_user_error(name: str) -> None:
    with pytest.raises(UserError):
        PromptFormat(name)


def test_a_template_that_refuses_a_turn_is_a_user_error() -> None:
    """As Gemma's and Llama-2's refuse a system turn."""
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        UserError, match="refuses the turns user, assistant, user \\(System role not supported"
    ):
        PromptFormat("chat", tokenizer).render(MESSAGES)


def test_hh_has_no_system_turn() -> None:
    with pytest.raises(UserError, match="system"):
        PromptFormat("hh").render([{"role": "system", "content": "Be brief."}, *MESSAGES])


def harness(tokenizer: PreTrainedTokenizerBase, tiny_model: Path) -> HFLM:
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(tiny_model),
        tokenizer=tokenizer,
        backend="causal",
    )


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_response_are_tokenized_as_lm_eval_does(bos: bool, tiny_model: Path) -> None:
    tokenizer = make_tokenizer(bos=bos)
    lm = harness(tokenizer, tiny_model)

    @settings(max_examples=150)
    @given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
    def check(question: str, response: str) -> None:
        prompt = PromptFormat("hh").render([{"role": "user", "content": question}])
        pair = encode_pair(tokenizer, prompt, response)
        assert pair == lm._encode_pair(prompt.text, prompt.separator + response)

    check()


def test_chat_prompts_get_no_second_bos(tiny_model: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    pair = encode_pair(tokenizer, Prompt("<|bos|>Hello", " "), "there")
    assert pair is not None
    assert pair[0].count(tokenizer.bos_token_id) == 1
    assert pair == harness(tokenizer, tiny_model)._encode_pair("<|bos|>Hello", " there")


def test_a_token_that_spans_prompt_and_response_is_found() -> None:
    tokenizer = make_tokenizer()
    (whole,) = tokenizer.encode(" water")
    assert encode_pair(tokenizer, Prompt("some wa", ""), "ter") is None
    assert encode_pair(tokenizer, Prompt("some", " "), "water") == (
        tokenizer.encode("some"),
        [whole],
    )


def test_special_tokens_that_a_tokenizer_adds_are_added_once() -> None:
    """As GLM-4's `[gMASK]<sop>`, which its template writes too; and EOS after a text is no part of
    a prompt."""
    tokenizer = make("llama3", bos=None, eos="</s>", adds="[gMASK] <sop> A </s>")
    start = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    plain = tokenizer.encode("Hello there", add_special_tokens=False)
    assert encode(tokenizer, "Hello there") == start + plain
    assert encode(tokenizer, "[gMASK]<sop>Hello there") == start + plain
    assert encode(tokenizer, "Hello there</s>") == [*start, *plain, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["prepend", "first", "gemma", "llama3"])
def test_a_response_alone_has_no_space_before_it(kind: str) -> None:
    """Where a token spans even the join of prompt with separator and response: SentencePiece would
    write ` Well`."""
    tokenizer = make(kind, eos="</s>")
    after = tokenizer.encode("so:\nWell, then", add_special_tokens=False)
    ids = encode_after(tokenizer, "Well, then")
    assert after[-len(ids) :] == ids
    assert str(tokenizer.decode(after)).endswith("\nWell, then")


def train_examples(
    probe_set: Any,
    category: str,
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
) -> TrainingExamples:
    docs = assign(
        probe_set.of_split("train"), parse_mixture(category, probe_set.categories, "the set"), 0
    )
    return build_examples(
        docs,
        prompt_format,
        tokenizer,
        max_length=1024,
        max_prompt_tokens=max_prompt_tokens,
        dropped=[],
    )


@pytest.mark.parametrize(
    ("family", "format_name"),
    [
        ("gpt-neox", "hh"),
        ("bos", "hh"),
        ("chat", "chat"),
        pytest.param("smollm2", "hh", marks=pytest.mark.slow),
        pytest.param("smollm2", "chat", marks=pytest.mark.slow),
    ],
)
def test_labels_are_the_scored_tokens_and_the_terminator(family: str, format_name: str) -> None:
    tokenizer = (
        load_tokenizer(EMBEDDED_MODEL)
        if family == "smollm2"
        else make_tokenizer(bos=family == "bos")
    )
    prompt_format = PromptFormat(format_name, tokenizer)
    probe_set = load_probe_set("helpful-mini")
    kept, dropped = encode_probe_set(probe_set, prompt_format, tokenizer, 1024)
    examples = train_examples(probe_set, "rejected", prompt_format, tokenizer)
    assert not dropped
    assert len(examples) == 64
    scored = {item.doc.doc_id: item for item in kept}
    end = "<|im_end|>" if format_name == "chat" or family == "smollm2" else "<|endoftext|>"
    for example in examples.examples:
        target = [
            *scored[example.doc_id].continuation_ids["rejected"],
            tokenizer.convert_tokens_to_ids(end),
        ]
        assert [label for label in example.labels if label != IGNORED_LABEL] == target
        assert example.input_ids == scored[example.doc_id].prompt_ids + target


def test_padding_keeps_the_terminator_label_where_pad_is_eos() -> None:
    where: dict[str, Any] = {"doc_id": "d", "category": "chosen", "num_bytes": 1}
    examples = [
        Example(input_ids=[5, 6, 0], labels=[-100, 6, 0], **where),
        Example(input_ids=[7, 0], labels=[7, 0], **where),
    ]
    batch = PadRight(pad_id=0)([[row] for row in enumerate(examples)])
    assert batch["labels"].tolist() == [[-100, 6, 0], [7, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]


def test_long_prompts_lose_whole_turns_on_the_left() -> None:
    tokenizer = make_tokenizer()
    probe_set = load_probe_set("helpful-mini")
    prompt_format = PromptFormat("hh")
    whole = train_examples(probe_set, "chosen", prompt_format, tokenizer)
    cut = train_examples(probe_set, "chosen", prompt_format, tokenizer, max_prompt_tokens=70)
    assert cut.num_cut_prompts > 0
    assert len(cut) + len(cut.dropped) == len(whole)
    whole_ids = {example.doc_id: example.input_ids for example in whole.examples}
    for example in cut.examples:
        assert example.labels.count(IGNORED_LABEL) <= 70
        assert tokenizer.decode(example.input_ids).startswith("\n\nHuman:")
        assert whole_ids[example.doc_id][-len(example.input_ids) :] == example.input_ids
