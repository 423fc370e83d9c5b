"""A finished run of version 0.1 gives the same numbers today.

`tests/data/old_run` holds manifests and score rows of three small runs (two that differ in their
data order alone, and one on `random`), made by version 0.1, and the tables that it made of them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Run, documented_columns

OLD = Path(__file__).parents[1] / "data/old_run"
RUNS = ("chosen-order0", "chosen-order1", "random-order0")
RENAMED = {
    "n": "num_docs",
    "ci_low": "logprob_low",
    "ci_high": "logprob_high",
    "delta": "change",
    "delta_ci_low": "low",
    "delta_ci_high": "high",
    "delta_body": "change_body",
}
"""Columns of version 0.1 to their names today."""


@pytest.fixture(scope="module")
def old_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run directories, with the score rows as the files of lines that training and sweep
    write."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    for name in RUNS:
        for path in folder.glob(f"{name}/**/manifest.json"):
            manifest = json.loads(path.read_text())
            path.write_text(json.dumps({**manifest, "probe_set": str(folder / "set.jsonl")}))
        rows = pd.read_parquet(folder / name / "scores.parquet")
        (folder / name / "scores.parquet").unlink()
        for (source, step, split), part in rows.groupby(["source", "step", "split"]):
            live = folder / name / f"probe/step_{step:06d}.jsonl"
            swept = folder / name / f"sweep/step_{step:06d}/{split}/rows.jsonl"
            path = live if source == "live" else swept
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(part.to_json(orient="records", lines=True, double_precision=15))
    return [folder / name for name in RUNS]


def check_table(path: Path, expected: str) -> None:
    """Compare a CSV of today with the table of version 0.1, column by column."""
    old = pd.read_parquet(OLD / "expected" / f"{expected}.parquet").rename(columns=RENAMED)
    new = pd.read_csv(path)
    assert len(new) == len(old)
    assert set(old) <= set(new), expected
    if not expected.startswith("figure_"):
        assert set(new) == documented_columns(expected), f"docs/data.md, {expected}"
    for name in old:
        if pd.api.types.is_numeric_dtype(old[name]):
            ours, theirs = (table[name].to_numpy(dtype=float) for table in (new, old))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6, err_msg=f"{name}")
        elif name != "sentence" and "figure" not in expected:  # words may change
            assert list(new[name].astype(str)) == list(old[name].astype(str)), name


def test_analyze(sft_probe: Run, old_runs: list[Path], tmp_path: Path) -> None:
    result = sft_probe("analyze", *old_runs, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("changes", "contrasts", "over_runs", "verdict"):
        check_table(tmp_path / f"{name}.csv", name)


def test_figures_and_trajectory(old_runs: list[Path], tmp_path: Path) -> None:
    """The numbers beside the figures, which are not drawn."""
    from sft_probe.analysis.figures.figure import Style
    from sft_probe.analysis.figures.plot import plot

    list(plot(old_runs[:1], style=Style(), formats=(), out=tmp_path))
    check_table(old_runs[0] / "trajectory.csv", "trajectory")
    for name in ("parts_heldout", "generations"):
        check_table(tmp_path / f"{name}.csv", f"figure_{name}")


def test_report(sft_probe: Run, old_runs: list[Path], tmp_path: Path) -> None:
    result = sft_probe("report", old_runs[0], "--out", tmp_path / "report.html")
    assert result.returncode == 0, result.stderr
    expected = pd.read_parquet(OLD / "expected/verdict.parquet")
    text = (tmp_path / "report.html").read_text()
    for change in expected[expected["run"] == "chosen-order0"]["change"]:
        assert f"{change:+.1f}" in text


def test_studies(sft_probe: Run, old_runs: list[Path], tmp_path: Path) -> None:
    assert sft_probe("simplicity", *old_runs, "--out", tmp_path).returncode == 0
    assert sft_probe("transfer", "--runs", *old_runs, "--out", tmp_path).returncode == 0
    for study in ("simplicity", "transfer_"):
        for path in (OLD / "expected").glob(f"{study}*.parquet"):
            check_table(tmp_path / f"{path.stem}.csv", path.stem)
