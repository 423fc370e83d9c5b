"""All answers ever paid for, in one sqlite file, by a hash of everything that they depend on."""

import asyncio
import hashlib
import json
import math
import shutil
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from sft_probe.errors import UserError
from sft_probe.files import make_dir
from sft_probe.synth.asking.protocol import Answer, Request, WriterId

_SCHEMA_VERSION = 1
_NUM_COPIES = 10
_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, writer TEXT, model TEXT, api_version TEXT,
    template TEXT, template_sha256 TEXT, doc_id TEXT, category TEXT, sample_index INTEGER,
    status TEXT, raw TEXT, text TEXT, reason TEXT,
    model_version TEXT, num_prompt_tokens INTEGER, num_output_tokens INTEGER, cost_usd REAL,
    attempts INTEGER, answered_at TEXT
) WITHOUT ROWID;
CREATE TABLE reservations (id INTEGER PRIMARY KEY, cost_usd REAL NOT NULL);
CREATE TABLE jobs (
    display_name TEXT PRIMARY KEY, name TEXT, writer TEXT, model TEXT, keys TEXT,
    cost_usd REAL NOT NULL
);
"""
_ANSWER_FIELDS = [field.name for field in fields(Answer)]
_SELECT = f"SELECT {', '.join(_ANSWER_FIELDS)} FROM answers WHERE key = ?"  # noqa: S608 - our own names
_SAVE = """
INSERT INTO answers VALUES (
    :key, :writer, :model, :api_version, :template, :template_sha256, :doc_id, :category,
    :sample_index, :status, :raw, :text, :reason, :model_version, :num_prompt_tokens,
    :num_output_tokens, :cost_usd, :attempts, :answered_at
)
ON CONFLICT (key) DO UPDATE SET
    status = excluded.status, raw = excluded.raw, text = excluded.text, reason = excluded.reason,
    model_version = excluded.model_version, num_prompt_tokens = excluded.num_prompt_tokens,
    num_output_tokens = excluded.num_output_tokens,
    cost_usd = coalesce(cost_usd + excluded.cost_usd, cost_usd, excluded.cost_usd),
    attempts = attempts + excluded.attempts, answered_at = excluded.answered_at
