"""Training examples: the ids that the probes score, plus the terminator, and nothing else, carry a label."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_probe.errors import UserError
from sft_probe.prompts import DroppedDoc, PromptFormat, encode, encode_pair, terminator_id
from sft_probe.records import Doc
from sft_probe.train.mixture import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and response to train on, and where it comes from."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; `IGNORED_LABEL` on the prompt, so that response and terminator alone are learnt."""
    doc_id: str
    category: str
    """As in `--train_category`: with `_no_prompt` where the prompt is left out."""
    num_bytes: int
    """UTF-8 bytes of the response."""

    @property
    def num_tokens(self) -> int:
        """Labelled tokens: response and terminator."""
        return sum(label != IGNORED_LABEL for label in self.labels)


@dataclass(frozen=True, kw_only=True)
class TrainingExamples:
    """A map-style data set for `transformers.Trainer`, in file order; an item is the example's index and its ids."""

    examples: list[Example]
    dropped: list[DroppedDoc]
    num_cut_prompts: int

    @property
    def sha256(self) -> str:
        """Of all that is trained on: it follows from data, tokenizer, format and flags."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps([example.doc_id, example.input_ids, example.labels]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.examples[index]


def build_examples(
    docs: Sequence[tuple[Doc, Part]],
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_tokens: int | None,
    dropped: Sequence[DroppedDoc],
) -> TrainingExamples:
    """Encodes docs for SFT.

    Prompts over `max_prompt_tokens` lose whole turns on the left; responses are never cut: a doc that does not fit
    `max_length` tokens is dropped and named. Without its prompt a response has the same token ids; they follow BOS, or
    EOS where the tokenizer has no BOS, which is what lm-eval conditions an empty prompt on.

    Args:
        docs: each with the part of the mixture that it is for, as from `mixture.assign`.
        dropped: what was left out before.

    Raises:
        UserError: no doc is left to train on.
    """
    end_id = terminator_id(prompt_format.name, tokenizer)
    kept, num_cut = [], 0
    dropped = list(dropped)
    for doc, part in docs:
        messages = _cut_turns(doc, prompt_format, tokenizer, max_prompt_tokens)
        if messages is None:
            reason = f"the last turn alone is over max_prompt_tokens {max_prompt_tokens}"
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=reason))
            continue
        prompt = prompt_format.render(messages)
        pair = encode_pair(tokenizer, prompt.text, prompt.separator + doc.responses[part.category])
        if pair is None or len(pair[0]) + len(pair[1]) + 1 > max_length:
            reason = "prompt and response do not join" if pair is None else f"over max_length {max_length} tokens"
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=reason))
            continue
        prompt_ids = pair[0] if part.with_prompt else [_empty_prompt_id(tokenizer)]
        kept.append(_example(doc, part, prompt_ids, [*pair[1], end_id]))
        num_cut += len(messages) < len(doc.messages)
    if not kept:
        raise UserError(f"no doc is left to train on; {len(dropped)} were dropped: {describe_first(dropped)}")
    return TrainingExamples(examples=kept, dropped=dropped, num_cut_prompts=num_cut)


def _example(doc: Doc, part: Part, prompt_ids: list[int], target_ids: list[int]) -> Example:
    return Example(
        input_ids=prompt_ids + target_ids,
        labels=[IGNORED_LABEL] * len(prompt_ids) + target_ids,
        doc_id=doc.doc_id,
        category=part.name,
        num_bytes=len(doc.responses[part.category].encode()),
    )


def _empty_prompt_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def describe_first(dropped: Sequence[DroppedDoc]) -> str:
    """Why the first few docs were dropped, for a message."""
    return "; ".join(f"{drop.doc_id}: {drop.reason}" for drop in dropped[:3])


def _cut_turns(
    doc: Doc, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int | None
) -> Sequence[dict[str, str]] | None:
    """The longest run of last turns, starting with a user's, that fits; `None` where none does."""
    if max_prompt_tokens is None:
        return doc.messages
    starts = [0, *(i for i, turn in enumerate(doc.messages) if i and turn["role"] == "user")]
    for start in starts:
        text = prompt_format.render(doc.messages[start:]).text
        if len(encode(tokenizer, text)) <= max_prompt_tokens:
            return doc.messages[start:]
    return None


@dataclass(frozen=True)
class PadRight:
    """Collates items into `[batch, longest]` int64 tensors, padded on the right, and `example_index`, a list."""

    pad_id: int

    def __call__(self, items: Sequence[tuple[int, Example]]) -> dict[str, Any]:
        """Padding is masked and carries no label, also where the pad token is the terminator."""
        longest = max(len(example.input_ids) for _, example in items)
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(items), longest), self.pad_id),
            "attention_mask": torch.zeros((len(items), longest), dtype=torch.int64),
            "labels": torch.full((len(items), longest), IGNORED_LABEL),
        }
        for row, (_, example) in enumerate(items):
            length = len(example.input_ids)
            batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(example.labels)
        return {**batch, "example_index": [index for index, _ in items]}
