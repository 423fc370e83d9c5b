"""Two stages of training on one axis: steps, changes, and stages that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error

PUBLISHED = SHARED / "reference/learning-dynamics"


@pytest.fixture
def second_stage(swept_run: Path, tmp_path: Path) -> Path:
    """A run that names the last step of the swept one as its parent, with the same scores."""
    run = tmp_path / "second"
    shutil.copytree(swept_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["parent"] = {"run_dir": str(swept_run), "step": 4, "sha256": {}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def changes(sft_probe: Run, folder: Path, *arguments: object) -> pd.DataFrame:
    result = sft_probe("analyze", *arguments, "--out", folder)
    assert result.returncode == 0, result.stderr
    table: pd.DataFrame = pd.read_csv(folder / "changes.csv")
    return table[(table["measure"] == "logprob") & (table["split"] == "heldout")]


def test_a_stage_goes_on_where_its_parent_ended(
    swept_run: Path, second_stage: Path, tmp_path: Path, sft_probe: Run
) -> None:
    alone = changes(sft_probe, tmp_path / "alone", swept_run)
    chain = changes(sft_probe, tmp_path / "chain", swept_run, second_stage, "--chain")
    assert sorted(chain["step"].unique()) == [0, 1, 4, 5, 8]
    for step, own in ((1, 1), (4, 4), (5, 1), (8, 4)):
        expected = alone[alone["step"] == own].set_index(["category", "unit"])["level"]
        found = chain[chain["step"] == step].set_index(["category", "unit"])["level"]
        pd.testing.assert_series_equal(found[expected.index], expected, check_names=False)


def test_stages_that_do_not_meet_are_noted_and_drawn_with_their_border(
    swept_run: Path, second_stage: Path, tmp_path: Path, sft_probe: Run
) -> None:
    result = sft_probe("analyze", swept_run, second_stage, "--chain", "--out", tmp_path / "out")
    assert "from where the stage before ends" in result.stdout
    drawn = sft_probe(
        *("plot", swept_run, second_stage, "--chain", "--figures", "changes", "--format", "svg"),
        *("--out", tmp_path / "figures"),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "start of" in (tmp_path / "figures/changes_heldout.svg").read_text()


def test_one_run_is_no_chain(swept_run: Path, sft_probe: Run) -> None:
    assert "two stages or more" in user_error(sft_probe("analyze", swept_run, "--chain"))


def test_stages_on_other_probe_sets_are_refused(
    swept_run: Path, second_stage: Path, sft_probe: Run
) -> None:
    path = second_stage / "sweep/manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "probe_set_sha256": "0" * 64}))
    result = sft_probe("analyze", swept_run, second_stage, "--chain")
    assert "different probe sets" in user_error(result)


@needs_shared
def test_both_published_stages_are_one_chain(tmp_path: Path, sft_probe: Run) -> None:
    files = [
        PUBLISHED / f"qwen1.8b_{name}.metrics.json" for name in ("sft_chosen", "dpo_after_sft")
    ]
    result = sft_probe("analyze", *files, "--chain", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "changes.csv")
    assert table["run"].nunique() == 1
    assert table["step"].nunique() == 40 + 30 - 1
