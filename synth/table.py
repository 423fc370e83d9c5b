"""A probe set from a table that the user has: one row per prompt, one column per category."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.files import make_dir, new_dir, sha256_file, write_jsonl
from sft_probe.probe_set import CATEGORY_NAME, RESERVED_COLUMNS, SPLITS
from sft_probe.synth.hh import (
    RowRejectedError,
    check_texts,
    clean_response,
    column_names,
    kind_of,
    parse_turns,
)
from sft_probe.synth.output import write_manifest
from sft_probe.synth.sources import Row, read_table, stem
from sft_probe.synth.splits import (
    MIN_DOCS,
    RULE,
    add_random,
    choose_threshold,
    draw_key,
    root_id,
    split_of,
)

_LOG = logging.getLogger(__name__)


def write_probe_set(
    table: Path,
    out: Path,
    *,
    prompt_column: str,
    categories: dict[str, str],
    prompt_format: str,
    heldout: float,
    limit: int | None,
    seed: int,
) -> list[str]:
    """Writes a probe set from a CSV, JSONL or Parquet table; returns why rows were left out, one
    line each.

    A prompt in HH form (`\\n\\nHuman: ... \\n\\nAssistant:`) becomes its turns, any other one user
    turn. Responses are stripped. Where `categories` has `chosen` but no `random`, `random` is the
    seeded derangement within each split. Nothing is written before all is checked.

    Args:
        table: the file; its suffix says what it is.
        out: directory of the set, new or empty.
        prompt_column: column with the prompts.
        categories: category to column.
        prompt_format: stored in the manifest.
        heldout: number of docs held out; whole conversations are, so it may be passed by a few. A
        number below 1 is
            the share of conversations: with it no doc changes its split when rows are added or
            taken away.
        limit: number of docs at most, drawn at random.
        seed: of the draw, the split and the derangement.

    Raises:
        UserError: the table, a column or a category's name is unusable, too few rows are usable, or
        `out` is not empty.
    """
    check_new_directory(out)
    _check_names(categories)
    left_out: list[str] = []
    docs = list(_docs(table, prompt_column, categories, left_out))
    if not docs:
        raise UserError(f"{table} has no usable row: {_summary(left_out)}.")
    docs, threshold = _split(docs, heldout, limit, seed)
    writers = {name: f"column {column!r}" for name, column in categories.items()}
    is_random_drawn = "chosen" in categories and "random" not in categories
    _check_sizes(docs, MIN_DOCS if is_random_drawn else 1, heldout)
    if is_random_drawn:
        writers["random"] = "derangement"
        for split in SPLITS:
            add_random([doc for doc in docs if doc["split"] == split], seed)
    provenance = {
        "source": table.name,
        "source_sha256": sha256_file(table),
        "seed": seed,
        "left_out": len(left_out),
        "split": {"rule": RULE, "threshold": threshold},
    }
    _write(out.resolve(), docs, writers, prompt_format, provenance)
    num_held = sum(doc["split"] == "heldout" for doc in docs)
    _LOG.info(
        "%d of %d docs are held out. --heldout %s keeps each in its split when rows are added or "
        "taken away.",
        num_held,
        len(docs),
        threshold,
    )
    return left_out


def _write(
    out: Path,
    docs: list[dict[str, Any]],
    writers: dict[str, str],
    prompt_format: str,
    provenance: dict[str, Any],
) -> None:
    """Writes the set under another name and renames it: `out` is complete, or what it was."""
    make_dir(out.parent)
    with new_dir(out) as temporary:
        for split in SPLITS:
            write_jsonl(
                temporary / f"{split}.jsonl", [doc for doc in docs if doc["split"] == split]
            )
        write_manifest(temporary, writers, prompt_format, provenance, name=out.name)


def _summary(left_out: list[str]) -> str:
    """The most common reasons, with how many rows each has cost and where the first one is."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for line in left_out:
        place, _, reason = line.partition(": ")
        first.setdefault(reason, place)
        counts[reason] += 1
    common = (
        f"{reason} ({count} rows, the first in {first[reason]})"
        for reason, count in counts.most_common(3)
    )
    return "; ".join(common) or "it has no rows"


