"""Training examples: docs of the probe set or of other data, the mixture, token ids and labels."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft_probe.errors import UserError, first_few
from sft_probe.probe_set import LONE_SURROGATE, Doc, find_lone_surrogate
from sft_probe.prompts import (
    DroppedDoc,
    Prompt,
    PromptFormat,
    encode,
    encode_pair,
    no_pair_reason,
    terminator_id,
)
from sft_probe.synth.hh import (
    Parsed,
    RowRejectedError,
    clean_response,
    column_names,
    kind_of,
    parse_messages,
    parse_row,
    parse_turns,
)
from sft_probe.synth.sources import Row, read_rows, source_sha256
from sft_probe.synth.splits import root_id
from sft_probe.train.options import Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def assign(docs: Sequence[Doc], shares: Sequence[Share], seed: int) -> list[tuple[Doc, Share]]:
    """Return which doc is trained on with which response, in the order of the docs.

    The docs are shuffled once into a circle, and each share starts where the one
    before ended. So `chosen:0.5,rejected:0.5` gives each doc one response, and `chosen,rejected`
    both.
    """
    order = list(range(len(docs)))
    random.Random(seed).shuffle(order)  # noqa: S311 - reproducible, not secret
    pairs, total = [], 0.0
    for share in shares:
        start, total = round(total * len(docs)), total + share.fraction
        pairs += [(order[i % len(docs)], share) for i in range(start, round(total * len(docs)))]
    pairs.sort(key=lambda pair: pair[0])  # stable: several shares of one doc keep their order
    return [(docs[index], share) for index, share in pairs]


def read_docs(
    source: str, *, prompt_column: str, response_column: str
) -> tuple[list[Doc], list[DroppedDoc]]:
    """Return the docs of a `.jsonl`, `.jsonl.gz` or `.parquet` file, a directory of them, or a hub
    data set.

    A row with `chosen` and `rejected` (HH transcripts, texts or messages) gives both categories;
    one with `messages`, or with a prompt and a response, gives `chosen`. Rows that give no doc come
    back with the reason, those that the source itself holds out file by file.

    Raises:
        UserError: there is no such source, it is damaged, or the rows do not all have the same
            categories.
    """
    docs, dropped = [], []
    seen: dict[str, str] = {}
    held_out: Counter[str] = Counter()
    for row in read_rows(source):
        if row.split == "heldout":
            held_out[row.place.file] += 1
            continue
        doc_id = f"{row.place.file}-{row.place.line:06d}"
        try:
            messages, responses = _parse(row, prompt_column, response_column)
            earlier = seen.setdefault(json.dumps([messages, responses]), doc_id)
            if earlier != doc_id:
                raise RowRejectedError(f"the same as an earlier row, {earlier}")
        except RowRejectedError as error:
            dropped.append(DroppedDoc(doc_id=doc_id, reason=f"{row.place}: {error}"))
            continue
        docs.append(
            Doc(
                doc_id=doc_id,
                conversation_id=root_id(messages),
                split="train",
                messages=tuple(messages),
                responses=responses,
                random_doc_id=None,
            )
        )
    dropped += [
        DroppedDoc(
            doc_id=file, reason=f"all {number} rows: by its name, data that the source holds out"
        )
        for file, number in held_out.items()
    ]
    if len({tuple(doc.responses) for doc in docs}) > 1:
        raise UserError(
            f"{source}: some rows have `rejected`, others have not; train on one kind at a time."
        )
    return docs, dropped


def _parse(row: Row, prompt_column: str, response_column: str) -> Parsed:
    """Return the turns of a row, and its one or two responses."""
    value = row.columns()
    if place := find_lone_surrogate(value):
        raise RowRejectedError(f"`{place}` holds {LONE_SURROGATE}")
    if "chosen" in value and "rejected" in value:
        return parse_row(value)
    messages: Any = value.get("messages")
    if messages is None:
        if missing := [
            f"`{name}`" for name in (prompt_column, response_column) if name not in value
        ]:
            raise RowRejectedError(
                f"neither `messages` nor `chosen` and `rejected` nor {' and '.join(missing)}; the "
                "columns are "
                f"{column_names(value)}: name yours with --prompt_column and --response_column"
            )
        response = value[response_column]
        if not isinstance(response, str):
            raise RowRejectedError(f"`{response_column}` is {kind_of(response)}, not text")
        messages = [
            *parse_turns(value[prompt_column]),
            {"role": "assistant", "content": clean_response(response)},
        ]
    turns, response = parse_messages(messages)
    return Parsed(turns, {"chosen": response})


def without_heldout(
    docs: Sequence[Doc], heldout: Sequence[Doc]
) -> tuple[list[Doc], list[DroppedDoc]]:
    """Take out the docs whose conversation, known by its first user turn, is probed as held out."""
    held = {root_id(doc.messages): doc.doc_id for doc in heldout}
    twins = {doc.doc_id: held.get(doc.conversation_id) for doc in docs}
    dropped = [
        DroppedDoc(doc_id=doc_id, reason=f"its conversation is that of the held-out doc {twin}")
        for doc_id, twin in twins.items()
        if twin
    ]
    return [doc for doc in docs if not twins[doc.doc_id]], dropped


def sha256_of_source(source: str | None) -> str | None:
    """Return the hash of all local files of a source; `None` for the hub, whose name stands for
    it."""
    files = source_sha256(source) if source else {}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() if files else None


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
    """A map-style data set for `transformers.Trainer`, in file order; an item is an example, or a
    pair of them, each with its index in `examples`."""

    examples: list[Example]
    dropped: list[DroppedDoc]
    num_cut_prompts: int
    per_item: int = 1
    """2 for pairs: chosen and rejected of one prompt, one after the other."""

    @property
    def sha256(self) -> str:
        """Of all that is trained on: it follows from data, tokenizer, format and flags."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps([example.doc_id, example.input_ids, example.labels]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.examples) // self.per_item

    def __getitem__(self, index: int) -> list[tuple[int, Example]]:
        first = index * self.per_item
        return list(enumerate(self.examples[first : first + self.per_item], start=first))


