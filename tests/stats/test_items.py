"""Single items of benchmarks: a worked example by hand, a guesser, and what real samples hold."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Run
from score_files import write_run

from sft_probe.analysis.stats.items import item_table
from sft_probe.analysis.stats.runs import load_recording

START = (1, 1, 1, 1, 0, 0, 0, 0)
END = (1, 1, 0, 1, 0, 1, 0, 0)


def _samples(
    run: Path, step: int, correct: Sequence[int], options: int, *, nats: float = -2.0
) -> None:
    """Samples as lm-eval writes them; the right answer is ` right`, of 6 bytes."""
    folder = run / f"sweep/step_{step:06d}/benchmark_quiz"
    folder.mkdir(parents=True)
    texts = [" right", *(f" wrong {n}" for n in range(options - 1))]
    arguments = {f"gen_args_{n}": {"arg_0": "Q", "arg_1": text} for n, text in enumerate(texts)}
    lines = [
        {
            "doc_id": item,
            "target": "0" if item % 2 else "right",
            "arguments": arguments,
            "filtered_resps": [[str(nats if n == 0 else -9.0), "False"] for n in range(options)],
            "filter": "none",
            "metrics": ["acc", "bits_per_byte"],
            "acc": float(right),
            "bits_per_byte": [nats, 6],
        }
        for item, right in enumerate(correct)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"samples_my_quiz_2026-01-01T00-00-0{step}.jsonl").write_text(text)


def _last(run: Path) -> pd.DataFrame:
    table = item_table(load_recording(run))
    last: pd.DataFrame = table[table["step"] == table["step"].max()].set_index("measure")
    return last


def test_a_worked_example_by_hand(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    _samples(run, 0, START, 4, nats=-6.0)
    _samples(run, 4, END, 4, nats=-3.0)
    own = _last(run)
    assert set(own["task"]) == {"my_quiz"}
    assert (own["num_items"] == 8).all()
    assert (own["num_options"] == 4).all()
    # item 2 was lost, item 5 gained; 4, 6 and 7 are wrong at both steps
    change = own["change"]
    assert change["lost"] == 1 / 8
    assert change["gained"] == 1 / 8
    assert change["accuracy"] == 0
    assert own["level"]["accuracy"] == 4 / 8
    # each of the three is a guess that would have been lost 1 / (4 - 1) as often
    assert change["lost_adjusted"] == pytest.approx(1 / 8 - 3 / 8 / 3)
    assert change["gained_adjusted"] == pytest.approx(0)
    # 3 nats less on 6 bytes
    assert own["level"]["bits_per_byte"] == pytest.approx(3 / 6 / math.log(2))
    assert change["bits_per_byte"] == pytest.approx(-3 / 6 / math.log(2))
    shown = sft_probe("analyze", run).stdout
    line = next(line for line in shown.splitlines() if line.startswith("my_quiz"))
    assert sft_probe("report", run).returncode == 0
    assert "Items of benchmarks, step" in (run / "report.html").read_text()
    assert line.split()[:6] == ["my_quiz", "acc", "8", "4", "0.500", "+0.000"]
    assert (run / "analysis/items.csv").exists()


def test_a_model_that_guesses_has_forgotten_nothing_and_one_that_forgets_has(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    num_items, options = 4000, 4
    knows = np.arange(num_items) < 1000
    forgets = np.arange(num_items) < 400  # knew, and guesses now

    def answers(known: np.ndarray) -> list[int]:
        return [int(right) for right in known | (random.random(num_items) < 1 / options)]

    guesser, forgetful = (write_run(tmp_path / name) for name in ("guesser", "forgetful"))
    for run, after in ((guesser, knows), (forgetful, knows & ~forgets)):
        _samples(run, 0, answers(knows), options)
        _samples(run, 4, answers(after), options)
    own = _last(guesser)
    assert own["change"]["lost"] > 0.1, "by chance alone"
    assert own["low"]["lost_adjusted"] < 0 < own["high"]["lost_adjusted"]
    own = _last(forgetful)
    truth = 0.1 * (1 - 1 / options)
    assert own["low"]["lost_adjusted"] < truth < own["high"]["lost_adjusted"]
    assert own["change"]["gained_adjusted"] == pytest.approx(0, abs=0.02)


def test_forgetting_stands_beside_the_divergence_of_the_run(
    sft_probe: Run, referred_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(referred_run, run)
    for step, right in ((0, START), (1, START), (4, END)):
        _samples(run, step, right, 2)
    table = item_table(load_recording(run))
    kl = table.groupby("step")["kl"].first()
    assert kl[0] < 1e-6 < kl[1] < kl[4]
    result = sft_probe("plot", run, "--figures", "forgetting", "--format", "svg")
    assert result.returncode == 0, result.stderr
    drawn = pd.read_csv(run / "figures/forgetting.csv")
    assert set(drawn["step"]) == {0, 1, 4}
    assert set(drawn["line"]) == {"1 → 0", "0 → 1"}
