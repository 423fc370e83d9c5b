"""Docs to train on that are no probe set: preference pairs, HH transcripts, prompts with a
response, chat messages."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sft_probe.errors import UserError
from sft_probe.probe_set import LONE_SURROGATE, Doc, find_lone_surrogate
from sft_probe.prompts import DroppedDoc
from sft_probe.synth.hh import (
    Pair,
    RowRejectedError,
    clean_response,
    column_names,
    kind_of,
    parse_messages,
    parse_row,
    parse_turns,
)
from sft_probe.synth.sources import Row, read_rows, source_sha256
from sft_probe.synth.splits import conversation_id, derangement


def read_docs(
    source: str, *, prompt_column: str, response_column: str
) -> tuple[list[Doc], list[DroppedDoc]]:
    """The docs of a `.jsonl`, `.jsonl.gz` or `.parquet` file, a directory of them, or a hub data
    set.

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
            held_out[row.file] += 1
            continue
        doc_id = f"{row.file}-{row.line:06d}"
        try:
            pair, categories = _parse(row, prompt_column, response_column)
            responses = {category: getattr(pair, category) for category in categories}
            earlier = seen.setdefault(json.dumps([pair.messages, responses]), doc_id)
            if earlier != doc_id:
                raise RowRejectedError(f"the same as an earlier row, {earlier}")
        except RowRejectedError as error:
            dropped.append(
                DroppedDoc(doc_id=doc_id, reason=f"{row.file}, line {row.line}: {error}")
            )
            continue
        docs.append(
            Doc(
                doc_id=doc_id,
                conversation_id=conversation_id(pair),
                split="train",
                messages=tuple(pair.messages),
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


def _parse(row: Row, prompt_column: str, response_column: str) -> tuple[Pair, tuple[str, ...]]:
    """The row as a pair, and which of its responses are the row's own."""
    value = row.value
    if row.fault or not isinstance(value, dict):
        raise RowRejectedError(row.fault or "not a JSON object")
    if place := find_lone_surrogate(value):
        raise RowRejectedError(f"`{place}` holds {LONE_SURROGATE}")
    if "chosen" in value and "rejected" in value:
        return parse_row(value), ("chosen", "rejected")
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
    return Pair(messages=turns, chosen=response, rejected=""), ("chosen",)


def with_random(docs: Sequence[Doc], seed: int) -> list[Doc]:
    """The docs with the category `random`: the chosen response of another doc, each used once."""
    order = derangement([doc.responses["chosen"] for doc in docs], seed)
    return [
        replace(
            doc,
            responses={**doc.responses, "random": docs[partner].responses["chosen"]},
            random_doc_id=docs[partner].doc_id,
        )
        for doc, partner in zip(docs, order, strict=True)
    ]


def without_heldout(
    docs: Sequence[Doc], heldout: Sequence[Doc]
) -> tuple[list[Doc], list[DroppedDoc]]:
    """Takes out the docs whose conversation, known by its first user turn, is probed as held
    out."""
    held = {conversation_id(doc): doc.doc_id for doc in heldout}
    twins = {doc.doc_id: held.get(doc.conversation_id) for doc in docs}
    dropped = [
        DroppedDoc(doc_id=doc_id, reason=f"its conversation is that of the held-out doc {twin}")
        for doc_id, twin in twins.items()
        if twin
    ]
    return [doc for doc in docs if not twins[doc.doc_id]], dropped


def sha256_of_source(source: str | None) -> str | None:
    """Of all local files of a source; `None` for the hub, whose name stands for it."""
    files = source_sha256(source) if source else {}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() if files else None
