"""Kills a run again and again (`kill -9`) and shows what was lost and what was paid twice.

3,000 requests, 32 in flight, 10 kills at moments drawn at random; some requests meet failures first
(429, 503, a cut connection). The server (tests/gemini_server.py) counts the calls that it answered,
by prompt. Checked: the answers are those of a run that was never killed, byte for byte; repaid
calls <= in flight x kills. A third series of runs has half the money: what the server billed <=
what the store counts as spent <= the budget, in all three. Run: python benchmarks/kill_drill.py
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
from sft_probe.synth.asking.budget import BudgetSpentError, Limits, Price
from sft_probe.synth.asking.live import ask_all
from sft_probe.synth.asking.protocol import Request
from sft_probe.synth.asking.store import Store
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
            doc_id=f"d{index}",
            category="paraphrase",
            template="paraphrase@1",
            template_sha256="0" * 64,
            prompt=f"Say number {index} in other words.{suffix}",
            source_text="",
            num_words=30,
            max_output_tokens=50,
        )


def run(folder: Path, url: str, args: Any) -> None:
    """One run to the end: what `kill -9` interrupts. Its result stands for a probe set."""
    limits = Limits(
        concurrency=args.concurrency,
        max_cost_usd=args.budget_usd,
        price=PRICE,
        first_backoff_s=0.05,
    )
    with Store(folder / "answers.sqlite") as store:
        try:
            rows = [
                {"doc_id": request.doc_id, "status": answer.status, "text": answer.text}
                for request, answer in ask_all(
                    requests(args.number), GeminiWriter("m", base_url=url), store, limits
                )
            ]
            write_jsonl(folder / "answers.jsonl", rows)
        except BudgetSpentError as error:
            print(error, file=sys.stderr)


def calls(url: str) -> dict[str, int]:
    """Calls by prompt that the server answered."""
    with urllib.request.urlopen(f"{url}/calls") as answer:  # noqa: S310 - the address of our own server
        counted: dict[str, int] = json.load(answer)["calls"]
    return counted


def drill(folder: Path, args: Any, *, kills: int, budget_usd: float) -> dict[str, Any]:
    """Runs to the end with so many kills on the way; the counts of the server and of the store."""
    folder.mkdir()
    shape = [
        f"--number={args.number}",
        f"--concurrency={args.concurrency}",
        f"--budget_usd={budget_usd}",
    ]
    command = [sys.executable, __file__, "--run", folder, *shape]
    draw = random.Random(args.seed)  # noqa: S311 - reproducible, not secret
    end = args.number * min(1.0, budget_usd / args.budget_usd)
    moments = sorted(draw.uniform(0.02, 0.9) * end for _ in range(kills))
    server_command = [sys.executable, SERVER, "--latency-s", str(args.latency_s)]
    with subprocess.Popen(server_command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            command.append(f"--url={server.stdout.readline().strip()}")
            kills = sum(_kill_at(command, num_calls) for num_calls in moments)
            subprocess.run(command, check=True, env=_environment())
            counted = calls(command[-1].removeprefix("--url="))
        finally:
            server.terminate()
    return {"kills": kills, "budget, $": budget_usd} | _counts(folder, counted)


def _kill_at(command: list[Any], num_calls: float) -> bool:
    """Start a run and kill it when the server has answered so many calls in all; False where it
    ends before."""
    url = command[-1].removeprefix("--url=")
    with subprocess.Popen(command, env=_environment()) as process:
        while process.poll() is None and sum(calls(url).values()) < num_calls:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def _counts(folder: Path, counted: dict[str, int]) -> dict[str, Any]:
    with Store(folder / "answers.sqlite") as store:
        spent_usd, (lost, _) = store.cost_usd(), store.lost_calls()
        rows = sum(count.num_answers for count in store.counts())
    return {
        "rows": rows,
        "calls answered": sum(counted.values()),
        "repaid": sum(counted.values()) - len(counted),
        "calls without an answer": lost,
        "billed, $": sum(number * _bill_usd(prompt) for prompt, number in counted.items()),
        "counted as spent, $": spent_usd,
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "GEMINI_API_KEY": "none"}


def _bill_usd(prompt: str) -> float:
    """What the server's own count of tokens costs."""
    return PRICE.cost_usd(len(prompt) // 4, 25)


def check(args: Any) -> list[dict[str, Any]]:
    """The three series; raises `AssertionError` where a promise is broken."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        plain = drill(folder / "plain", args, kills=0, budget_usd=args.budget_usd)
        args.budget_usd = plain["counted as spent, $"] * 1.5  # room for what is paid twice
        killed = drill(folder / "killed", args, kills=args.kills, budget_usd=args.budget_usd)
        poor = drill(folder / "poor", args, kills=args.kills, budget_usd=args.budget_usd / 3)
        answers = [(folder / part / "answers.jsonl").read_bytes() for part in ("plain", "killed")]
    assert killed["kills"] == args.kills, "a run ended before it could be killed"
    assert answers[0] == answers[1], "the answers differ from those of a run that was not killed"
    assert answers[0].count(b'"status": "ok"') == plain["rows"] == killed["rows"] == args.number
    for series in (plain, killed, poor):
        series["repaid by kills"] = max(0, series["repaid"] - plain["repaid"])
        assert series["repaid by kills"] <= args.concurrency * series["kills"], series
        assert series["billed, $"] <= series["counted as spent, $"] <= series["budget, $"], series
    assert poor["rows"] < args.number, poor
    return [plain, killed, poor]


def main() -> None:
    """One table; with `--run`, one run."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    series = check(args)
    print("| | never killed | killed | killed, half the money |\n| --- | --- | --- | --- |")
    for name in series[0]:
        print(f"| {name} |", " | ".join(f"{one[name]:.6g}" for one in series), "|")


if __name__ == "__main__":
    main()
