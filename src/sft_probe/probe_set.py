"""The probe set contract: one JSON object per line, one text per category, `probe_set.json` beside
it.

A probe set is a directory (`probe_set.json` and `*.jsonl`), a single `.jsonl` file, the name of an
embedded set, or a data set on the Hugging Face hub. See docs/data.md for the schema.
"""

import csv
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sft_probe.errors import UserError, did_you_mean, doing
from sft_probe.files import find, read_object

CATEGORIES = ("chosen", "rejected", "paraphrase", "variant", "random", "non_response")
SPLITS = ("train", "heldout")
EMBEDDED_PROBE_SETS = ("helpful-mini",)
DEFAULT_PROBE_SET = "helpful-mini"
DEFAULT_PROMPT_FORMAT = "hh"
RESERVED_COLUMNS = ("doc_id", "conversation_id", "split", "messages", "random_doc_id", "meta")
_MANIFEST = {"name": str, "prompt_format": str, "categories": dict}
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", "messages")
_RESPONSE_COLUMNS = ("chosen", "response", "completion", "answer", "output", "messages")
LONE_SURROGATE = "half a surrogate pair, which is no Unicode text"
CATEGORY_NAME = re.compile(r"(?!train_)[a-z0-9_]+")


class Place(NamedTuple):
    """One line of a JSONL or CSV file, or one row of another source."""

    file: str
    line: int
    """Counted from 1."""

    def __str__(self) -> str:
        unit = "line" if self.file.endswith((".jsonl", ".jsonl.gz", ".csv")) else "row"
        return f"{self.file}, {unit} {self.line}"


