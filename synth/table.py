"""A probe set from the user's own table: one row per prompt, one column per category."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.files import make_dir, new_dir, sha256_file
from sft_probe.probe_set import (
    CATEGORY_NAME,
    RESERVED_COLUMNS,
    SPLITS,
    Doc,
    LeftOut,
    common_reasons,
)
from sft_probe.synth import hh, splits
from sft_probe.synth.hh import Messages, RowRejectedError
from sft_probe.synth.output import write_docs, write_manifest
from sft_probe.synth.sources import Row, new_doc, read_table, stem

_LOG = logging.getLogger(__name__)
_DEFAULT_HELDOUT = 100


def write_probe_set(
    table: Path,
    out: Path,
    *,
    prompt_column: str,
    categories: dict[str, str],
    prompt_format: str,
    heldout: float | None,
    limit: int | None,
    seed: int,
) -> list[LeftOut]:
    """Write a probe set from a CSV, JSONL or Parquet table; return the rows that are left out.

    A prompt in HH form (`\\n\\nHuman: ... \\n\\nAssistant:`) or a list of chat messages becomes its
    turns, any other text one user turn. A response is text, or a list of messages that ends with
    the assistant's. Where `categories` has `chosen` but no `random`, `random` is drawn within each
    split. Nothing is written before everything is checked.

    Args:
        table: the file. Its suffix says what it is.
        out: directory of the set, new or empty.
        prompt_column: column with the prompts.
        categories: category to column.
        prompt_format: stored in the manifest.
        heldout: number of docs to hold out, exceeded by a few since whole conversations are held
            out. Below 1, the share of conversations, with which no doc changes its split when rows
            are added or removed. Default: 100, of under 500 docs a fifth.
        limit: largest number of docs, drawn at random.
        seed: of the draw, the split and `random`.

    Raises:
        UserError: the table, a column or a category's name is unusable, too few rows are usable, or
            `out` is not empty.
    """
    _check_out(out)
    _check_names(categories)
    left_out: list[LeftOut] = []
    docs = list(_docs(table, prompt_column, categories, left_out))
    if not docs:
        reasons = common_reasons(left_out) if left_out else "it has no rows"
        raise UserError(f"{table} has no usable row: {reasons}.")
    if heldout is None:
        num_docs = min(len(docs), limit or len(docs))
        heldout = min(_DEFAULT_HELDOUT, max(splits.MIN_DOCS, num_docs // 5))
    docs, threshold = _split(docs, heldout, limit, seed)
    writers = {name: f"column {column!r}" for name, column in categories.items()}
    is_random_drawn = "chosen" in categories and "random" not in categories
    _check_sizes(docs, splits.MIN_DOCS if is_random_drawn else 1, heldout)
    if is_random_drawn:
        writers["random"] = "derangement"
        docs = splits.with_random_in_splits(docs, seed)
    provenance = {
        "source": table.name,
        "source_sha256": sha256_file(table),
        "seed": seed,
        "left_out": len(left_out),
        "split": {"rule": splits.RULE, "threshold": threshold},
    }
    make_dir(out.resolve().parent)
    with new_dir(out.resolve()) as temporary:  # complete or absent
        write_docs(temporary, docs)
        write_manifest(temporary, docs, writers, prompt_format, provenance, name=out.resolve().name)
    num_held = sum(doc.split == "heldout" for doc in docs)
    _LOG.info(
        "%d of %d docs are held out. --heldout %s keeps each in its split when rows are added or "
        "removed.",
        *(num_held, len(docs), threshold),
    )
    return left_out


def _check_out(out: Path) -> None:
    if out.is_dir() and (names := sorted(path.name for path in out.iterdir())):
        raise UserError(
            f"{out} is not empty (it holds {', '.join(names[:3])}). Choose another --out."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Choose another --out.")


def _check_names(categories: dict[str, str]) -> None:
    for name in categories:
        if name in RESERVED_COLUMNS:
            columns = ", ".join(RESERVED_COLUMNS)
            raise UserError(
                f"--category {name}: a probe set has a column of this name ({columns}). Choose "
                "another name."
            )
        if not CATEGORY_NAME.fullmatch(name):
            raise UserError(
                f"--category {name}: use lower-case letters, digits and `_`, and do not start with "
                "`train_`."
            )


def _docs(
    table: Path, prompt_column: str, categories: dict[str, str], left_out: list[LeftOut]
) -> Iterator[Doc]:
    """Yield the docs of the usable rows. Raise `UserError` where no row has one of the columns."""
    columns = dict.fromkeys((prompt_column, *categories.values()))
    seen: dict[str, None] = {}  # a set that keeps the order of the columns
    for number, row in enumerate(read_table(table), start=1):
        if isinstance(row.value, dict):
            seen.update(dict.fromkeys(row.value))
        doc_id = f"{stem(table.name)}-{number:05d}"
        try:
            yield _doc(doc_id, row, prompt_column, categories)
        except RowRejectedError as error:
            left_out.append(LeftOut(place=row.place, doc_id=doc_id, reason=str(error)))
    if seen and (missing := [column for column in columns if column not in seen]):
        raise UserError(
            f"{table} has no column {', '.join(missing)}; it has {hh.column_names(seen)}. Name "
            "yours with --prompt COLUMN and --category NAME=COLUMN."
        )


def _doc(doc_id: str, row: Row, prompt_column: str, categories: dict[str, str]) -> Doc:
    columns = {name: _decode_messages(value) for name, value in row.columns().items()}
    values = {category: columns.get(column) for category, column in categories.items()}
    if empty := [name for name, value in values.items() if _is_empty(value)]:
        raise RowRejectedError(f"empty {', '.join(empty)}")
    wrong = {name: value for name, value in values.items() if not isinstance(value, str | list)}
    if wrong:
        faults = (f"{name} is {hh.kind_of(value)}, not text" for name, value in wrong.items())
        raise RowRejectedError(", ".join(faults))
    messages = _prompt(columns.get(prompt_column))
    responses = {name: _response(name, value, messages) for name, value in values.items()}
    hh.check_texts(messages, list(responses.values()))
    return new_doc(doc_id, row, messages, responses)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _decode_messages(value: Any) -> Any:
    """Return the chat messages that a text holds as JSON, as CSV tables do; else `value` itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return decoded if all("role" in turn for turn in decoded if isinstance(turn, dict)) else value