"""
_RELEASE = "DELETE FROM reservations WHERE id = ?"
_OF_WRITER = "writer = ? AND model = ? AND api_version = ?"
Statement = tuple[str, tuple[object, ...] | dict[str, object]]


@dataclass(frozen=True)
class Job:
    """A batch job whose answers are not stored yet."""

    display_name: str
    """Name of our choice, stored before the job is created, so that the job is found after a
    crash."""
    name: str | None
    """Name given by the server; None where the program ended before it arrived."""
    keys: tuple[str, ...]
    """Keys of its requests."""
    cost_usd: float
    """Worst case, counted as spent until the job is read."""


class Count(NamedTuple):
    """Totals of the answers of one category and status."""

    category: str
    status: str
    num_answers: int
    num_prompt_tokens: int
    num_output_tokens: int
    cost_usd: float


def request_key(writer: WriterId, request: Request) -> str:
    """Return the hex SHA-256 of everything that an answer depends on, doc and category excluded."""
    parts = [
        writer.name,
        writer.model,
        writer.api_version,
        request.template_sha256,
        request.prompt,
        {"temperature": request.temperature, "max_output_tokens": request.max_output_tokens},
        request.sample_index,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Store:
    """The answers of all runs, for any number of readers and one writing run (`exclusive`).

    What an awaited method writes is on disk (WAL, synchronous=FULL) when it returns. Statements
    that arrive while the disk is busy share the next commit.

    Raises:
        UserError: the file cannot be opened, is not an sqlite file, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        make_dir(path.parent)
        self.path = path
        self._connection = _open(path)
        # another connection: it sees nothing that is not on disk
        self._reader = sqlite3.connect(path, timeout=30, check_same_thread=False)
        # for callers that do not close it: from Python 3.13 on sqlite warns
        self._close_file = weakref.finalize(self, _close, self._connection, self._reader)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._queue: list[tuple[tuple[Statement, ...], asyncio.Future[int | None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._executor.shutdown()
        self._close_file()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the store for one writing run. Raise `UserError` where another run holds it."""
        try:
            lock = FileLock(f"{self.path}.lock", timeout=0).acquire()
        except Timeout:
            raise UserError(
                f"another run is writing to {self.path}. Wait for it, or stop it."
            ) from None
        with lock:
            yield

    def get(self, writer: WriterId, request: Request) -> Answer | None:
        """Return the stored answer, whatever its status."""
        return self.get_key(request_key(writer, request))

    def get_key(self, key: str) -> Answer | None:
        """Return the stored answer of a `request_key`."""
        rows = self._read(_SELECT, key)
        return Answer(**dict(zip(_ANSWER_FIELDS, rows[0], strict=True))) if rows else None

    def forget_without_text(self, writer: WriterId, category: str | None) -> None:
        """Mark the answers without a text of one category, or of all, to be requested again."""
        sql = (
            f"UPDATE answers SET status = 'error' WHERE {_OF_WRITER} AND status != 'ok' "  # noqa: S608
            "AND ? IN (category, '')"
        )
        values = (writer.name, writer.model, writer.api_version, category or "")
        self._executor.submit(self._commit, [((sql, values),)]).result()

    def counts(self) -> list[Count]:
        """Return the answers by category and status, with tokens and cost (0 if it is unknown)."""
        rows = self._read(
            "SELECT category, status, count(*), CAST(total(num_prompt_tokens) AS INTEGER), "
            "CAST(total(num_output_tokens) AS INTEGER), total(cost_usd) "
            "FROM answers GROUP BY category, status ORDER BY category, status"
        )
        return [Count(*row) for row in rows]

    def cost_usd(self) -> float:
        """Return what was or may have been spent: answers, lost calls, unread batch jobs."""
        tables = ("answers", "reservations", "jobs")
        sums = " + ".join(f"(SELECT total(cost_usd) FROM {table})" for table in tables)  # noqa: S608
        return float(self._read(f"SELECT {sums}")[0][0])

    def cost_of(self, keys: Iterable[str]) -> float:
        """Return what the answers of these request keys cost."""
        sql = "SELECT cost_usd FROM answers WHERE key = ?"
        return math.fsum(row[0] or 0.0 for key in keys for row in self._read(sql, key))

    def lost_calls(self) -> tuple[int, float]:
        """Return the number of calls without an answer (killed, cut, timed out), and their worst
        case in USD."""
        [(count, cost)] = self._read("SELECT count(*), total(cost_usd) FROM reservations")
        return count, cost

    def num_unpriced(self) -> int:
        """Return the number of paid answers of runs that knew no price."""
        is_paid = "status != 'error' AND coalesce(num_prompt_tokens, 1) > 0"
        sql = f"SELECT count(*) FROM answers WHERE cost_usd IS NULL AND {is_paid}"  # noqa: S608
        return int(self._read(sql)[0][0])

    def model_version(self, writer: WriterId) -> str | None:
        """Return the model version of this writer's answers so far."""
        return self._first("model_version", writer, "status != 'error'")

    def has_text(self, writer: WriterId) -> bool:
        """Return whether this writer and model have any text."""
        return self._first("key", writer, "status = 'ok'") is not None

    def _first(self, column: str, writer: WriterId, condition: str) -> str | None:
        sql = (
            f"SELECT {column} FROM answers WHERE {_OF_WRITER} AND {column} NOTNULL AND {condition}"  # noqa: S608
        )
        rows = self._read(f"{sql} LIMIT 1", writer.name, writer.model, writer.api_version)
        return rows[0][0] if rows else None

    def jobs(self, writer: WriterId) -> list[Job]:
        """Return the batch jobs of this writer and model that are not read yet."""
        rows = self._read(
            "SELECT display_name, name, keys, cost_usd FROM jobs WHERE writer = ? AND model = ? "
            "ORDER BY rowid",
            *(writer.name, writer.model),
        )
        return [Job(row[0], row[1], tuple(json.loads(row[2])), row[3]) for row in rows]

    def _read(self, sql: str, *values: object) -> list[Any]:
        try:
            return self._reader.execute(sql, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _damaged(self.path, error) from None

    async def reserve(self, cost_usd: float) -> int:
        """Record the worst case of a call that is about to be made; return the reservation's id."""
        row = await self._write(("INSERT INTO reservations (cost_usd) VALUES (?)", (cost_usd,)))
        assert row is not None  # noqa: S101 - an INSERT has a row id
        return row

    async def release(self, reservation: int) -> None:
        """Delete the reservation of a call that cost nothing."""
        await self._write((_RELEASE, (reservation,)))

    async def save(
        self,
        writer: WriterId,
        request: Request,
        answer: Answer,
        *,
        cost_usd: float | None,
        attempts: int,
        reservation: int | None,
    ) -> None:
        """Store an answer and delete its reservation in one commit. Cost and attempts of earlier
        answers are added."""
        values: dict[str, object] = {
            **{"key": request_key(writer, request), "writer": writer.name},
            **{"model": writer.model, "api_version": writer.api_version},
            **vars(request),
            **vars(answer),
            **{"cost_usd": cost_usd, "attempts": attempts},
            "answered_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        await self._write(
            (_SAVE, {name: _clean(value) for name, value in values.items()}),
            (_RELEASE, (reservation,)),
        )

    async def save_job(self, writer: WriterId, job: Job) -> None:
        """Store a batch job, or the name that the server gave it."""
        keys = json.dumps(job.keys)
        values = (job.display_name, job.name, writer.name, writer.model, keys, job.cost_usd)
        await self._write(("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)", values))

    async def close_job(self, job: Job) -> None:
        """Delete a job whose answers are stored."""
        await self._write(("DELETE FROM jobs WHERE display_name = ?", (job.display_name,)))

    async def drain(self) -> None:
        """Wait until everything is on disk."""
        if self._flusher is not None:
            await self._flusher

    async def _write(self, *statements: Statement) -> int | None:
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._queue.append((statements, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await future

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch, self._queue = self._queue, []
            groups = [statements for statements, _ in batch]
            rows: list[int | None] = [None] * len(batch)
            failure: UserError | None = None
            try:
                rows = await loop.run_in_executor(self._executor, self._commit, groups)
            except UserError as error:
                failure = error
            for (_, future), row in zip(batch, rows, strict=True):
                if future.done():  # cancelled
                    continue
                if failure is not None:
                    future.set_exception(failure)
                else:
                    future.set_result(row)

    def _commit(self, groups: list[tuple[Statement, ...]]) -> list[int | None]:
        """Run all statements in one transaction; return the row id of each group's first one."""
        rows = []
        try:
            with self._connection:
                for first, *others in groups:
                    rows.append(self._connection.execute(*first).lastrowid)
                    for statement in others:
                        self._connection.execute(*statement)
        except sqlite3.Error as error:
            raise UserError(
                f"cannot write to {self.path}: {error}. What was stored before is safe."
            ) from error
        return rows


def _clean(value: object) -> object:
    """Replace lone surrogates, which a JSON answer may hold and sqlite refuses."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


@contextmanager
def open_copy(path: Path) -> Iterator[Store]:
    """Open a copy of a store, so that the original and its directory stay unchanged."""

    def state() -> list[tuple[Path, int, int]]:
        files = [file for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]
        return [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    with TemporaryDirectory(prefix="sft-probe-") as folder:
        for _ in range(_NUM_COPIES):  # again where a run wrote meanwhile
            before = state()
            try:
                for file, *_ in before:
                    shutil.copyfile(file, Path(folder) / file.name)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}.") from None
            if state() == before:
                break
        with Store(Path(folder) / path.name) as store:
            store.path = path  # for messages
            yield store


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be used as a store of answers ({error}). Restore it from a copy, or choose "
        "another directory."
    )


def _close(*connections: sqlite3.Connection) -> None:
    for connection in connections:
        connection.close()


def _open(path: Path) -> sqlite3.Connection:
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(
                f"BEGIN;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;"
            )
        elif version != _SCHEMA_VERSION:
            raise UserError(
                f"{path} was written by another version of sft-probe (layout {version}). Choose "
                "another file."
            )
    except (sqlite3.Error, UserError) as error:
        if connection is not None:
            connection.close()
        raise error if isinstance(error, UserError) else _damaged(path, error) from None
    return connection
