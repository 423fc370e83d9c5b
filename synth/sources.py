"""Raw rows from local files, directories or the Hugging Face hub, and the docs they hold."""

import csv
import gzip
import hashlib
import json
import logging
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.files import sha256_file
from sft_probe.probe_set import Doc, LeftOut, Place, is_unicode
from sft_probe.synth.hh import Messages, RowRejectedError, parse_row
from sft_probe.synth.splits import root_id

_LOG = logging.getLogger(__name__)
HH = "Anthropic/hh-rlhf"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_TABLE_SUFFIXES = (".csv", *_SUFFIXES)
_HELD_OUT = "test|heldout|held_out|held-out|valid|validation|val|eval|dev"
_SPLIT_FILE = re.compile(rf"(train|{_HELD_OUT})(-\d+-of-\d+)?")
_SPLIT_OF_HUB = re.compile(rf"(train|{_HELD_OUT})(_\w+)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
Numbered = Iterator[tuple[int, Any, str | None]]
"""Line number, value, and why there is no value."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source, or the reason why it cannot be read."""

    place: Place
    split: str | None
    """`train` or `heldout` where the source says so."""
    value: Any
    fault: str | None = None

    def columns(self) -> dict[str, Any]:
        """Return the values by column. Raise `RowRejectedError` where there are none."""
        if self.fault or not isinstance(self.value, dict):
            raise RowRejectedError(self.fault or "not a JSON object")
        return self.value


def read_pairs(source: str, left_out: list[LeftOut], revision: str | None = None) -> list[Doc]:
    """Return every usable preference pair of a source, in its order; others go to `left_out`.

    Raises:
        UserError: the source does not exist, or one of its files is damaged.
    """
    seen: dict[bytes, Place] = {}
    docs = []
    for row in read_rows(source, revision):
        try:
            messages, responses = parse_row(row.columns())
        except RowRejectedError as error:
            left_out.append(LeftOut(place=row.place, reason=str(error)))
            continue
        digest = hashlib.sha256(json.dumps([messages, responses]).encode()).digest()
        if digest in seen:
            reason, first = "the same as an earlier row", str(seen[digest])
            left_out.append(LeftOut(place=row.place, reason=reason, detail=first))
            continue
        seen[digest] = row.place
        doc_id = f"{stem(row.place.file)}-{row.place.line:06d}"
        docs.append(new_doc(doc_id, row, messages, responses))
    return docs


def new_doc(doc_id: str, row: Row, messages: Messages, responses: dict[str, str]) -> Doc:
    """Return the doc of a row."""
    return Doc(
        doc_id=doc_id,
        conversation_id=root_id(messages),
        split=row.split or "",
        messages=tuple(messages),
        responses=responses,
        place=row.place,
    )


def read_rows(source: str, revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, a directory of them, or a hub
    data set.

    Raises:
        UserError: the source does not exist, or one of its files is damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        yield from _hub_rows(source, revision)
        return
    for file in source_files(path):
        split = _split_of(_SPLIT_FILE, stem(file.name)) if path.is_dir() else None
        yield from _file_rows(file, split)


def _file_rows(path: Path, split: str | None = None) -> Iterator[Row]:
    read = {".parquet": _parquet_rows, ".csv": _csv_rows}.get(path.suffix, _jsonl_rows)
    for line, value, fault in read(path):
        yield Row(place=Place(path.name, line), split=split, value=value, fault=fault)


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a `.csv`, `.jsonl`, `.jsonl.gz` or `.parquet` table.

    Raises:
        UserError: the file cannot be read, or a row of a `.csv` file has a different number of
            fields than its header.
    """
    if not path.name.endswith(_TABLE_SUFFIXES):
        raise UserError(f"{path}: a table is a {', '.join(_TABLE_SUFFIXES)} file.")
    if not path.is_file():
        raise UserError(f"cannot read the table {path}: no such file.")
    yield from _file_rows(path)


def source_files(path: Path) -> list[Path]:
    """Return the files of a local source, sorted by name.

    Raises:
        UserError: there are none, or two differ only in their suffix.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not files or not all(file.name.endswith(_SUFFIXES) for file in files):
        suffixes = ", ".join(_SUFFIXES)
        raise UserError(f"{path}: a source is a {suffixes} file, or a directory of them.")
    if len({stem(file.name) for file in files}) < len(files):
        raise UserError(
            f"{path} holds files that differ only in their suffix, so their rows cannot be told "
            "apart. Rename or remove one."
        )
    return files


def source_sha256(source: str) -> dict[str, str]:
    """Return the hash of each file of a local source; nothing for the hub, which has a revision."""
    path = Path(source).expanduser()
    return {file.name: sha256_file(file) for file in source_files(path)} if path.exists() else {}


def hub_revision(source: str) -> str | None:
    """Return the current commit of a hub source; None for a local source or without a network."""
    if Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0]).sha
    except OSError as error:  # offline: the cached copy may do; if not, reading it says so
        _LOG.warning("the revision of %s is not known (%s)", source, type(error).__name__)
        return None


