"""Two runs side by side: paired differences, benchmarks, and the settings that differ."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Run
from scipy import stats
from score_files import CURVES, write_run

import sft_probe as sft_probe_package
from sft_probe.analysis.stats.comparison import compare_recordings
from sft_probe.analysis.stats.runs import load_recordings
from sft_probe.text_table import interval, number


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs on the same docs; the first one moves `chosen` by 3 nats more at the end."""
    more = {**CURVES, "chosen": lambda step: CURVES["chosen"](step) + 3.0 * (step > 0)}
    runs = [
        write_run(tmp_path / "a", curves=more, seed=0),
        write_run(tmp_path / "b", seed=1),
    ]
    for run, rate, accuracy in zip(runs, (1e-3, 2e-3), (0.7, 0.5), strict=True):
        path = run / "manifest.json"
        manifest = json.loads(path.read_text()) | {"arguments": {"learning_rate": rate}}
        path.write_text(json.dumps(manifest))
        row = {"run": run.name, "step": 8, "task": "arc", "metric": "acc", "filter": "none"}
        pd.DataFrame([row | {"value": accuracy, "stderr": 0.03, "n": 100}]).to_csv(
            run / "benchmarks.csv", index=False
        )
    return runs


def changes_of(run: Path, category: str) -> "pd.Series[float]":
    """Return the change of each doc by the last step, straight from the lines of a run."""
    steps = []
    for step in (0, 8):
        rows = pd.read_json(run / f"probe/step_{step:06d}.jsonl", lines=True)
        steps.append(rows[rows["category"] == category].set_index("doc_id")["logprob"])
    return steps[1] - steps[0]


def test_differences_are_those_of_single_docs(pair: list[Path]) -> None:
    a, b = load_recordings(pair)
    found = compare_recordings(a, b)
    changes = found.table[found.table["quantity"] == "change"]
    assert (changes[changes["step"] == 0]["difference"] == 0).all()
    last = changes[changes["step"] == 8].set_index("category")
    for category in CURVES:
        row = last.loc[category]
        docs = changes_of(pair[0], category) - changes_of(pair[1], category)
        assert row["difference"] == pytest.approx(docs.mean(), abs=1e-9)
        assert row["difference"] == pytest.approx(row["a"] - row["b"], abs=1e-9)
        assert row["stderr"] == pytest.approx(stats.sem(docs), rel=1e-9)
        low, high = stats.t.interval(0.95, len(docs) - 1, docs.mean(), stats.sem(docs))
        assert row["low"] <= low + 1e-9, "at least as wide as the plain t-interval"
        assert row["high"] >= high - 1e-9
        assert row["band_low"] <= row["low"]
    assert last["low"]["chosen"] < 3.0 < last["high"]["chosen"]


def test_analyze_prints_and_writes_the_comparison(
    sft_probe: Run, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sft_probe("analyze", *pair)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "a less b: change of log p(response | prompt) from optimizer step 0 to 8" in text
    assert "24 held-out prompts in 24 clusters that both runs scored" in text
    assert "learning_rate 0.001 0.002" in text
    assert "order_seed 0 1" in text
    assert "arc acc 0.700 0.500 +0.200 [+0.117, +0.283]" in text
    settings = pd.read_csv("tables/comparison_settings.csv").set_index("setting")
    assert list(settings.loc["learning_rate"]) == [0.001, 0.002]
    written = pd.read_csv("tables/comparison.csv")
    assert set(written["quantity"]) == {"level", "change"}
    assert np.isclose(pd.read_csv("tables/comparison_benchmarks.csv")["difference"], 0.2).all()


def test_few_prompts_have_a_warning_above_the_table_and_no_band(
    sft_probe: Run, tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / name, num_docs=6, seed=k) for k, name in enumerate("ab")]
    text = sft_probe("analyze", *runs, "--out", tmp_path / "out").stdout
    block = text[text.index("a less b") :]
    assert block.index("under 10 effective clusters") < block.index("95 % interval  ")
    own = text[text.index("a: model") :]
    assert own.index("under 10 effective clusters") < own.index("first/body/EOS")
    assert pd.read_csv(tmp_path / "out/comparison.csv")["band_low"].isna().all()


def test_runs_without_a_common_prompt(sft_probe: Run, tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", omit=lambda row: row["doc_id"] == "d0")
    two = write_run(tmp_path / "b", omit=lambda row: row["doc_id"] != "d0")
    result = sft_probe("analyze", one, two, "--out", tmp_path / "out")
    assert "nothing can be paired" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("form", "start"),
    [("latex", r"\begin{tabular}{l"), ("md", "| category "), ("csv", "category,start,change,")],
)
def test_tables_for_a_paper(sft_probe: Run, tmp_path: Path, form: str, start: str) -> None:
    run = write_run(tmp_path / "run", curves={"non_response": lambda step: 1.0 * step})
    result = sft_probe("analyze", run, "--format", form)
    assert result.stdout.startswith(start), result.stderr
    assert (r"non\_response" if form == "latex" else "non_response") in result.stdout
    assert "intervals over prompts" not in result.stdout, "the tables alone"


def test_the_latex_table_has_few_columns_and_real_minus_signs(
    sft_probe: Run, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", curves={"non_response": lambda step: -1.0 * step})
    lines = sft_probe("analyze", run, "--format", "latex").stdout.splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrr}"
    assert r"\toprule" in lines[1]
    (row,) = [line for line in lines if line.strip().startswith(r"non\_response")]
    cells = [cell.strip(" \\") for cell in row.split("&")]
    change = r"(\$-\$|\+)[\d.]+ \[(\$-\$|\+)[\d.]+, (\$-\$|\+)[\d.]+\]"
    assert re.fullmatch(change, cells[2]), "per response"
    assert re.fullmatch(change, cells[3]), "per token"


def test_what_p_is_adjusted_for_is_said_once_under_the_table(
    sft_probe: Run, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    said = sft_probe("analyze", run).stdout
    assert said.count("p is adjusted for the 3 categories shown (Holm)") == 1
    assert "p is adjusted" not in sft_probe("analyze", run, "--categories", "chosen").stdout


def test_of_swept_and_live_scores_it_is_said_which_are_shown(
    sft_probe: Run, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    swept = sft_probe("analyze", run).stdout
    assert "the scores are those of" not in swept
    for live in sorted((run / "probe").glob("step_*.jsonl")):
        rows = run / "sweep" / live.stem / "heldout/rows.jsonl"
        rows.parent.mkdir(parents=True)
        rows.write_text(live.read_text().replace('"source": "live"', '"source": "lm_eval"'))
    said = sft_probe("analyze", run).stdout
    assert "the scores are those of the sweep; those of the live probe" in said


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert number(-0.01, "+.1f") == "+0.0"
    assert number(-0.01, ".1f") == "0.0"
    assert number(-0.06, "+.1f") == "-0.1"
    assert interval(-0.04, 0.04) == "[+0.0, +0.0]"


def test_no_signed_number_is_printed_without_this_rule() -> None:
    sources = (Path(sft_probe_package.__file__).parent / "analysis").rglob("*.py")
    lines = [line for path in sources for line in path.read_text("utf-8").splitlines()]
    assert len(lines) > 1000
    assert [line for line in lines if re.search(r"f?\".*[:{]\+\.\df", line)] == []