def check_new_directory(out: Path) -> None:
    """Raises `UserError` where `out` holds anything."""
    if out.is_dir() and (names := sorted(path.name for path in out.iterdir())):
        raise UserError(
            f"{out} is not empty (it holds {', '.join(names[:3])}). Choose another --out."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Choose another --out.")


def _check_names(categories: dict[str, str]) -> None:
    for name in categories:
        if name in RESERVED_COLUMNS:
            raise UserError(
                f"--category {name}: a probe set has a column of this name "
                f"({', '.join(RESERVED_COLUMNS)}). Choose another name."
            )
        if not CATEGORY_NAME.fullmatch(name):
            raise UserError(
                f"--category {name}: use lower-case letters, digits and `_`, and do not start with "
                "`train_`."
            )


def _docs(
    table: Path, prompt_column: str, categories: dict[str, str], left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """The docs of the usable rows; the others go to `left_out`. Raises `UserError` where no row has
    a column."""
    columns = dict.fromkeys((prompt_column, *categories.values()))
    seen: dict[str, None] = {}  # as a set that keeps the order of the columns
    for number, row in enumerate(read_table(table), start=1):
        if isinstance(row.value, dict):
            seen.update(dict.fromkeys(row.value))
        try:
            fields = _doc(row, prompt_column, categories)
        except RowRejectedError as error:
            place = (
                f"row {number}" if table.suffix == ".parquet" else f"line {row.line}, row {number}"
            )
            left_out.append(f"{place}: {error}")
            continue
        yield {"doc_id": f"{stem(table.name)}-{number:05d}", **fields}
    if seen and (missing := [column for column in columns if column not in seen]):
        raise UserError(
            f"{table} has no column {', '.join(missing)}; it has {column_names(seen)}. Name yours "
            "with --prompt COLUMN and --category NAME=COLUMN."
        )


def _doc(row: Row, prompt_column: str, categories: dict[str, str]) -> dict[str, Any]:
    if row.fault or not isinstance(row.value, dict):
        raise RowRejectedError(row.fault or "not a JSON object")
    values = {category: row.value.get(column) for category, column in categories.items()}
    if empty := [
        name
        for name, text in values.items()
        if text is None or (isinstance(text, str) and not text.strip())
    ]:
        raise RowRejectedError(f"empty {', '.join(empty)}")
    if faults := [
        f"{name} is {kind_of(text)}, not text"
        for name, text in values.items()
        if not isinstance(text, str)
    ]:
        raise RowRejectedError(", ".join(faults))
    prompt = row.value.get(prompt_column)
    messages = parse_turns(prompt) if prompt != "" else []
    texts = {name: clean_response(str(text)) for name, text in values.items()}
    check_texts(messages, list(texts.values()))
    return {"conversation_id": root_id(messages), "split": "", "messages": messages, **texts}


def _content(doc: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in doc.items() if name not in ("doc_id", "split")}


def _split(
    docs: list[dict[str, Any]], heldout: float, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], float]:
    """The docs that are drawn, in the order of their hashes, each with its split; and the threshold
    of the split."""
    if heldout >= 1 and not heldout < min(len(docs), limit or len(docs)):
        raise UserError(
            f"--heldout {heldout:g} of {min(len(docs), limit or len(docs))} docs leaves one of the "
            "splits empty."
        )
    threshold = choose_threshold([doc["conversation_id"] for doc in docs], heldout, seed)
    for doc in docs:
        doc["split"] = split_of(doc["conversation_id"], threshold, seed)
    docs = sorted(docs, key=lambda doc: draw_key(_content(doc), seed))
    if (
        heldout >= 1
    ):  # the docs that a limit costs are those of train, so that none changes its split
        docs.sort(key=lambda doc: doc["split"] == "train")
    return docs[:limit], threshold


def _check_sizes(docs: list[dict[str, Any]], needed: int, heldout: float) -> None:
    counts = Counter(doc["split"] for doc in docs)
    if any(counts[split] < needed for split in SPLITS):
        num_conversations = len({doc["conversation_id"] for doc in docs})
        raise UserError(
            f"--heldout {heldout:g} gives {counts['train']} docs for train and "
            f"{counts['heldout']} held out, and each "
            f"split needs {needed}. Whole conversations are held out, and the {len(docs)} docs are "
            f"of {num_conversations}. Give more rows, or another --heldout or --seed."
        )
