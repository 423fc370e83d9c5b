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
        docs = load_probe_set(self.model).docs
        texts = [doc.responses[category] for doc in docs for category in _MATERIAL]
        sentences = [sentence.split() for text in texts for sentence in _SENTENCE.findall(text)]
        pieces = (
            " ".join(words[i : i + _PIECE_WORDS])
            for words in sentences
            for i in range(0, len(words), _PIECE_WORDS)
        )
        plain = (tuple(re.findall(r"[A-Za-z]+", piece)) for piece in pieces)
        self._pieces = [*dict.fromkeys(words for words in plain if len(words) == _PIECE_WORDS)]

    async def write(self, request: Request) -> Answer:
        """Return pieces with the requested number of words, drawn by prompt and sample index."""
        key = f"{request.category}\n{request.sample_index}\n{request.prompt}"
        seed = hashlib.sha256(key.encode()).hexdigest()
        draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        num_words = max(request.num_words, _MIN_WORDS)
        words: list[str] = []
        while len(words) < num_words:
            words += draw.choice(self._pieces)
        starts = range(0, num_words, _SENTENCE_WORDS)
        sentences = (" ".join(words[i : min(i + _SENTENCE_WORDS, num_words)]) for i in starts)
        text = " ".join(sentence.lower().capitalize() + "." for sentence in sentences)
        raw = json.dumps({"text": text})
        return Answer(status="ok", raw=raw, text=text, model_version=self.model)

    async def close(self) -> None:
        """Do nothing."""