def build_examples(
    docs: Sequence[tuple[Doc, Share]],
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_tokens: int | None,
    dropped: Sequence[DroppedDoc],
    per_item: int = 1,
) -> TrainingExamples:
    """Encode docs for training.

    Prompts over `max_prompt_tokens` lose whole turns on the left; responses are never cut: a doc
    that does not fit `max_length` tokens, or that the format refuses, is dropped and named. Without
    its prompt a response has the same token ids; they follow BOS, or EOS where the tokenizer has no
    BOS, which is what lm-eval conditions an empty prompt on.

    Args:
        docs: each with the share of the mixture that it is for, as from `assign`.
        dropped: what was left out before.
        per_item: 2 makes pairs of the shares of each doc, which are dropped as pairs.

    Raises:
        UserError: no doc is left to train on.
    """
    end_id = terminator_id(prompt_format.name, tokenizer)
    kept: list[Example] = []
    num_cut = 0
    dropped = list(dropped)
    for item in zip(*[iter(docs)] * per_item, strict=True):
        doc = item[0][0]
        try:
            messages = _cut_turns(doc, prompt_format, tokenizer, max_prompt_tokens)
            prompt = prompt_format.render(messages)
            made = [
                _example(
                    doc,
                    share,
                    _encode(tokenizer, prompt, doc, share, prompt_format, max_length=max_length),
                    end_id,
                )
                for _, share in item
            ]
            if per_item > len({tuple(example.input_ids) for example in made}):
                raise UserError("chosen and rejected are the same text")
        except UserError as error:
            dropped.append(DroppedDoc(doc_id=doc.doc_id, reason=str(error)))
            continue
        kept += made
        num_cut += len(messages) < len(doc.messages)
    if not kept:
        raise UserError(
            f"no doc is left to train on; {len(dropped)} were dropped: {describe_first(dropped)}"
        )
    return TrainingExamples(
        examples=kept, dropped=dropped, num_cut_prompts=num_cut, per_item=per_item
    )


def _encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    doc: Doc,
    share: Share,
    prompt_format: PromptFormat,
    *,
    max_length: int,
) -> tuple[list[int], list[int]]:
    """Return the ids of what stands before the response, and those of the response. Raises
    `UserError` where the doc is to be dropped."""
    pair = encode_pair(
        tokenizer, prompt, doc.responses[share.category], in_use=prompt_format.in_use
    )
    if pair is None:
        raise UserError(no_pair_reason(prompt_format.in_use))
    if len(pair[0]) + len(pair[1]) + 1 > max_length:
        raise UserError(f"over max_length {max_length} tokens")
    return pair if share.with_prompt else ([_empty_prompt_id(tokenizer)], pair[1])


def _example(doc: Doc, share: Share, ids: tuple[list[int], list[int]], end_id: int) -> Example:
    prompt_ids, target_ids = ids[0], [*ids[1], end_id]
    return Example(
        input_ids=prompt_ids + target_ids,
        labels=[IGNORED_LABEL] * len(prompt_ids) + target_ids,
        doc_id=doc.doc_id,
        category=share.name,
        num_bytes=len(doc.responses[share.category].encode()),
    )


def _empty_prompt_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def describe_first(dropped: Sequence[DroppedDoc]) -> str:
    """Say why the first few docs were dropped, for a message."""
    return first_few((f"{drop.doc_id}: {drop.reason}" for drop in dropped), 3, "; ")


def _cut_turns(
    doc: Doc,
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int | None,
) -> Sequence[dict[str, str]]:
    """Return the longest run of last turns, starting with a user's, that fits. Raises `UserError`
    where none does."""
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

    def __call__(self, items: Sequence[list[tuple[int, Example]]]) -> dict[str, Any]:
        """Pad a batch: padding is masked and carries no label, also where the pad token is the
        terminator."""
        rows = [row for item in items for row in item]
        longest = max(len(example.input_ids) for _, example in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(rows), longest), self.pad_id),
            "attention_mask": torch.zeros((len(rows), longest), dtype=torch.int64),
            "labels": torch.full((len(rows), longest), IGNORED_LABEL),
        }
        for row, (_, example) in enumerate(rows):
            length = len(example.input_ids)
            batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(example.labels)
        return {**batch, "example_index": [index for index, _ in rows]}
