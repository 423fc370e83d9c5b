"""Whose a run directory is: what was asked for is noted at the start, and another request is
refused."""

import hashlib
import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sft_probe.errors import UserError
from sft_probe.files import read_object, write_json
from sft_probe.train.resume import latest_state, remove_after, remove_states

_MAY_DIFFER = ("max_wall_time_s", "dry_run", "local_rank")
"""Flags that another attempt at the same run may give differently; the last is what `deepspeed`
tells each rank."""


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of a run directory; the system lets go of it also after `kill -9`.

    Raises:
        UserError: another process has it.
    """
    try:
        lock = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(
            f"another process is training in {run_dir}. Wait for it, or choose another "
            "--output_dir."
        ) from error
    with lock:
        yield


def request_of(flags: dict[str, str], world_size: int, **contents: str | None) -> dict[str, Any]:
    """What makes two attempts the same run: flags as asked, number of processes, content of what
    they name."""
    return {
        "flags": {name: value for name, value in flags.items() if name not in _MAY_DIFFER},
        "world_size": world_size,
        **contents,
    }


def sha256_text(path: str | None) -> str | None:
    """Of a small file; `None` for none."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_complete(run_dir: Path, request: dict[str, Any]) -> bool:
    """True for a finished run of the same request.

    Raises:
        UserError: the directory holds a run of another request (the difference is named), or
        weights of nobody's.
    """
    for name in ("manifest.json", "started.json"):
        if not (run_dir / name).exists():
            continue
        is_manifest = name == "manifest.json"
        earlier = read_object(run_dir / name, {"request": dict} if is_manifest else {})
        earlier = earlier["request"] if is_manifest else earlier
        if earlier != request:
            raise UserError(
                f"{run_dir} holds another run ({_difference(earlier, request)}). Choose another "
                "--output_dir."
            )
        if name == "manifest.json":
            return True
    if (run_dir / "started.json").exists():
        return False
    if (run_dir / "weights").exists() or list(run_dir.glob("checkpoint-*")):
        raise UserError(f"{run_dir} holds weights of another origin. Choose another --output_dir.")
    return False


def recorded_format(run_dir: Path) -> str | None:
    """The prompt format of an earlier attempt in this directory, finished or not; `None` where
    there was none."""
    for name in ("manifest.json", "started.json"):
        if (run_dir / name).exists():
            earlier = read_object(run_dir / name)
            found: str | None = (
                earlier.get("request", {}) if name == "manifest.json" else earlier
            ).get("prompt_format")
            return found
    return None


def claim(run_dir: Path, request: dict[str, Any]) -> str | None:
    """Notes the request once all of it is known to be sound, and clears what a cut-off attempt will
    write again.

    Returns how an earlier attempt is taken up, `None` where there was none.
    """
    if not (run_dir / "started.json").exists():
        write_json(run_dir / "started.json", request)
        return None
    state = latest_state(run_dir)
    remove_after(run_dir, state)
    return f"an earlier attempt in {run_dir} was cut off; training " + (
        "starts again" if state is None else f"goes on from {state.name}"
    )


def unclaim(run_dir: Path) -> None:
    """Forget a request for which nothing was made, so that the directory is free for other
    flags."""
    if latest_state(run_dir) is None and not (run_dir / "weights").exists():
        (run_dir / "started.json").unlink(missing_ok=True)


def clear(run_dir: Path) -> None:
    """Takes out of a complete run what only an attempt that goes on would need."""
    (run_dir / "started.json").unlink(missing_ok=True)
    remove_states(run_dir)


def _difference(earlier: dict[str, Any], request: dict[str, Any]) -> str:
    old, new = earlier.get("flags", {}), request["flags"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    differences = [
        f"--{name}: {old.get(name, 'unset')} there, {new.get(name, 'unset')} now" for name in names
    ]
    if earlier.get("world_size") != request["world_size"]:
        differences.append(
            f"{earlier.get('world_size', '?')} processes there, {request['world_size']} now"
        )
    for name in request.keys() - {"flags", "world_size"}:
        if earlier.get(name) != request[name]:
            differences.append(f"the {name.removesuffix('_sha256').replace('_', ' ')} has changed")
    return ", ".join(differences)


def versions() -> dict[str, str | None]:
    """Of the packages that decide what a run computes; `None` for what is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names = ("sft-probe", "torch", "transformers", "accelerate", "deepspeed", "peft", "lm_eval")
    return {name: version(name) for name in names}


def git_revision() -> str | None:
    """Of the directory that the command was given in."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
