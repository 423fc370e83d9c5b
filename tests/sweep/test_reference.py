"""A sweep beside a second model: distances from it, and what is scored again."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from helpers import Run, make_checkpoint, user_error
from transformers import AutoConfig, AutoModelForCausalLM

from sft_probe.scores import DISTANCE_COLUMNS


def _scores(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "scores.parquet")


def _kl(run: Path) -> pd.Series:
    """Mean forward KL of a token, by step."""
    rows = _scores(run)
    values = rows.assign(kl=rows["token_kl_forward"].map(sum), n=rows["token_kl_forward"].map(len))
    sums = values.groupby("step")[["kl", "n"]].sum()
    kl: pd.Series = sums["kl"] / sums["n"]
    return kl


def _times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.glob("sweep/step_*/heldout/rows.jsonl")}


def test_every_token_of_every_category_has_its_distance_from_the_first_step(
    referred_run: Path, swept_run: Path
) -> None:
    rows = _scores(referred_run)
    assert len(rows) == len(_scores(swept_run))
    for name in DISTANCE_COLUMNS:
        assert (rows[name].map(len) == rows["num_tokens"]).all(), name
    kl = _kl(referred_run)
    assert kl[0] < 1e-6
    assert 1e-6 < kl[1] < kl[4]
    start = rows[rows["step"] == 0]
    assert set(start["token_reference_ranks"].explode()) == {1}
    keys = ["step", "category", "doc_id"]
    both = rows.merge(_scores(swept_run), on=keys)
    assert (both["logprob_x"] == both["logprob_y"]).all(), "the reference changes no score"


def test_what_is_scored_beside_the_reference_is_scored_once(
    sft_probe: Run, referred_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(referred_run, run)
    before = _times(run)
    assert "all" in sft_probe("sweep", run, "--reference", "first", "--dry-run").stdout
    for flags in (["--reference", "first"], [], ["--reference", "0"]):
        assert sft_probe("sweep", run, *flags).returncode == 0
        assert _times(run) == before, flags
    result = sft_probe("sweep", run, "--reference", "4")
    assert result.returncode == 0, result.stderr
    assert "scored without this reference" in result.stderr
    assert not set(_times(run).items()) & set(before.items())
    assert _kl(run)[4] < 1e-6 < _kl(run)[0]
    shown = sft_probe("analyze", run).stdout
    assert "distance from optimizer step 4 per token" in shown


def test_a_dry_run_does_not_count_what_has_no_distance(sft_probe: Run, swept_run: Path) -> None:
    shown = sft_probe("sweep", swept_run, "--reference", "first", "--dry-run").stdout
    assert all(" - " in line for line in shown.splitlines() if "weights/step" in line)


def test_foreign_checkpoints_have_distances_from_any_model_of_the_same_ids(
    sft_probe: Run, tiny_model: Path, tmp_path: Path
) -> None:
    for seed, name in {0: "base", 2: "one", 5: "two"}.items():
        make_checkpoint(tmp_path / name, tiny_model, seed)
    out, steps = tmp_path / "out", [f"{tmp_path / 'one'}=2", f"{tmp_path / 'two'}=5"]
    flags = ["--checkpoints", *steps, "--prompt-format", "hh", "--reference"]
    result = sft_probe("sweep", out, *flags, tmp_path / "base")
    assert result.returncode == 0, result.stderr
    kl = _kl(out)
    assert kl[5] > kl[2] > 1e-6, "the second is further away"
    manifest = json.loads((out / "sweep/manifest.json").read_text())
    assert manifest["reference"] == str(tmp_path / "base")


def test_a_reference_that_gives_no_divergence_is_refused(
    sft_probe: Run, swept_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    message = user_error(sft_probe("sweep", run, "--reference", "3"))
    assert "no checkpoint has that step; there are 0, 1, 4" in message
    larger = tmp_path / "larger"
    shutil.copytree(tiny_model, larger)
    config = AutoConfig.from_pretrained(tiny_model)
    config.vocab_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(larger)
    before = _times(run)
    message = user_error(sft_probe("sweep", run, "--reference", larger))
    assert f"the reference has {config.vocab_size} logits" in message
    assert _times(run) == before, "what was scored stays"
    assert "--reference: no directory" in user_error(
        sft_probe("sweep", run, "--reference", tmp_path / "none")
    )


@pytest.mark.full
def test_workers_of_ray_score_beside_the_reference(
    sft_probe: Run, swept_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    result = sft_probe("sweep", run, "--reference", "first", "--engine", "ray")
    assert result.returncode == 0, result.stderr
    assert _kl(run)[0] < 1e-6 < _kl(run)[4]
