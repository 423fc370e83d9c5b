"""A writer without a model, for trying things out: pieces of the embedded set, drawn by a hash."""

import hashlib
import json
import random
import re

from sft_probe.probe_set import load_probe_set
from sft_probe.synth.asking.protocol import Answer, Request

_MATERIAL = ("paraphrase", "variant", "non_response")
_SENTENCE = re.compile(r"\S.*?[.!?](?=\s|$)")
_PIECE_WORDS = 4
_SENTENCE_WORDS = 12
_MIN_WORDS = 6
"""Shortest text, since shorter ones would repeat. The checks allow so many words for any length."""


class OfflineWriter:
    """Writes texts of the requested length that do not mean what their category says."""

    name = "offline"
    model = "helpful-mini"
    api_version = "2"

    def __init__(self) -> None:
        texts = [
            doc.responses[category]
            for doc in load_probe_set(self.model).docs
            for category in _MATERIAL
        ]
        sentences = [sentence.split() for text in texts for sentence in _SENTENCE.findall(text)]
        pieces = (
            words[i : i + _PIECE_WORDS]
            for words in sentences
            for i in range(0, len(words), _PIECE_WORDS)
        )
        plain = (re.findall(r"[A-Za-z]+", " ".join(piece)) for piece in pieces)
        self._pieces = list(
            dict.fromkeys(tuple(words) for words in plain if len(words) == _PIECE_WORDS)
        )

    async def write(self, request: Request) -> Answer:
        """Return pieces with the requested number of words, drawn by prompt and sample index."""
        seed = hashlib.sha256(
            f"{request.category}\n{request.sample_index}\n{request.prompt}".encode()
        ).hexdigest()
        draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        num_words = max(request.num_words, _MIN_WORDS)
        words: list[str] = []
        while len(words) < num_words:
            words += draw.choice(self._pieces)
        text = _as_sentences(words[:num_words])
        return Answer(
            status="ok", raw=json.dumps({"text": text}), text=text, model_version=self.model
        )

    async def close(self) -> None:
        """Do nothing."""


def _as_sentences(words: list[str]) -> str:
    """Return words as sentences of twelve words, each with a capital letter and a full stop."""
    starts = range(0, len(words), _SENTENCE_WORDS)
    return " ".join(
        " ".join(words[i : i + _SENTENCE_WORDS]).lower().capitalize() + "." for i in starts
    )