@dataclass(frozen=True, kw_only=True)
class Doc:
    """One prompt and its responses."""

    doc_id: str
    conversation_id: str
    split: str
    """`train` or `heldout`; empty while a set is being made and the split is not drawn yet."""
    messages: tuple[dict[str, str], ...]
    """Chat turns `{"role", "content"}`; the last one is the user's."""
    responses: dict[str, str]
    """Category to text, stripped."""
    random_doc_id: str | None = None
    place: Place | None = None
    """Where the doc stands in the source that it was read from."""

    @property
    def sha256(self) -> str:
        """Short hash of the prompt and all responses: a doc with another hash has other texts."""
        texts = json.dumps([self.messages, self.responses], sort_keys=True)
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row or doc that is not used, and why."""

    place: Place | None = None
    doc_id: str | None = None
    reason: str
    """The same words for the same fault, so that faults can be counted."""
    detail: str = ""
    """What differs from row to row, such as the row that this one repeats."""

    def __str__(self) -> str:
        where = str(self.place) if self.place else ""
        if self.doc_id:
            where = f"{where} ({self.doc_id})" if where else self.doc_id
        reason = f"{self.reason} ({self.detail})" if self.detail else self.reason
        return f"{where}: {reason}" if where else reason


def common_reasons(left_out: Iterable[LeftOut]) -> str:
    """Return the three most common reasons, each with its number of rows and its first place."""
    counts: Counter[str] = Counter()
    first: dict[str, Place | None] = {}
    for item in left_out:
        counts[item.reason] += 1
        first.setdefault(item.reason, item.place)
    return "; ".join(
        f"{reason} ({count}, first in {first[reason]})" for reason, count in counts.most_common(3)
    )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with one line of a probe set."""

    path: str
    line: int
    doc_id: str | None
    message: str
    skippable: bool
    """True where leaving the doc out of every category repairs the set (an empty response, half a
    character)."""

    def __str__(self) -> str:
        name = f" ({self.doc_id})" if self.doc_id else ""
        return f"{self.path}, line {self.line}{name}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """A probe set as read from disk; `docs` are the usable ones, `faults` what was found."""

    name: str
    source: str
    docs: tuple[Doc, ...]
    categories: tuple[str, ...]
    prompt_format: str
    sha256: str
    faults: tuple[Fault, ...]
    manifest: dict[str, Any]

    def of_split(self, split: str) -> list[Doc]:
        """Return the docs of `train` or `heldout`, in file order."""
        return [doc for doc in self.docs if doc.split == split]

    @property
    def absolute_source(self) -> str:
        """What finds the set again from any directory: its absolute path, else its embedded name or
        hub id."""
        path = Path(self.source).expanduser()
        is_file = self.source not in EMBEDDED_PROBE_SETS and path.exists()
        return str(path.resolve()) if is_file else self.source


def load_probe_set(source: str) -> ProbeSet:
    """Read and validates a probe set.

    Docs with an empty response or half a surrogate pair are left out and stay listed in `faults`.

    Raises:
        UserError: the set does not exist, or has a fault that leaving out a doc cannot repair;
            names file and line.
    """
    probe_set = read_probe_set(source)
    fatal = [fault for fault in probe_set.faults if not fault.skippable]
    if fatal:
        more = (
            f"\n({len(fatal) - 5} more; `sft-probe probe-set {source}` lists them all)"
            if len(fatal) > 5
            else ""
        )
        raise UserError("the probe set cannot be used:\n" + "\n".join(map(str, fatal[:5])) + more)
    if not probe_set.docs:
        raise UserError(f"the probe set {source} has no usable doc.")
    return probe_set


def read_probe_set(source: str) -> ProbeSet:
    """Read a probe set and collects every fault instead of stopping at the first one.

    Raises:
        UserError: there is nothing to read at `source`, or its `probe_set.json` is unusable.
    """
    files = _files_of(source)
    manifest_path = files[0].parent / "probe_set.json"
    manifest = read_object(manifest_path, optional=_MANIFEST) if manifest_path.exists() else {}
    if place := find_lone_surrogate(manifest):
        raise UserError(f"{manifest_path}: `{place}` holds {LONE_SURROGATE}.")
    faults: list[Fault] = []
    rows = list(_parse_lines(files, faults))
    if not manifest:
        _check_kind(source, rows)
    categories = _categories(manifest, manifest_path, rows)
    docs = _check_docs(rows, categories, faults)
    faults += _check_links(rows)
    return ProbeSet(
        name=manifest.get("name", files[0].stem),
        source=source,
        docs=tuple(docs),
        categories=categories,
        prompt_format=manifest.get("prompt_format", DEFAULT_PROMPT_FORMAT),
        sha256=_sha256_of(files),
        faults=tuple(faults),
        manifest=manifest,
    )


def train_command(source: str, categories: Iterable[str]) -> str:
    """Return the command line that trains on a set, on `chosen` or else its first category."""
    names = list(categories)
    chosen = "" if "chosen" in names else f" --train_category {names[0]}"
    return f"train --probe_set {source}{chosen} --output_dir runs/{Path(source).name}"


def check_source(source: str) -> None:
    """Raise `UserError` where there is no probe set at `source`, as far as this disk tells: a hub
    id is not looked up."""
    is_hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not is_hub_id or Path(source).exists():
        _files_of(source)


def _check_kind(source: str, rows: list["_Row"]) -> None:
    """Raise `UserError` where rows are data of another kind, saying how to make a set of them."""
    columns = dict.fromkeys(name for row in rows[:100] for name in row.value)
    if not columns or any({"doc_id", "split"} & row.value.keys() for row in rows):
        return
    kind = "preference pairs, in" if {"chosen", "rejected"} <= columns.keys() else "a table of"
    raise UserError(
        f"{source} is not a probe set: no row has a `doc_id` or a `split`. It holds {kind} "
        f"{len(rows)} rows with the columns {_shown(columns)}. Make a probe set of it with\n"
        f"{_commands_for(source, columns)}"
    )


def _commands_for(source: str, columns: Collection[str]) -> str:
    """Return the commands that make a probe set of a table or of preference pairs."""
    out = Path("sets", Path(source).name.partition(".")[0] or "mine")
    prompt = next((name for name in _PROMPT_COLUMNS if name in columns), "")
    response = next((name for name in _RESPONSE_COLUMNS if name in columns), "COLUMN")
    pairs, commands = f"chosen={response}", []
    if {"chosen", "rejected"} <= set(columns):
        pairs = "chosen=chosen rejected=rejected"
        if not source.endswith(".csv"):
            commands = [
                f"sft-probe synth run --source {source} --categories random --out {out}",
                "    (chosen, rejected and random; needs no model and no key)",
                f"sft-probe synth run --source {source} --writer gemini --out {out}",
                "    (also paraphrase, variant and non_response)",
            ]
    if prompt or not commands:
        commands.append(
            f"sft-probe probe-set --from-table {source} --prompt {prompt or 'COLUMN'} "
            f"--category {pairs} --out {out}"
        )
    return "\n".join(f"  {command}" for command in commands)


def _check_is_no_table(path: Path, source: str) -> None:
    """Raise `UserError` for a CSV or parquet file, saying how to make a set of it."""
    if path.suffix not in (".csv", ".parquet") or not path.is_file():
        return
    columns: list[str] = []
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = next(csv.reader(file), [])
    shown = f" with the columns {_shown(columns)}" if columns else ""
    raise UserError(
        f"{source} is a table{shown}, not a probe set. Make one of it with\n"
        f"{_commands_for(source, columns)}"
    )


def _shown(columns: Iterable[str]) -> str:
    return ", ".join(map(_printable, list(columns)[:20]))


@dataclass(frozen=True)
class _Row:
    path: str
    line: int
    value: dict[str, Any]

    def fault(self, message: str, *, skippable: bool = False) -> Fault:
        doc_id = self.value.get("doc_id")
        return Fault(
            path=self.path,
            line=self.line,
            doc_id=_printable(doc_id) if isinstance(doc_id, str) else None,
            message=message,
            skippable=skippable,
        )


def _files_of(source: str) -> list[Path]:
    if source in EMBEDDED_PROBE_SETS:
        path = Path(str(resources.files("sft_probe.data").joinpath(source)))
    else:
        path = Path(source).expanduser()
    if not path.exists():
        path = _hub_snapshot(source)
    _check_is_no_table(path, source)
    files = find(path, "*.jsonl") if path.is_dir() else [path]
    if not files or not all(file.suffix == ".jsonl" for file in files):
        raise UserError(
            f"{source} is not a probe set, which is a directory with .jsonl files or one such "
            "file. To make a probe set of a table or of preference pairs, see `sft-probe probe-set "
            "--help` (--from-table) and `sft-probe synth run --help` (--source)."
        )
    return files


def _hub_snapshot(source: str) -> Path:
    hint = (
        f"there is no probe set {source!r}.{did_you_mean(source, EMBEDDED_PROBE_SETS)} It is no "
        f"file or directory here, not embedded ({', '.join(EMBEDDED_PROBE_SETS)})"
    )
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{hint}, and no data set id of the hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with doing(f"fetching {source} from the hub"):
            folder = snapshot_download(
                source, repo_type="dataset", allow_patterns=["*.jsonl", "probe_set.json"]
            )
        return Path(folder)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(f"{hint}, and the hub did not give it ({type(error).__name__}).") from error


def _sha256_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _parse_lines(files: list[Path], faults: list[Fault]) -> Iterator[_Row]:
    for path in files:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (
                ValueError,
                RecursionError,
            ) as error:  # the latter: brackets in thousands of brackets
                faults.append(_Row(str(path), number, {}).fault(f"not valid JSON ({error})"))
                continue
            if isinstance(value, dict):
                yield _Row(str(path), number, value)
            else:
                faults.append(_Row(str(path), number, {}).fault("not a JSON object"))


def _categories(manifest: dict[str, Any], manifest_path: Path, rows: list[_Row]) -> tuple[str, ...]:
    """Return the categories that `probe_set.json` names; without one, every text column of the
    first line."""
    if manifest:
        if not isinstance(manifest.get("categories"), dict) or not manifest["categories"]:
            raise UserError(
                f"{manifest_path}: `categories` must map each category, one at least, to its "
                "writer."
            )
        names = list(manifest["categories"])
    else:
        first = rows[0].value if rows else {}
        names = [
            name
            for name, text in first.items()
            if isinstance(text, str) and name not in RESERVED_COLUMNS
        ]
    for name in names:
        if not CATEGORY_NAME.fullmatch(name):
            raise UserError(
                f"{manifest_path if manifest else rows[0].path}: {name!r} cannot name a category: "
                "use lower-case letters, digits and `_`, and do not start with `train_`."
            )
    return tuple(names)


def _check_docs(
    rows: Iterable[_Row], categories: tuple[str, ...], faults: list[Fault]
) -> list[Doc]:
    docs = []
    for row in rows:
        found = list(_row_faults(row, categories))
        faults += found
        if found:
            continue
        value = row.value
        docs.append(
            Doc(
                doc_id=value["doc_id"],
                conversation_id=value["conversation_id"],
                split=value["split"],
                messages=tuple(value["messages"]),
                responses={name: value[name] for name in categories},
                random_doc_id=value.get("random_doc_id"),
                place=Place(row.path, row.line),
            )
        )
    return docs


def find_lone_surrogate(value: Any, name: str = "") -> str | None:
    """Return where a JSON value holds half of a surrogate pair, as in `messages[0].content`; `None`
    where it does not.

    JSON can write it (`"\\ud83d"`), but it is no Unicode text: no file and no tokenizer takes it,
    and what replaces it is another text.
    """
    if is_unicode(value):
        return None
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        named = [
            (f"{name}.{_printable(str(key))}".lstrip("."), key, part) for key, part in value.items()
        ]
        parts = [(place, item) for place, key, part in named for item in (key, part)]
    elif isinstance(value, list):
        parts = [(f"{name}[{number}]", part) for number, part in enumerate(value)]
    return next(
        (find_lone_surrogate(part, place) for place, part in parts if not is_unicode(part)), name
    )


def is_unicode(value: Any) -> bool:
    """Return whether a JSON value can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(text: str) -> str:
    """Return the text with `\\ud83d` for what is half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _row_faults(row: _Row, categories: tuple[str, ...]) -> Iterator[Fault]:
    value = row.value
    if place := find_lone_surrogate(value):
        yield row.fault(
            f"`{place}` holds {LONE_SURROGATE}: the doc is left out of all categories",
            skippable=True,
        )
        return
    for name in ("doc_id", "conversation_id"):
        if not isinstance(value.get(name), str) or not value[name]:
            yield row.fault(f"`{name}` must be a non-empty string")
    if value.get("split") not in SPLITS:
        yield row.fault(f"`split` must be one of {', '.join(SPLITS)}, not {value.get('split')!r}")
    if not _valid_messages(value.get("messages")):
        yield row.fault(
            '`messages` must be a list of {"role", "content"} that ends with a non-empty user turn'
        )
    for name in categories:
        text = value.get(name)
        if not isinstance(text, str):
            yield row.fault(f"the category `{name}` is missing")
        elif not text.strip():
            yield row.fault(
                f"the response `{name}` is empty: the doc is left out of all categories",
                skippable=True,
            )
        elif text != text.strip():
            yield row.fault(
                f"the response `{name}` has white space around it; responses are stored stripped"
            )


def _valid_messages(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            return False
        if not isinstance(turn.get("content"), str):
            return False
    return messages[-1]["role"] == "user" and bool(messages[-1]["content"].strip())


def _check_links(rows: list[_Row]) -> Iterator[Fault]:
    """Return faults between rows: repeated ids, conversations in both splits, a `random` that is
    not its partner's chosen."""
    by_id: dict[str, _Row] = {}
    split_of: dict[str, str] = {}
    for row in rows:
        doc_id, split = str(row.value.get("doc_id")), str(row.value.get("split"))
        if doc_id in by_id:
            yield row.fault(f"duplicate doc_id {doc_id!r}, first used in line {by_id[doc_id].line}")
        by_id.setdefault(doc_id, row)
        conversation = str(row.value.get("conversation_id"))
        if split_of.setdefault(conversation, split) != split:
            yield row.fault(f"the conversation {conversation!r} is in both splits")
    for row in rows:
        partner = by_id.get(str(row.value.get("random_doc_id")))
        if row.value.get("random_doc_id") is None or "random" not in row.value:
            continue
        if partner is None:
            yield row.fault(
                f"random_doc_id {row.value['random_doc_id']!r} names no doc of this set"
            )
        elif partner is row:
            yield row.fault("random_doc_id names the doc itself")
        elif row.value["random"] != partner.value.get("chosen"):
            yield row.fault(
                f"`random` is not the chosen response of {row.value['random_doc_id']!r}"
            )


class _CallableModule(ModuleType):
    """Lets `sft_probe.probe_set("my-set.jsonl")` read a set: the function of the Python interface
    has the name of this module, which Python puts in its place once it is imported."""

    def __call__(self, source: str | Path = DEFAULT_PROBE_SET) -> ProbeSet:
        """Read a probe set."""
        return load_probe_set(str(source))


sys.modules[__name__].__class__ = _CallableModule