def stem(name: str) -> str:
    """Return a file name without the suffix that says how to read it."""
    for suffix in _TABLE_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _split_of(pattern: re.Pattern[str], name: str) -> str | None:
    """Return the split that a whole name stands for: `test-00000-of-00002`, not `testimonials`."""
    match = pattern.fullmatch(name)
    return match and ("train" if match[1] == "train" else "heldout")


def _jsonl_rows(path: Path) -> Numbered:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value, fault = json.loads(line), None
                except (ValueError, RecursionError):
                    value, fault = None, "not valid JSON in UTF-8"
                yield number, value, fault
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path} to its end: {error}. Download or copy the file again."
        ) from error


def _csv_rows(path: Path) -> Numbered:
    """Yield rows with the line that each starts in. A row with bytes that are not UTF-8 is a
    fault."""
    csv.field_size_limit(sys.maxsize)  # global to the module; a text may exceed its 131,072
    try:
        # utf-8-sig: Excel writes a byte order mark; surrogates stand for bytes that are not UTF-8
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _checked_header(path, next(reader, []))
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) not in (0, len(header)):
                    raise UserError(
                        f"{path}, line {line}: {len(fields)} fields, but the header has "
                        f"{len(header)}. Put a text that holds a comma or a line end in double "
                        'quotes ("..."), and double the quotes inside it.'
                    )
                if fields:
                    fault = None if is_unicode(fields) else "bytes that are not UTF-8"
                    yield line, dict(zip(header, fields, strict=True)), fault
                line = reader.line_num + 1
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}.") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def _checked_header(path: Path, header: list[str]) -> list[str]:
    fault = None
    if not header:
        raise UserError(f"the table {path} is empty: its first line must name the columns.")
    if not is_unicode(header) or "\0" in "".join(header):
        fault = "not UTF-8 (UTF-16, as some programs save it?). Save the table as UTF-8."
    elif len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        fault = "no commas between the columns. Save the table with commas as separators."
    elif repeated := [name for name, count in Counter(header).items() if count > 1]:
        fault = f"the column {', '.join(repeated)} comes more than once. Rename one of them."
    if fault:
        raise UserError(f"{path}, line 1: {fault}")
    return header


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value, fault in _batch_rows(batch):
                    number += 1
                    yield number, value, fault
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _batch_rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    try:
        yield from ((value, None) for value in batch.to_pylist())
    except UnicodeDecodeError:  # raised before the first row: find the rows at fault one by one
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0], None
            except UnicodeDecodeError:
                yield None, "bytes that are not UTF-8"


def _hub_rows(source: str, revision: str | None) -> Iterator[Row]:
    import datasets

    if not _HUB_ID.fullmatch(source):
        raise UserError(
            f"no source {source!r}: not a file or directory here, and not a data set id of the hub."
        )
    name, _, data_dir = source.partition(":")
    data_dir = data_dir or ("helpful-base" if name == HH else "")
    try:
        splits = datasets.load_dataset(
            name, data_dir=data_dir or None, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"no source {source!r}: not a file here, and the hub did not return it ({error})."
        ) from error
    for name, rows in splits.items():
        split = _split_of(_SPLIT_OF_HUB, str(name))
        for line, value in enumerate(rows, start=1):
            yield Row(place=Place(str(name), line), split=split, value=value)
