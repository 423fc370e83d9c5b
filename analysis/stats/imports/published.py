"""Runs that others have published: which there are, and how one is downloaded and checked."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sft_probe.errors import UserError, unknown
from sft_probe.files import make_dir, new_file, sha256_file
from sft_probe.models import cache_dir
from sft_probe.text_table import text_table

_TIMEOUT_S = 60
_NOTE = (
    "Nothing of these is shipped with sft-probe. `sft-probe published get NAME` downloads, checks "
    "and imports one; `sft-probe published list --files NAME` lists its files with their SHA-256."
)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a published run."""

    url: str
    size: int
    """In bytes."""
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file alone."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One entry of the list."""

    name: str
    what: str
    licence: str
    page: str
    """Where it was published."""
    texts: str | None
    """Which of the files holds the texts of its docs."""
    files: tuple[RemoteFile, ...]
    """None of a run that is linked only."""

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files)


def published_runs() -> list[PublishedRun]:
    """Return the runs in the order of the list."""
    text = resources.files(__package__).joinpath("published.yaml").read_text("utf-8")
    return [_run(entry) for entry in yaml.safe_load(text)]


def _run(entry: dict[str, Any]) -> PublishedRun:
    files = [
        RemoteFile(url=entry["base"] + file["path"], size=file["size"], sha256=file["sha256"])
        for file in entry.pop("files", [])
    ]
    entry.pop("base", None)
    return PublishedRun(**{"texts": None, **entry}, files=tuple(files))


def published_run(name: str) -> PublishedRun:
    """Return the run of a name. Raises `UserError` where there is none, or it is linked only."""
    runs = {run.name: run for run in published_runs()}
    if name not in runs:
        raise unknown("published run", name, runs, use="`sft-probe published` lists them.")
    run = runs[name]
    if not run.files:
        raise UserError(
            f"{name} is linked only (licence: {run.licence}): see {run.page}, and `sft-probe "
            "import` for what you download there."
        )
    return run


def download(run: PublishedRun) -> Path:
    """Download the files of a run into the cache, and return their directory; what is there and
    right is kept.

    Raises:
        UserError: a file cannot be had, or is not the one that was listed.
    """
    folder = make_dir(cache_dir() / "published" / run.name)
    for file in run.files:
        path = folder / file.name
        if not path.is_file() or sha256_file(path) != file.sha256:
            _download(file, path)
    return folder


def _download(file: RemoteFile, path: Path) -> None:
    """Write one file, of which no more than its listed size is read."""
    try:
        with urllib.request.build_opener().open(file.url, timeout=_TIMEOUT_S) as answer:
            content = answer.read(file.size + 1)
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{file.url} cannot be downloaded ({error}).") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        size = f"over {file.size}" if len(content) > file.size else str(len(content))
        raise UserError(
            f"{file.url} is not the file that was listed: {size} bytes, SHA-256 {found[:16]}..., "
            f"not {file.size} bytes, {file.sha256[:16]}.... Nothing was written."
        )
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def list_text(runs: Sequence[PublishedRun]) -> str:
    """Return the list as a table, with what each run is below it."""
    rows = [
        [run.name, run.licence, f"{run.size / 1e3:,.0f} kB" if run.files else "linked only"]
        for run in runs
    ]
    table = text_table(["name", "licence", "download"], rows, left=2)
    return "\n".join([table, "", *(_about(run) for run in runs), "", _NOTE])


def files_text(run: PublishedRun) -> str:
    """Return what is known of one run, with a line for each of its files."""
    files = [f"  {file.sha256}  {file.size:>9}  {file.url}" for file in run.files]
    return "\n".join([_about(run), f"  licence: {run.licence}", *files])


def _about(run: PublishedRun) -> str:
    return f"{run.name}: {run.what}\n  {run.page}"
