"""CPU time and memory of `sft-probe synth` on many rows where nothing is asked.

Run as:  python benchmarks/synth_rows.py --rows 50000
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def write_rows(path: Path, num_rows: int) -> None:
    """Writes HH transcripts of one to three questions, of the lengths of HH, in words of no
    meaning."""
    generator = random.Random(0)  # noqa: S311 - reproducible, not secret
    words = [
        "".join(generator.choice("bdfgklmnprst") + generator.choice("aeiou") for _ in range(2))
        for _ in range(3000)
    ]

    def say(length: int) -> str:
        return " ".join(generator.choices(words, k=length)).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            turns = "".join(
                f"\n\nHuman: {say(15)}\n\nAssistant: {say(50)}"
                for _ in range(generator.randrange(3))
            )
            prompt = f"{turns}\n\nHuman: {say(15)}\n\nAssistant: "
            row = {
                side: prompt + say(generator.randrange(20, 90)) for side in ("chosen", "rejected")
            }
            file.write(json.dumps(row) + "\n")


def measure(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        after.ru_maxrss / 1024,
    )


def main() -> None:
    """Prints one line for each command. The peak is that of the largest command so far."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        write_rows(source, options.rows)
        print(f"{options.rows} rows, {source.stat().st_size / 2**20:.0f} MB")
        base = [
            sys.executable,
            "-m",
            "sft_probe",
            "synth",
            "--source",
            str(source),
            "--writer",
            "offline",
        ]
        for name, kinds in (
            ("nothing written", "random"),
            ("one category, asked", "paraphrase"),
            ("one category, all stored", "paraphrase"),
        ):
            cpu_s, peak_mb = measure([*base, "--categories", kinds, "--out", f"{folder}/{kinds}"])
            print(f"{name}: {cpu_s:.0f} s of CPU, peak so far {peak_mb:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
