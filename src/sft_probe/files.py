"""Files that are complete or absent: temporary name, fsync, rename.

A temporary name starts with a dot, ends in `.tmp` and is used by one writer alone. Readers of a
folder go through `find`, which leaves such names out.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

from sft_probe.errors import UserError, did_you_mean


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dir(path: Path) -> Path:
    """Create `path` and its parents. Raises `UserError` where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the directory {path}: {error.strerror}. Choose another one."
        ) from error
    return path


def check_exists(path: Path) -> None:
    """Raise `UserError` where a path does not exist, with the one beside it that was perhaps
    meant."""
    if path.exists():
        return
    beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UserError(f"{path} does not exist.{did_you_mean(path.name, beside)}")


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the paths below `folder` that match `pattern`, sorted, without hidden ones.

    `Path.glob("*")` also matches names that start with a dot: files that are being written, or that
    a killed process left behind.
    """
    paths = folder.glob(pattern)
    return sorted(
        path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)
    )


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in `folder`, of the file or directory `name`
    or of all.

    The caller holds the lock of what is written there, so that no other process writes it.
    """
    for path in folder.glob(f".{name}*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there replaces `final` in one rename, unless it
    raises."""
    temporary = _temporary(final)
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(final.parent)


def _temporary(final: Path) -> Path:
    """Return a name beside `final` that no other process or thread uses."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: readers see the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write a UTF-8 file atomically, one part after the other, so that a large one need not be held
    in memory."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_parts(path, (to_json(row) + "\n" for row in rows))


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, with null for NaN and infinities, which JSON does not have."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def jsonl_lines(text: str) -> list[str]:
    """Return the lines of a JSONL file: only `\\n` ends one.

    `str.splitlines` also cuts at U+2028, U+0085 and others, which may stand inside a text.
    """
    return text.removesuffix("\n").split("\n") if text else []


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` naming the file and line of a fault."""
    text = _read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, brackets in thousands of brackets
        raise UserError(f"{path}: JSON that cannot be read ({error}).") from error


def _read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises `UserError` naming the file where it is none."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line. Raises `UserError` naming the file and line of a
    fault."""
    rows = []
    for number, line in enumerate(jsonl_lines(_read_text(path)), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: must be a JSON object, not {_shown(row)}.")
        rows.append(row)
    return rows


Kinds = Mapping[str, type | UnionType]
"""Keys of a JSON object to the types of their values. `float` takes whole numbers too, and `int` no
booleans."""


def read_object(
    path: Path, required: Kinds | None = None, optional: Kinds | None = None
) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        required: keys that must be there.
        optional: keys that may be absent.

    Raises:
        UserError: the file is unreadable or of another shape; names file and key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {_shown(value)}.")
    for key in required or {}:
        if key not in value:
            raise UserError(f"{path} has no {key!r}.")
    for key, kind in {**(required or {}), **(optional or {})}.items():
        if key in value and not _fits(value[key], kind):
            raise UserError(f"{path}: {key!r} is {_shown(value[key])}, not {_named(kind)}.")
    return value


def _fits(value: Any, kind: type | UnionType) -> bool:
    kinds = _alternatives(kind)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _named(kind: type | UnionType) -> str:
    names = {
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "dict": "an object",
        "list": "a list",
    }
    return " or ".join(names.get(part.__name__, "null") for part in _alternatives(kind))


def _alternatives(kind: type | UnionType) -> tuple[type, ...]:
    return kind.__args__ if isinstance(kind, UnionType) else (kind,)


@contextmanager
def new_dir(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `final` in one rename when the block ends without an
    error.

    `final` exists only complete. Where it exists at the end, another process has written it
    meanwhile: the new directory is discarded.
    """
    temporary = _temporary(final)
    make_dir(temporary)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            fsync_path(path)
        _rename_dir(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(final.parent)


def _rename_dir(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)
