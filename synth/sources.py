"""Where raw preference pairs come from: local files, directories of them, or the Hugging Face
hub."""

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
from sft_probe.probe_set import is_unicode
from sft_probe.synth.hh import Pair, RowRejectedError, parse_row

_LOG = logging.getLogger(__name__)
_HH = "Anthropic/hh-rlhf"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_TABLE_SUFFIXES = (".csv", *_SUFFIXES)
_HELD_OUT = "test|heldout|held_out|held-out|valid|validation|val|eval|dev"
_SPLIT_FILE = re.compile(rf"(train|{_HELD_OUT})(-\d+-of-\d+)?")
_SPLIT_OF_HUB = re.compile(rf"(train|{_HELD_OUT})(_\w+)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source, with its place."""

    file: str
    line: int
    """From 1; of Parquet files and the hub, the number of the row."""
    split: str | None
    """`train` or `heldout` where the source says so."""
    value: Any
    fault: str | None = None
    """Why there is no value."""


@dataclass(frozen=True, kw_only=True)
class SourcePair(Pair):
    """A pair and where it stood."""

    doc_id: str
    file: str
    line: int
    split: str | None


class Rejected:
    """The rows and docs that were left out, each with its reason: nothing is lost without a
    word."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, place: Row | SourcePair, reason: str, **detail: str) -> None:
        """Notes that a row is left out; `detail` says what differs from row to row."""
        doc_id = {"doc_id": place.doc_id} if isinstance(place, SourcePair) else {}
        self.rows.append(
            {"file": place.file, "line": place.line, **doc_id, "reason": reason, **detail}
        )

    def reasons(self) -> str:
        """The most common reasons, with how many rows each has cost."""
        counts = Counter(str(row["reason"]) for row in self.rows)
        return (
            "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3)) or "nothing"
        )


def read_pairs(source: str, rejected: Rejected, revision: str | None = None) -> list[SourcePair]:
    """Every usable pair of a source in its order; all other rows go to `rejected`. `revision` is
    that of a hub source.

    Raises:
        UserError: there is no such source, or a file of it is damaged.
    """
    seen: dict[bytes, str] = {}
    pairs = []
    for row in read_rows(source, revision):
        try:
            if row.fault or not isinstance(row.value, dict):
                raise RowRejectedError(row.fault or "not a JSON object")
            pair = parse_row(row.value)
        except RowRejectedError as error:
            rejected.add(row, str(error))
            continue
        fields = vars(pair)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()
        if digest in seen:
            rejected.add(row, "the same as an earlier row", earlier=seen[digest])
            continue
        seen[digest] = f"{row.file}, line {row.line}"
        doc_id = f"{stem(row.file)}-{row.line:06d}"
        pairs.append(
            SourcePair(**fields, doc_id=doc_id, file=row.file, line=row.line, split=row.split)
        )
    return pairs


def read_rows(source: str, revision: str | None = None) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, of a directory of them, or of a hub
    data set.

    Raises:
        UserError: see `read_pairs`.
    """
    path = Path(source).expanduser()
    if not path.exists():
        yield from _hub_rows(source, revision)
        return
    for file in source_files(path):
        read = _parquet_rows if file.suffix == ".parquet" else _jsonl_rows
        split = _split_of(_SPLIT_FILE, stem(file.name)) if path.is_dir() else None
        for line, value, fault in read(file):
            yield Row(file=file.name, line=line, split=split, value=value, fault=fault)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a `.csv` table, or of a file that can be a source.

    Raises:
        UserError: the file cannot be read, or a row of a `.csv` file has not as many fields as its
        header.
    """
    if not path.name.endswith(_TABLE_SUFFIXES):
        raise UserError(f"{path}: a table is a {', '.join(_TABLE_SUFFIXES)} file.")
    if not path.is_file():
        raise UserError(f"cannot read the table {path}: no such file.")
    if path.suffix != ".csv":
        yield from read_rows(str(path))
        return
    for line, value, fault in _csv_rows(path):
        yield Row(file=path.name, line=line, split=None, value=value, fault=fault)


def source_files(path: Path) -> list[Path]:
    """The files of a local source, by name. Raises `UserError` where there is none, or two have one
    name."""
    files = (
        sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
        if path.is_dir()
        else [path]
    )
    if not files or not all(file.name.endswith(_SUFFIXES) for file in files):
        raise UserError(
            f"{path}: a source is a {', '.join(_SUFFIXES)} file, or a directory of them."
        )
    if len({stem(file.name) for file in files}) < len(files):
        raise UserError(
            f"{path} holds files that differ in their suffix only, so their rows cannot be told "
            "apart."
        )
    return files


def source_sha256(source: str) -> dict[str, str]:
    """File name to hash of a local source; empty for the hub, where the name and revision stand for
    it."""
    path = Path(source).expanduser()
    return {file.name: sha256_file(file) for file in source_files(path)} if path.exists() else {}


def hub_revision(source: str) -> str | None:
    """The commit that a hub source stands at now; None for a local one, and where the hub cannot be
    asked."""
    if Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0]).sha
    except (
        OSError
    ) as error:  # offline the copy in the cache may do; else reading it says what is wrong
        _LOG.warning("the revision of %s is not known (%s)", source, type(error).__name__)
        return None


def stem(name: str) -> str:
    """The name of a file without what says how it is read."""
    for suffix in _TABLE_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _split_of(pattern: re.Pattern[str], name: str) -> str | None:
    """The split that a whole name stands for: `train`, `test-00000-of-00002`, but not
    `testimonials`."""
    if (match := pattern.fullmatch(name)) is None:
        return None
    return "train" if match[1] == "train" else "heldout"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, *_parse_json(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} to its end: {error}. Get the file again.") from error


def _parse_json(line: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(line), None
    except (ValueError, RecursionError):
        return None, "not valid JSON in UTF-8"


def _csv_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Rows with the line that each starts in. Bytes that are no UTF-8 are a fault of their row."""
    csv.field_size_limit(
        sys.maxsize
    )  # of the module, for all readers: a text may be longer than its 131,072
    try:
        # utf-8-sig: Excel writes a byte order mark; surrogates stand for bytes that are not UTF-8
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _checked_header(path, next(reader, []))
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) not in (0, len(header)):
                    raise UserError(
                        f"{path}, line {line}: {len(fields)} fields, and the header has "
                        f"{len(header)}. Put a text that "
                        'holds a comma or a line end in double quotes ("..."), and double the '
                        "quotes inside it."
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
    if not header:
        raise UserError(f"the table {path} is empty: its first line must name the columns.")
    if not is_unicode(header) or "\0" in "".join(header):
        raise UserError(
            f"{path}, line 1: not UTF-8 (UTF-16, as some programs save it?). Save the table as "
            "UTF-8."
        )
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise UserError(
            f"{path}, line 1: no commas between the columns. Save the table with commas as "
            "separators."
        )
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(
            f"{path}, line 1: the column {', '.join(repeated)} comes more than once. Rename one of "
            "them."
        )
    return header


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
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
    except UnicodeDecodeError:  # raised before the first row; one of them is at fault, not all
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0], None
            except UnicodeDecodeError:
                yield None, "bytes that are not UTF-8"


def _hub_rows(source: str, revision: str | None) -> Iterator[Row]:
    import datasets

    if not _HUB_ID.fullmatch(source):
        raise UserError(
            f"no source {source!r}: it is no file or directory here, and no data set id of the hub."
        )
    name, _, data_dir = source.partition(":")
    data_dir = data_dir or ("helpful-base" if name == _HH else "")
    try:
        splits = datasets.load_dataset(
            name, data_dir=data_dir or None, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"no source {source!r}: no file here, and the hub did not give it ({error})."
        ) from error
    for split, rows in splits.items():
        for line, value in enumerate(rows, start=1):
            yield Row(
                file=str(split), line=line, split=_split_of(_SPLIT_OF_HUB, str(split)), value=value
            )
