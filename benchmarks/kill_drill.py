"""Kills a run again and again (`kill -9`) and shows what was lost and what was paid twice.

3,000 requests, 32 in flight, 10 kills at moments drawn at random; some requests meet failures first (429, 503, a cut
connection). The server (tests/gemini_server.py) counts the calls that it answered, by prompt. Checked: the answers are
those of a run that was never killed, byte for byte; repaid calls <= in flight x kills; the cost that the store counts
is no less than what the server billed, and the budget is not passed.
Run: python benchmarks/kill_drill.py
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft_probe.files import write_jsonl
from sft_probe.synth.limits import BudgetSpentError, Limits
from sft_probe.synth.prices import Price
from sft_probe.synth.requests import Request
from sft_probe.synth.run import obtain
from sft_probe.synth.store import Store
from sft_probe.synth.writers.gemini import GeminiWriter

SERVER = Path(__file__).resolve().parents[1] / "tests/gemini_server.py"
PRICE = Price(0.30, 2.50)
FAULTS = {7: "429_retry_info", 11: "503", 97: "cut"}


def requests(number: int) -> Iterator[Request]:
    """Distinct prompts, one in nine or so with a failure on its first call."""
    for index in range(number):
        faults = [fault for divisor, fault in FAULTS.items() if index % divisor == divisor - 1]
        suffix = f" @faults({','.join(faults)})" if faults else ""
        yield Request(
            doc_id=f"d{index}", category="paraphrase", template="paraphrase@1", template_sha256="0" * 64,
            prompt=f"Say number {index} in other words.{suffix}", source_text="", num_words=30, max_output_tokens=50,
        )  # fmt: skip


def run(folder: Path, url: str, args: Any) -> None:
    """One run to the end: what `kill -9` interrupts. Its result stands for a probe set."""
    limits = Limits(concurrency=args.concurrency, max_cost_usd=args.budget_usd, price=PRICE, first_backoff_s=0.05)
    store = Store(folder / "answers.sqlite")
    try:
        rows = [
            {"doc_id": request.doc_id, "status": answer.status, "text": answer.text}
            for request, answer in obtain(requests(args.number), GeminiWriter("m", base_url=url), store, limits)
        ]
        write_jsonl(folder / "answers.jsonl", rows)
    except BudgetSpentError as error:
        print(error, file=sys.stderr)


def calls(url: str) -> dict[str, int]:
    """Calls by prompt that the server answered."""
    with urllib.request.urlopen(f"{url}/calls") as answer:  # noqa: S310 - the address of our own server
        counted: dict[str, int] = json.load(answer)["calls"]
    return counted


def drill(folder: Path, args: Any, kills: int) -> dict[str, Any]:
    """Runs to the end with so many kills on the way; the counts of the server and of the store."""
    folder.mkdir()
    command = [
        sys.executable, __file__, "--run", folder, *(f"--{name}={getattr(args, name)}" for name in
        ("number", "concurrency", "budget_usd")),
    ]  # fmt: skip
    draw = random.Random(args.seed)  # noqa: S311 - reproducible, not secret
    moments = [draw.uniform(0.3, 1.7) * args.number / (kills + 1) for _ in range(kills)]
    server_command = [sys.executable, SERVER, "--latency-s", str(args.latency_s)]
    with subprocess.Popen(server_command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for kill in range(kills):
                _run_until(command, url, moments[kill])
            subprocess.run([*command, f"--url={url}"], check=True, env=_environment())
            counted = calls(url)
        finally:
            server.terminate()
    store = Store(folder / "answers.sqlite")
    spent_usd, (lost, _) = store.cost_usd(), store.lost_calls()
    store.close()
    answers = folder / "answers.jsonl"
    return {
        "kills": kills,
        "calls answered": sum(counted.values()),
        "repaid": sum(counted.values()) - len(counted),
        "no answer known of": lost,
        "billed, $": sum(number * _bill_usd(prompt) for prompt, number in counted.items()),
        "counted as spent, $": spent_usd,
        "rows": len(answers.read_text("utf-8").splitlines()) if answers.exists() else 0,
    }


def _run_until(command: list[Any], url: str, num_calls: float) -> None:
    """Starts a run and kills it when the server has answered so many more calls."""
    until = sum(calls(url).values()) + num_calls
    with subprocess.Popen([*command, f"--url={url}"], env=_environment()) as process:
        while process.poll() is None and sum(calls(url).values()) < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {**os.environ, "GEMINI_API_KEY": "none"}


def _bill_usd(prompt: str) -> float:
    """What the server's own count of tokens costs."""
    return PRICE.cost_usd(len(prompt) // 4, 25)


def check(args: Any) -> list[dict[str, Any]]:
    """Both runs; raises `AssertionError` where a promise is broken."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        plain, killed = drill(folder / "plain", args, 0), drill(folder / "killed", args, args.kills)
        same = (folder / "plain/answers.jsonl").read_bytes() == (folder / "killed/answers.jsonl").read_bytes()
    killed["repaid by kills"] = killed["repaid"] - plain["repaid"]
    plain["repaid by kills"] = 0
    assert same, "the answers differ from those of a run that was not killed"
    assert plain["rows"] == killed["rows"] == args.number
    assert killed["repaid by kills"] <= args.concurrency * args.kills, killed
    assert killed["billed, $"] <= killed["counted as spent, $"] <= args.budget_usd, killed
    return [plain, killed]


def main() -> None:
    """One table; with `--run`, one run."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--number", type=int, default=3000)
    flags.add_argument("--concurrency", type=int, default=32)
    flags.add_argument("--kills", type=int, default=10)
    flags.add_argument("--latency_s", type=float, default=0.05)
    flags.add_argument("--budget_usd", type=float, default=1.0)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    flags.add_argument("--url", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.run:
        run(args.run, args.url, args)
        return
    from common import table  # it imports torch, which no run needs

    table(check(args))


if __name__ == "__main__":
    main()
