"""Training examples: the ids that the probes score, plus the terminator, and nothing else, carry a
label."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc
from sft_probe.prompts import (
    DroppedDoc,
    Prompt,
    PromptFormat,
    encode,
    encode_pair,
    no_pair_reason,
    terminator_id,
)
from sft_probe.train.mixture import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and response to train on, and where it comes from."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; `IGNORED_LABEL` on the prompt, so that response and terminator alone
    are learnt."""
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
    """A map-style data set for `transformers.Trainer`, in file order; an item is the example's
    index and its ids."""

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

    Prompts over `max_prompt_tokens` lose whole turns on the left; responses are never cut: a doc
    that does not fit `max_length` tokens, or that the format refuses, is dropped and named. Without
    its prompt a response has the same token ids; they follow BOS, or EOS where the tokenizer has no
    BOS, which is what lm-eval conditions an empty prompt on.

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
        try:
            messages = _cut_turns(doc, prompt_format, tokenizer, max_prompt_tokens)
            prompt = prompt_format.render(messages)
            context, continuation = _encode(
                tokenizer, prompt, doc.responses[part.category], prompt_format, max_length
            )
        except UserError as error:
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=str(error)))
            continue
        prompt_ids = context if part.with_prompt else [_empty_prompt_id(tokenizer)]
        kept.append(_example(doc, part, prompt_ids, [*continuation, end_id]))
        num_cut += len(messages) < len(doc.messages)
    if not kept:
        raise UserError(
            f"no doc is left to train on; {len(dropped)} were dropped: {describe_first(dropped)}"
        )
    return TrainingExamples(examples=kept, dropped=dropped, num_cut_prompts=num_cut)


def _encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    response: str,
    prompt_format: PromptFormat,
    max_length: int,
) -> tuple[list[int], list[int]]:
    """Ids of context and continuation; raises `UserError` where the doc is to be dropped."""
    pair = encode_pair(tokenizer, prompt, response, in_use=prompt_format.in_use)
    if pair is None:
        raise UserError(no_pair_reason(prompt_format.in_use))
    if len(pair[0]) + len(pair[1]) + 1 > max_length:
        raise UserError(f"over max_length {max_length} tokens")
    return pair


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
    more = [f"and {len(dropped) - 3} more"] if len(dropped) > 3 else []
    return "; ".join([*(f"{drop.doc_id}: {drop.reason}" for drop in dropped[:3]), *more])


def _cut_turns(
    doc: Doc,
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int | None,
) -> Sequence[dict[str, str]]:
    """The longest run of last turns, starting with a user's, that fits; raises `UserError` where
    none does."""
    if max_prompt_tokens is None:
        return doc.messages
    starts = [0, *(i for i, turn in enumerate(doc.messages) if i and turn["role"] == "user")]
    for start in starts:
        text = prompt_format.render(doc.messages[start:]).context(in_use=prompt_format.in_use)
        if len(encode(tokenizer, text)) <= max_prompt_tokens:
            return doc.messages[start:]
    raise UserError(f"the last turn alone is over max_prompt_tokens {max_prompt_tokens}")


@dataclass(frozen=True)
class PadRight:
    """Collates items into `[batch, longest]` int64 tensors, padded on the right, and
    `example_index`, a list."""

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
