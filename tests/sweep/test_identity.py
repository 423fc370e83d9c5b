"""A score belongs to one checkpoint: another model is refused, other weights are scored again, a
move is none."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import Run, make_checkpoint, make_docs, user_error
from transformers import AutoModelForCausalLM

from sft_probe.analysis.sweep.ownership import owned_step
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.sweep import sweep as sweep_all

STEPS = (10, 20)


@pytest.fixture
def models(tmp_path: Path, tiny_model: Path) -> Path:
    """A and B: two runs of one architecture, each with steps 10 and 20, and a small probe set."""
    for number, name in enumerate("AB"):
        for step in STEPS:
            make_checkpoint(
                tmp_path / name / f"checkpoint-{step}", tiny_model, 1 + 10 * number + step
            )
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(8)))
    return tmp_path


@pytest.fixture
def sweep(models: Path, sft_probe: Run) -> Any:
    """Sweeps checkpoints into `out`, 'checkpoint-*' of one model by default."""

    def run(*patterns: str, out: str = "out", flags: tuple[str, ...] = ()) -> Any:
        paths = [str(models / pattern) for pattern in patterns]
        return sft_probe(
            "sweep",
            models / out,
            "--checkpoints",
            *paths,
            "--probe_set",
            models / "set.jsonl",
            *flags,
        )

    return run


def means(out: Path) -> dict[int, float]:
    table: pd.Series[float] = (
        pd.read_parquet(out / "scores.parquet").groupby("step")["logprob"].mean()
    )
    return {int(str(step)): round(value, 3) for step, value in table.items()}


def records(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text()) for path in sorted(out.glob("sweep/step_*/*/checkpoint.json"))
    ]


def test_scores_record_their_weights_and_their_model(models: Path, sweep: Any) -> None:
    assert sweep("A/checkpoint-*").returncode == 0
    found = records(models / "out")
    assert [Path(record["place"]) for record in found] == [
        models / f"A/checkpoint-{step}" for step in STEPS
    ]
    assert all(len(record["files"]["model.safetensors"]["sha256"]) == 64 for record in found)
    assert set(pd.read_parquet(models / "out/scores.parquet")["model"]) == {str(models / "A")}


@pytest.mark.parametrize("pattern", ["B/checkpoint-*", "B/checkpoint-20", "B/checkpoint-30"])
def test_another_model_in_the_same_directory_is_refused_with_what_differs(
    models: Path, sweep: Any, tiny_model: Path, pattern: str
) -> None:
    make_checkpoint(models / "B/checkpoint-30", tiny_model, 99)
    assert sweep("A/checkpoint-*").returncode == 0
    before = means(models / "out")
    message = user_error(sweep(pattern))
    assert f"holds the scores of the checkpoints of {models / 'A'}" in message
    assert f"{models / 'B'} are another model's" in message
    assert ("model.safetensors differ" in message) == ("30" not in pattern)
    assert sweep("A/checkpoint-*").returncode == 0, "the directory is still A's"
    assert means(models / "out") == before


def test_runs_that_share_their_first_checkpoint_are_still_two_runs(
    models: Path, sweep: Any, tiny_model: Path
) -> None:
    for name in "AB":
        shutil.copytree(tiny_model, models / name / "checkpoint-0")
    assert sweep("A/checkpoint-*").returncode == 0
    assert "another model's" in user_error(sweep("B/checkpoint-0"))


def test_overwritten_weights_are_scored_again(models: Path, sweep: Any) -> None:
    assert sweep("A/checkpoint-*", flags=("--splits", "heldout,train")).returncode == 0
    assert sweep("B/checkpoint-*", out="other", flags=("--splits", "heldout,train")).returncode == 0
    a, b = means(models / "out"), means(models / "other")
    shutil.copy2(
        models / "B/checkpoint-20/model.safetensors", models / "A/checkpoint-20/model.safetensors"
    )
    result = sweep("A/checkpoint-*")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-20 has changed since heldout, train were scored: removed" in result.stderr
    assert "step 10 is complete" in result.stderr
    assert sweep("A/checkpoint-*", flags=("--splits", "heldout,train")).returncode == 0
    assert means(models / "out") == {10: a[10], 20: b[20]}


def test_untouched_files_are_not_read_again(
    models: Path, sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep("A/checkpoint-*").returncode == 0
    monkeypatch.setattr("sft_probe.analysis.sweep.identity.sha256_file", None)
    assert sweep("A/checkpoint-*").returncode == 0
    os.utime(models / "A/checkpoint-20/model.safetensors")
    result = sweep("A/checkpoint-*")
    assert result.returncode == 2
    assert "checkpoint-20: TypeError" in result.stderr


def test_a_touched_or_moved_checkpoint_is_the_same(models: Path, sweep: Any) -> None:
    assert sweep("A/checkpoint-*").returncode == 0
    before = means(models / "out")
    os.utime(models / "A/checkpoint-10/model.safetensors")
    (models / "A").rename(models / "moved")
    result = sweep("moved/checkpoint-*")
    assert result.returncode == 0, result.stderr
    assert "step 10 is complete" in result.stderr
    assert "step 20 is complete" in result.stderr
    assert means(models / "out") == before


def test_checkpoints_of_several_folders_in_one_command_are_one_run(
    models: Path, sweep: Any, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, models / "base/step0")
    assert sweep("A/checkpoint-*").returncode == 0
    assert sweep("base/step0", "A/checkpoint-*").returncode == 0
    assert sweep("base/step0").returncode == 0
    assert sorted(means(models / "out")) == [0, 10, 20]
    shutil.rmtree(models / "A/checkpoint-20")
    shutil.copytree(models / "B/checkpoint-20", models / "base/checkpoint-20")
    message = user_error(sweep("base/*"))
    assert "checkpoint-20 has other weights (model.safetensors)" in message
    assert sorted(means(models / "out")) == [0, 10, 20], "what was scored stays"


def test_a_checkpoint_that_is_damaged_later_keeps_its_scores(models: Path, sweep: Any) -> None:
    assert sweep("A/checkpoint-*").returncode == 0
    before = means(models / "out")
    path = models / "A/checkpoint-20/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "step 20: cannot read" in user_error(sweep("A/checkpoint-*"))
    assert means(models / "out") == before
    path.unlink()
    result = sweep("A/checkpoint-*")
    assert result.returncode == 0
    assert "What was scored is kept." in result.stderr
    assert means(models / "out") == before


def test_an_adapter_on_another_base_is_scored_again(
    models: Path, sweep: Any, tiny_model: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_checkpoint(models / "base", tiny_model, 0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(models / "L/checkpoint-10"))
    assert sweep("L/checkpoint-10").returncode == 0
    before = means(models / "out")
    assert "is complete" in sweep("L/checkpoint-10").stderr
    shutil.copy2(models / "A/checkpoint-20/model.safetensors", base / "model.safetensors")
    assert "has changed since heldout were scored" in sweep("L/checkpoint-10").stderr
    assert means(models / "out") != before


def test_scores_of_an_earlier_version_are_kept(models: Path, sweep: Any, sft_probe: Run) -> None:
    assert sweep("A/checkpoint-10").returncode == 0
    manifest = json.loads((models / "out/sweep/manifest.json").read_text())
    for name in ("sources", "step_unit"):
        del manifest[name]
    (models / "out/sweep/manifest.json").write_text(json.dumps({**manifest, "model": None}))
    for path in models.glob("out/sweep/step_*/*/checkpoint.json"):
        path.unlink()
    before = means(models / "out")
    result = sweep("A/checkpoint-*")
    assert result.returncode == 0, result.stderr
    assert "scored by an earlier version" in result.stderr
    assert means(models / "out").items() > before.items()
    assert sft_probe("analyze", models / "out").returncode == 0
    assert "another model's" in user_error(sweep("B/checkpoint-*"))


def test_a_sweep_of_an_earlier_version_is_resumed(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    """Earlier versions recorded dropouts too, which are not compared any more."""
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    path = run / "sweep/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model_config"] |= {"attention_dropout": 0.0, "pad_token_id": 0}
    path.write_text(json.dumps(manifest))
    result = sft_probe("sweep", run)
    assert result.returncode == 0, result.stderr
    assert "step 4 is complete" in result.stderr
    manifest["model_config"]["hidden_size"] = 33
    path.write_text(json.dumps(manifest))
    assert "model_config.hidden_size (33 there, 32 now)" in user_error(sft_probe("sweep", run))


def test_an_overwritten_snapshot_of_a_run_is_scored_again(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    table = (run / "trajectory.csv").read_bytes()
    shutil.copy2(
        run / "weights/step_000001/model.safetensors", run / "weights/step_000004/model.safetensors"
    )
    assert "step_000004/model.safetensors is damaged" in user_error(sft_probe("sweep", run))
    assert (run / "trajectory.csv").read_bytes() == table
    for name in ("meta.json", "model.safetensors"):
        shutil.copy2(run / "weights/step_000001" / name, run / "weights/step_000004" / name)
    meta = json.loads((run / "weights/step_000004/meta.json").read_text())
    (run / "weights/step_000004/meta.json").write_text(json.dumps({**meta, "step": 4}))
    result = sft_probe("sweep", run)
    assert result.returncode == 0, result.stderr
    assert "step 4: scoring heldout" in result.stderr
    frame = pd.read_csv(run / "trajectory.csv").set_index(["step", "category"])["logprob"]
    pd.testing.assert_series_equal(frame.loc[4], frame.loc[1])


def test_a_step_that_another_process_owns_is_waited_for_at_the_end(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    request = SweepRequest(
        directory=models / "out",
        checkpoints=[f"{models}/A/checkpoint-*"],
        probe_set=str(models / "set.jsonl"),
    )
    done = threading.Event()

    def work() -> None:
        sweep_all(request)
        done.set()

    thread = threading.Thread(target=work)
    with owned_step(models / "out/sweep/step_000010", wait=True):
        thread.start()
        deadline = time.monotonic() + 300
        while not (models / "out/sweep/step_000020/heldout").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (models / "out/sweep/step_000010/heldout").exists()
        assert not done.is_set()
    thread.join(300)
    assert done.is_set()
    assert "step 10: another process is scoring it" in caplog.text
    assert sorted(means(models / "out")) == [10, 20]
