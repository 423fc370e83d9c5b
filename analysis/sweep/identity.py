"""Which weights a score belongs to: every part of a sweep holds `checkpoint.json`, written with its
rows.

Weights are known by the SHA-256 of their files, or by the commit of a hub revision. A file whose
size and times are as they were recorded is not read again.
"""

import functools
import logging
import re
from pathlib import Path
from typing import Any

from sft_probe.analysis.sweep.checkpoints import OWN_SNAPSHOTS, Checkpoint
from sft_probe.errors import UserError
from sft_probe.files import find, read_object, sha256_file
from sft_probe.models import local_folder, resolve_model
from sft_probe.weights import ADAPTER_CONFIG, base_of, weight_files

log = logging.getLogger(__name__)

RECORD = "checkpoint.json"
Identity = dict[str, Any]
"""`name revision place commit files base`: see `identify`."""
_KINDS = {"place": str, "commit": str | None, "files": dict, "base": dict | None}


def recorded(part: Path, name: str = RECORD) -> Identity | None:
    """Return what a part of a sweep was scored with; `None` where it does not say, as of an earlier
    version."""
    return read_object(part / name, _KINDS) if (part / name).exists() else None


def recorded_of_step(folder: Path) -> Identity | None:
    """Return what a step was scored with, from the first of its parts that says so."""
    return next(filter(None, map(recorded, parts_of(folder))), None)


def parts_of(folder: Path) -> list[Path]:
    """Return the complete parts of a step."""
    return [path for path in find(folder, "*") if path.is_dir()]


def identify(checkpoint: Checkpoint, known: Identity | None = None) -> Identity:
    """Return what tells the weights of a checkpoint, and of the base of an adapter, from all
    others.

    Args:
        checkpoint: of which nothing is downloaded that `known` makes unnecessary.
        known: recorded earlier for this step; hashes of files that have not been touched since are
            taken from it.

    Raises:
        UserError: files are missing.
    """
    identity = _identify(checkpoint.model, checkpoint.revision, known)
    if checkpoint.source == OWN_SNAPSHOTS:  # a run that is moved as a whole keeps its places
        identity["place"] = f"{OWN_SNAPSHOTS}/{Path(checkpoint.model).name}"
    return identity


def _identify(name: str, revision: str, known: Identity | None) -> Identity:
    identity: Identity = {
        "name": name,
        "revision": revision,
        "commit": None,
        "files": {},
        "base": None,
    }
    if not Path(resolve_model(name)).is_dir():
        return {**identity, "place": f"{name}@{revision}", **_of_revision(name, revision, known)}
    folder = Path(resolve_model(name))
    if (folder / ADAPTER_CONFIG).exists():
        paths = [folder / ADAPTER_CONFIG, *find(folder, "adapter_model*.safetensors")]
        identity["base"] = _identify(*base_of(folder, revision), (known or {}).get("base"))
    else:
        paths = [folder / "config.json", *weight_files(folder)]
    files = (known or {}).get("files") or {}
    identity["files"] = {path.name: _describe(path, files.get(path.name)) for path in paths}
    return {**identity, "place": str(folder.absolute())}


def _of_revision(name: str, revision: str, known: Identity | None) -> Identity:
    """Return commit and base of a hub revision, which is downloaded only where it is not known
    yet."""
    if known is None:
        folder = local_folder(name, revision)
        is_adapter = (folder / ADAPTER_CONFIG).exists()
        base = _identify(*base_of(folder, revision), None) if is_adapter else None
        return {"commit": folder.name, "base": base}
    base = known["base"]
    return {
        "commit": _commit_of(name, revision) or known["commit"],
        "base": base and _identify(base["name"], base["revision"], base),
    }


def _describe(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Return hash, size and times of a file; the hash is the known one where the rest is as it
    was."""
    try:
        found = path.stat()
        touched = {
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns,
        }
        if known and known == {**touched, "sha256": known.get("sha256")}:
            return known
        return {**touched, "sha256": sha256_file(path)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error


def differences(identity: Identity, other: Identity) -> list[str]:
    """Return what differs in the weights; nothing where they are the same, or where nothing can be
    compared."""
    if identity["commit"] and other["commit"]:
        return (
            [] if identity["commit"] == other["commit"] else [f"commit {identity['commit'][:12]}"]
        )
    if identity["commit"] or other["commit"]:
        return (
            []
            if identity["place"] == other["place"]
            else [f"{identity['place']} is not {other['place']}"]
        )
    names = sorted(identity["files"].keys() | other["files"].keys())
    found = [name for name in names if _sha256(identity, name) != _sha256(other, name)]
    bases = identity["base"], other["base"]
    if bases[0] and bases[1]:
        found += [f"{name} of the base model" for name in differences(bases[0], bases[1])]
    return found


def check_undamaged(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise `UserError` where a file of the weights is missing or is not the one that was saved."""
    for name, expected in (checkpoint.sha256 or {}).items():
        path = Path(checkpoint.model, name)
        if name not in identity["files"]:
            raise UserError(f"{path} is missing.")
        if _sha256(identity, name) != expected:
            raise UserError(f"{path} is damaged: its sha256 is not the one in meta.json.")


def check_unchanged(checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise `UserError` where files have changed since the identity was taken."""
    if identity["commit"] is None and (
        found := differences(identify(checkpoint, identity), identity)
    ):
        raise UserError(
            f"{checkpoint.name} changed while it was read ({', '.join(found[:3])}). Rerun when it "
            "is whole."
        )


def _sha256(identity: Identity, name: str) -> str | None:
    described: dict[str, Any] = identity["files"].get(name, {})
    return described.get("sha256")


@functools.lru_cache(maxsize=8)
def _commits_of(name: str) -> dict[str, str]:
    """Return the commits of all branches and tags of a hub model; nothing where the hub does not
    answer."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name)
    except Exception as error:  # of whichever HTTP client the hub's library uses
        log.info(
            "the commits of %s are not known now (%s): what was recorded counts",
            name,
            type(error).__name__,
        )
        return {}
    return {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}


def _commit_of(name: str, revision: str) -> str | None:
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    if commit := _commits_of(name).get(revision):
        return commit
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None
