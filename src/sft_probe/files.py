"""Files that are complete or absent: temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dir(path: Path) -> Path:
    """Creates `path` and its parents. Raises `UserError` where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the directory {path}: {error.strerror}. Choose another one.") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically: readers see the old file or the new one, never a part."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write a UTF-8 file atomically, one part after the other, so that a large one need not be held in memory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    write_parts(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def jsonl_lines(text: str) -> list[str]:
    """The lines of a JSONL file: only `\\n` ends one.

    `str.splitlines` also cuts at U+2028, U+0085 and others, which may stand inside a text.
    """
    return text.removesuffix("\n").split("\n") if text else []


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises `UserError` naming the file and line of a fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error


@contextmanager
def new_dir(final: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `final` in one rename when the block ends without an error.

    A leftover of an earlier, killed attempt under the same name is removed first, so that `final` exists only complete.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_dir(temporary)
    yield temporary
    for path in temporary.rglob("*"):
        fsync_path(path)
    temporary.rename(final)
    fsync_path(final.parent)
