"""Training examples: the ids that the probes score, plus the terminator, and nothing else, carry a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sft_probe.errors import UserError
from sft_probe.prompts import DroppedDoc, PromptFormat, dropped_by_faults, encode, encode_pair, terminator_id
from sft_probe.records import Doc, ProbeSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class TrainingExamples:
    """A map-style data set for `transformers.Trainer`, in file order."""

    examples: list[dict[str, list[int]]]
    """`input_ids` and `labels` of equal length; labels are `IGNORED_LABEL` on the prompt."""
    doc_ids: list[str]
    dropped: list[DroppedDoc]
    num_cut_prompts: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def build_examples(
    probe_set: ProbeSet,
    category: str,
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_tokens: int | None,
) -> TrainingExamples:
    """Encodes the train split for SFT on one category.

    Prompts over `max_prompt_tokens` lose whole turns on the left; responses are never cut: a doc that does not fit
    `max_length` tokens is dropped and named.

    Raises:
        UserError: the category is not in the set, or no doc is left to train on.
    """
    if category not in probe_set.categories:
        known = ", ".join(probe_set.categories)
        raise UserError(f"--train_category {category}: the probe set {probe_set.source} has only {known}.")
    end_id = terminator_id(prompt_format.name, tokenizer)
    examples, doc_ids, num_cut = [], [], 0
    dropped = dropped_by_faults(probe_set)
    for doc in probe_set.of_split("train"):
        messages = _cut_turns(doc, prompt_format, tokenizer, max_prompt_tokens)
        if messages is None:
            reason = f"the last turn alone is over max_prompt_tokens {max_prompt_tokens}"
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=reason))
            continue
        prompt = prompt_format.render(messages)
        pair = encode_pair(tokenizer, prompt.text, prompt.separator + doc.responses[category])
        if pair is None or len(pair[0]) + len(pair[1]) + 1 > max_length:
            reason = "prompt and response do not join" if pair is None else f"over max_length {max_length} tokens"
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=reason))
            continue
        examples.append(_example(*pair, end_id))
        doc_ids.append(doc.doc_id)
        num_cut += len(messages) < len(doc.messages)
    if not examples:
        raise UserError(f"no doc of {probe_set.source} is left to train on; {len(dropped)} were dropped.")
    return TrainingExamples(examples=examples, doc_ids=doc_ids, dropped=dropped, num_cut_prompts=num_cut)


def _example(prompt_ids: list[int], continuation_ids: list[int], end_id: int) -> dict[str, list[int]]:
    target = [*continuation_ids, end_id]
    return {"input_ids": prompt_ids + target, "labels": [IGNORED_LABEL] * len(prompt_ids) + target}


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
    """Collates examples into `[batch, longest]` int64 tensors, padded on the right."""

    pad_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Padding is masked and carries no label, also where the pad token is the terminator."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": torch.full((len(examples), longest), self.pad_id),
            "attention_mask": torch.zeros((len(examples), longest), dtype=torch.int64),
            "labels": torch.full((len(examples), longest), IGNORED_LABEL),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(example["labels"])
        return batch
