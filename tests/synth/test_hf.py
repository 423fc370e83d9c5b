"""The local writer: batches give what single calls give, and an answer without an end is no
answer."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.writers.hf import HfWriter

PROMPTS = [
    "Rice",
    "Tell me how the boat was built, and by whom, and when.",
    "One two three four five.",
] * 7


def ask(
    writer: HfWriter, prompts: list[str], *, temperature: float = 0.0, num_words: int = 4
) -> list[Answer]:
    async def run() -> list[Answer]:
        requests = [
            Request(
                doc_id=str(i),
                category="variant",
                template="variant@1",
                template_sha256="",
                prompt=prompt,
                source_text="",
                num_words=num_words + i % 3,
                temperature=temperature,
            )
            for i, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*map(writer.write, requests))
        await writer.close()
        return answers

    return asyncio.run(run())


def test_a_batch_of_prompts_gives_what_each_prompt_alone_gives(tiny_model: Path) -> None:
    answers = ask(HfWriter(str(tiny_model)), PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(chat)])
        budget = 3 * (4 + number % 3) + 32
        alone = model.generate(ids, do_sample=False, max_new_tokens=budget, pad_token_id=0)[
            0, ids.shape[1] :
        ].tolist()
        is_finished = tokenizer.eos_token_id in alone
        kept = alone[: alone.index(tokenizer.eos_token_id)] if is_finished else alone
        assert json.loads(answer.raw)["ids"] == kept
        assert answer.status == ("ok" if is_finished else "truncated")
        assert answer.num_prompt_tokens == ids.shape[1]


def test_sampled_texts_are_seeded_and_differ_by_prompt(tiny_model: Path) -> None:
    writer = HfWriter(str(tiny_model))
    first, again = (
        ask(writer, PROMPTS[:3], temperature=0.7) for _ in range(2)
    )  # the model is loaded a second time
    assert [answer.raw for answer in first] == [answer.raw for answer in again]
    assert len({answer.raw for answer in first}) == 3


@pytest.mark.parametrize(
    ("text", "is_finished", "expected"),
    [
        ("Yes, it is.<|endoftext|>more", True, "Yes, it is."),
        ("Yes, it is.\n\nHuman: And?", True, "Yes, it is."),
        ("Yes, it is. And so on and", True, "Yes, it is."),
        ("and so on and so on", False, "and so on and so on"),
    ],
)
def test_a_continuation_ends_with_the_turn_or_the_last_sentence(
    text: str, is_finished: bool, expected: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = HfWriter(str(tiny_model), is_chat=False)
    ids = writer.tokenizer.encode(text)

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("sft_probe.synth.writers.hf.load_model", lambda *_: model)
    answer = ask(writer, ["\n\nHuman: Is it?\n\nAssistant:"], num_words=40)[0]
    assert answer.status == ("ok" if is_finished else "truncated")
    assert answer.text == expected


def test_a_model_that_cannot_be_asked_is_a_user_error(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no chat template"):
        HfWriter(str(tmp_path / "plain"))
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        HfWriter(str(tmp_path / "none"))
