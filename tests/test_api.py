"""The Python interface: its tables are those of the commands; its page and notebook are true."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pytest
from helpers import documented_columns, run_here
from score_files import CURVES, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_probe
from sft_probe.errors import UserError
from sft_probe.scores import SCHEMA

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    texts = dict.fromkeys(CURVES, "Answer")
    return [write_run(folder / name, seed=seed, texts=texts) for seed, name in enumerate("ab")]


def test_names_are_listed_and_imported_at_first_use() -> None:
    assert set(sft_probe.__all__) <= set(dir(sft_probe))
    code = "import sys, sft_probe; dir(sft_probe); print({'torch', 'pandas'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sft_probe.nothing


def test_tables_are_those_of_analyze(two: list[Path]) -> None:
    assert run_here(["analyze", str(two[0])]).returncode == 0
    for paths in ([two[0]], [str(two[0])]):
        run = sft_probe.load(*paths)
        written = pd.read_csv(two[0] / "analysis/changes.csv")
        np.testing.assert_allclose(run.changes()["change"], written["change"], atol=1e-6)
        verdict = pd.read_csv(two[0] / "analysis/verdict.csv")
        assert list(run.verdict()["sentence"]) == list(verdict["sentence"])
        assert list(run.verdict(categories=["chosen"])["category"]) == ["chosen"]


def test_several_runs_are_one_table_and_each_stands_alone(two: list[Path]) -> None:
    runs = sft_probe.load(*two)
    assert [run.name for run in runs] == ["a", "b"]
    assert len(runs.scores) == sum(len(run.scores) for run in runs)
    assert set(runs[1].scores["run"]) == {"b"}
    assert set(runs[:1].texts.columns) == {"run", "doc_id", "category", "prompt", "response"}
    assert runs.texts["response"].str.startswith("Answer").all()
    assert runs.benchmarks.empty
    assert runs.generations.empty
    assert "a less b" in runs.summary()
    with pytest.raises(UserError, match="at least one run"):
        sft_probe.load()


@pytest.mark.parametrize("figure", ["changes", "trajectory", "parts"])
def test_figures_are_altair_charts(two: list[Path], figure: str) -> None:
    chart = sft_probe.load(two[0]).plot(figure)
    assert isinstance(chart, alt.TopLevelMixin)
    assert chart.to_dict(validate=False)["$schema"].startswith("https://vega.github.io")
    with pytest.raises(UserError, match="there is no figure"):
        sft_probe.load(two[0]).plot("pie")


def test_compare(two: list[Path]) -> None:
    found = sft_probe.compare(str(two[0]), two[1])
    changes = found.table[found.table["quantity"] == "change"]
    first, second = (run.verdict().set_index("category")["change"] for run in sft_probe.load(*two))
    last = changes[changes["step"] == 8].set_index("category")["difference"]
    np.testing.assert_allclose(last, (first - second).reindex(last.index), atol=1e-9)
    assert "a less b" in str(found)
    assert set(found.table) == documented_columns("comparison")
    assert set(found.settings) == documented_columns("comparison_settings")


def test_every_column_of_a_score_row_is_documented() -> None:
    assert set(SCHEMA.names) == documented_columns("scores")


def test_score_gives_what_a_sweep_gives(swept_run: Path) -> None:
    folder = swept_run / "weights/step_000004"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.train()
    ours = (
        pd.DataFrame(sft_probe.score(model, tokenizer))
        .set_index(["category", "doc_id"])
        .sort_index()
    )
    assert model.training, "left as it was"
    rows = pd.read_parquet(swept_run / "scores.parquet").query("step == 4 and source == 'lm_eval'")
    theirs = rows.set_index(["category", "doc_id"]).sort_index()
    assert len(ours) == len(theirs)
    for name in ("logprob", "logprob_first", "logprob_eos", "num_tokens"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3, err_msg=name)
    assert set(sft_probe.probe_set(Path("helpful-mini")).categories) == set(ours.index.unique(0))


def test_the_page_is_generated() -> None:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "benchmarks/api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/api.md").read_text("utf-8") == module.page(), (
        "run: python benchmarks/api_page.py --write"
    )


def test_the_notebook_runs(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", ",".join(map(str, two)))
    notebook = json.loads((ROOT / "examples/runs.ipynb").read_text("utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "kept without outputs"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102 - our own notebook
    assert names["comparison"] is not None


def test_the_earlier_name_of_probe_set_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="is now sft_probe.probe_set"):
        earlier = sft_probe.load_probe_set("helpful-mini")
    assert earlier.sha256 == sft_probe.probe_set().sha256
    assert "probe_set" in dir(sft_probe)
    module = importlib.import_module("sft_probe.probe_set")
    assert module.ProbeSet is type(earlier), "the module of this name is still one"
