"""A writer without a model: sentences of the embedded set, drawn by a hash. For trying out the whole path."""

import hashlib
import json
import random
import re

from sft_probe.records import load_probe_set
from sft_probe.synth.requests import Answer, Request

_MATERIAL = ("paraphrase", "variant", "non_response")
_SENTENCE = re.compile(r"\S.*?[.!?](?=\s|$)")


class OfflineWriter:
    """Writes nothing of its own: its texts have the length asked for and do not mean what the category asks."""

    name = "offline"
    model = "helpful-mini"
    api_version = "1"

    def __init__(self) -> None:
        docs = load_probe_set(self.model).docs
        texts = [doc.responses[category] for doc in docs for category in _MATERIAL]
        self._sentences = list(dict.fromkeys(sentence for text in texts for sentence in _SENTENCE.findall(text)))

    async def write(self, request: Request) -> Answer:
        """Sentences in an order drawn from the prompt and the sample index, up to the number of words asked for."""
        seed = hashlib.sha256(f"{request.category}\n{request.sample_index}\n{request.prompt}".encode()).hexdigest()
        sentences = list(self._sentences)
        random.Random(seed).shuffle(sentences)  # noqa: S311 - reproducible, not secret
        text = _fill(sentences, request.num_words)
        return Answer(status="ok", raw=json.dumps({"text": text}), text=text, model_version=self.model)

    async def close(self) -> None:
        """Nothing to free."""


def _fill(sentences: list[str], num_words: int) -> str:
    """The first sentences that fit, until a tenth or less is missing; for few words the shortest sentence."""
    taken: list[str] = []
    left = num_words
    for sentence in sentences:
        length = len(sentence.split())
        if length <= left * 1.1:
            taken.append(sentence)
            left -= length
        if left <= 0.1 * num_words:
            break
    return " ".join(taken or [min(sentences, key=lambda sentence: len(sentence.split()))])