def _prompt(value: Any) -> Messages:
    """Return the turns of a prompt. A whole conversation is cut before the assistant's last
    message."""
    messages = hh.parse_turns(value)
    is_answered = isinstance(value, list) and messages[-1]["role"] == "assistant"
    return messages[:-1] if is_answered else messages


def _response(name: str, value: Any, messages: Messages) -> str:
    """Return the text of a response: text, or the last message of a conversation that continues the
    prompt."""
    if isinstance(value, str):
        return hh.clean_response(value)
    before, text = hh.split_answer(value)
    if hh.join_turns(messages, before) != messages:
        raise RowRejectedError(f"the messages of {name} before its last one are not the prompt's")
    return text


def _split(
    docs: list[Doc], heldout: float, limit: int | None, seed: int
) -> tuple[list[Doc], float]:
    """Return the docs that are drawn, in the order of their hashes and with their splits, and the
    threshold of the split."""
    num_docs = min(len(docs), limit or len(docs))
    if num_docs < 2:
        raise UserError("one row can be used: a set needs one doc to train on and one held out.")
    if heldout >= num_docs:
        raise UserError(
            f"--heldout {heldout:g}: only {num_docs} docs can be used. Hold out fewer, or give a "
            "share below 1."
        )
    threshold = splits.choose_threshold([doc.conversation_id for doc in docs], heldout, seed)

    def key(doc: Doc) -> bytes:
        content = {"conversation_id": doc.conversation_id, "messages": doc.messages}
        return splits.draw_key({**content, **doc.responses}, seed)

    docs = [
        replace(doc, split=splits.split_of(doc.conversation_id, threshold, seed))
        for doc in sorted(docs, key=key)
    ]
    if heldout >= 1:  # a limit takes docs from train alone, so that no doc changes its split
        docs.sort(key=lambda doc: doc.split == "train")
    return docs[:limit], threshold


def _check_sizes(docs: list[Doc], needed: int, heldout: float) -> None:
    counts = Counter(doc.split for doc in docs)
    if any(counts[split] < needed for split in SPLITS):
        num_conversations = len({doc.conversation_id for doc in docs})
        raise UserError(
            f"holding out {heldout:g} gives {counts['train']} docs for train and "
            f"{counts['heldout']} held out, and each split needs {needed}. Whole conversations are "
            f"held out, and the {len(docs)} docs are of {num_conversations}. Give more rows, or "
            "another --heldout or --seed."
        )
