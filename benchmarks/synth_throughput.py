"""Measures how fast `ask_all` asks a server that answers in a fixed time, and what it costs this
machine.

The server (tests/gemini_server.py) and the asking side are processes of their own. `sleep` is a
writer that only waits, so it shows the store and the limits alone; `gemini` and `openai` go through
the SDKs. Memory is the peak of the asking process, and its resident size after the imports.
Run: python benchmarks/synth_throughput.py
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_probe.synth.asking.budget import Limits, Price
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.asking.store import Store

SERVER = Path(__file__).resolve().parents[1] / "tests/gemini_server.py"
WORDS = (
    "the quick brown fox jumps over the lazy dog and then sits down to think about what it has "
    "done "
)


class SleepWriter:
    """Waits as long as the server would, and answers."""

    name, model, api_version = "sleep", "sleep", "v1"

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s

    async def write(self, _: Request) -> Answer:
        """An answer of 300 bytes."""
        await asyncio.sleep(self._latency_s)
        return Answer(
            status="ok",
            raw=WORDS * 6,
            text=WORDS * 3,
            model_version="1",
            num_prompt_tokens=200,
            num_output_tokens=60,
        )

    async def close(self) -> None:
        """Nothing is open."""


def requests(number: int) -> Iterator[Request]:
    """Prompts of about 800 bytes, as a paraphrase of an HH response takes."""
    for index in range(number):
        yield Request(
            doc_id=f"d{index}",
            category="paraphrase",
            template="paraphrase@1",
            template_sha256="0" * 64,
            prompt=f"Say this in other words, number {index}: {WORDS * 8}",
            source_text=WORDS * 8,
            num_words=60,
        )


def writer_of(name: str, url: str, latency_s: float) -> Any:
    """The writer to be measured."""
    if name == "sleep":
        return SleepWriter(latency_s)
    if name == "openai":
        from sft_probe.synth.writers.openai import OpenAIWriter

        return OpenAIWriter("test-model", base_url=f"{url}/openai/v1")
    from sft_probe.synth.writers.gemini import GeminiWriter

    return GeminiWriter("test-model", base_url=url)


def measure(args: Any) -> dict[str, Any]:
    """One run in this process."""
    writer = writer_of(args.side, args.url, args.latency_s)
    resident = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    limits = Limits(concurrency=args.concurrency, price=Price(0.3, 2.5), max_cost_usd=1e6)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "answers.sqlite")
        cpu_s, start_s = time.process_time(), time.perf_counter()
        number = sum(
            answer.status == "ok"
            for _, answer in ask_all(requests(args.number), writer, store, limits)
        )
        spent_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        start_s = time.perf_counter()
        again = sum(1 for _ in ask_all(requests(args.number), writer, store, limits))
        again_s = time.perf_counter() - start_s
        store.close()
    assert number == again == args.number, (number, again)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "writer": args.side,
        "calls": number,
        "calls/s": number / spent_s,
        "of the bound": f"{number / spent_s / (args.concurrency / args.latency_s):.0%}",
        "CPU ms/call": 1000 * cpu_s / number,
        "peak MB": peak / 1e6,
        "after imports MB": resident / 1e6,
        "read again, s": again_s,
    }


def main() -> None:
    """One table, or with `--side` one line of JSON."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--side", help="measure this writer in this process, print JSON")
    flags.add_argument("--writers", default="sleep,gemini,openai")
    flags.add_argument("--number", type=int, default=44_000)
    flags.add_argument("--concurrency", type=int, default=64)
    flags.add_argument("--latency_s", type=float, default=0.05)
    flags.add_argument("--url", default="", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return
    shape = [f"--{name}={getattr(args, name)}" for name in ("number", "concurrency", "latency_s")]
    environment = {**os.environ, "GEMINI_API_KEY": "none"}
    rows = []
    for side in args.writers.split(","):
        with subprocess.Popen(
            [sys.executable, SERVER, "--latency-s", str(args.latency_s)],
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            command = [sys.executable, __file__, *shape, "--side", side, "--url", url]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            ).stdout
            server.terminate()
        rows.append(json.loads(output.splitlines()[-1]))
    from common import table  # it imports torch, which would count as memory of the asking side

    table(rows)


if __name__ == "__main__":
    main()
