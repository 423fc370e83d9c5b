"""What the tests of the synthesis share: requests, and a writer that needs no network."""

import asyncio
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_probe.probe_set import load_probe_set
from sft_probe.synth.asking.budget import Limits, Price
from sft_probe.synth.asking.protocol import Answer, Request

FAST = Limits(concurrency=8, first_backoff_s=0.001)
CENT = Price(0.0, 100.0)  # 100 tokens of output cost a cent


_JUDGED = re.compile(r"<answer>\nAnswer (\w{16}) to")


def make_request(prompt: str, **fields: Any) -> Request:
    """A request for a paraphrase; the doc is named after its prompt."""
    values: dict[str, Any] = {
        "doc_id": prompt,
        "category": "paraphrase",
        "template": "paraphrase@1",
        "template_sha256": "0" * 64,
        "prompt": prompt,
        "source_text": "",
        "num_words": 30,
        "max_output_tokens": 100,
    }
    return Request(**(values | fields))


def prompts(number: int) -> list[Request]:
    return [make_request(f"p{i}") for i in range(number)]


def text_of(prompt: str) -> str:
    """What the model writes: the same for the same prompt. Of its own texts it turns down about a
    fifth."""
    if judged := _JUDGED.search(prompt):
        return "**No.**" if int(judged[1], 16) % 5 == 0 else "Yes, it is."
    return (
        f"Answer {hashlib.sha256(prompt.encode()).hexdigest()[:16]} to "
        f"{prompt.split('@', maxsplit=1)[0].strip()}"
    )


# the server answers with what stands before the @: with these prompts a text that passes the checks
ECHOED = "{{ ([topic] * ([num_words // 15, 1] | max)) | join(' ') }}."
TEMPLATES = {
    "paraphrase.txt": "{# version p #}\n" + ECHOED + "@ {{ rejected }}",
    "variant.txt": "{# version 7 #}\nNow " + ECHOED + "@ {{ conversation }}",
    "non_response.txt": "{# version n #}\nThen " + ECHOED + "@",
}


def write_templates(folder: Path) -> Path:
    folder.mkdir()
    for name, text in TEMPLATES.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def raw_rows(num_rows: int) -> list[dict[str, str]]:
    """HH transcripts with no more than chosen and rejected, made of the embedded set."""
    docs = load_probe_set("helpful-mini").docs[:num_rows]
    names = {"user": "Human", "assistant": "Assistant"}
    prompts = [
        "".join(f"\n\n{names[t['role']]}: {t['content']}" for t in doc.messages) for doc in docs
    ]
    return [
        {side: f"{prompt}\n\nAssistant: {doc.responses[side]}" for side in ("chosen", "rejected")}
        for prompt, doc in zip(prompts, docs, strict=True)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class FakeWriter:
    """A writer whose n-th call for a prompt does what `plan` says: raises, or changes the
    answer."""

    name, model, api_version = "fake", "fake-1", "v1"

    def __init__(
        self, plan: Callable[[str, int], Exception | dict[str, Any] | None] = lambda *_: None
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.most_in_flight = self._in_flight = 0
        self.times: list[float] = []
        self.num_closed = 0
        self._plan = plan

    async def write(self, request: Request) -> Answer:
        self.calls[request.prompt] += 1
        self.times.append(time.monotonic())
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await asyncio.sleep(hash(request.prompt) % 5 / 1000)
        self._in_flight -= 1
        planned = self._plan(request.prompt, self.calls[request.prompt])
        if isinstance(planned, Exception):
            raise planned
        fields = {
            "status": "ok",
            "raw": "{}",
            "text": text_of(request.prompt),
            "model_version": "1",
        }
        return Answer(
            **(fields | {"num_prompt_tokens": 10, "num_output_tokens": 100} | (planned or {}))
        )

    async def close(self) -> None:
        self.num_closed += 1
