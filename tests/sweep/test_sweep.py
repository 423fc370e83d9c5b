"""The sweep: right numbers, nothing lost, nothing mixed."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Run, blimp_task, make_docs, needs_shared, reads_task_index, user_error
from processes import Forked, run_forked, run_lm_eval
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.analysis.sweep.live_model import LiveModel
from sft_probe.files import write_jsonl
from sft_probe.probe_set import CATEGORIES, load_probe_set
from sft_probe.scores import SCHEMA, TOKEN_COLUMNS

WriteSet = Callable[[list[dict[str, Any]]], Path]


def scores(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "scores.parquet")


def reference(model: torch.nn.Module, tokenizer: Any, prompt: str, response: str) -> float:
    """Sum of log p(token) over the response and the space before it: ten lines of float64, nothing
    of ours."""
    ids = tokenizer.encode(f"{prompt} {response}")
    start = len(tokenizer.encode(prompt))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))


def hh(messages: tuple[dict[str, str], ...]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return (
        "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)
        + "\n\nAssistant:"
    )


def test_score_rows_say_their_run_step_doc_category_and_tokens(swept_run: Path) -> None:
    frame = scores(swept_run)
    assert list(frame.columns) == SCHEMA.names
    assert len(frame) == 3 * 6 * 32
    assert not frame.duplicated(["run", "step", "split", "category", "doc_id", "source"]).any()
    assert set(frame["run"]) == {"tiny"}
    assert set(frame["category"]) == set(CATEGORIES)
    assert sorted(frame["step"].unique()) == [0, 1, 4]
    assert frame.groupby("step")["examples_seen"].first().to_dict() == {0: 0, 1: 4, 4: 16}
    for name in (
        "train_category",
        "order_seed",
        "epoch",
        "num_tokens",
        "num_bytes",
        "logprob",
        "weights_dtype",
    ):
        assert frame[name].notna().all(), name
    tokenizer: Any = AutoTokenizer.from_pretrained(swept_run / "weights/step_000004")
    docs = {doc.doc_id: doc for doc in load_probe_set("helpful-mini").docs}
    records: list[Any] = frame.to_dict("records")
    for row in records:
        assert len(row["token_logprobs"]) == row["num_tokens"]
        assert all(len(row[name]) == row["num_tokens"] for name in TOKEN_COLUMNS)
        assert row["is_greedy"] == all(rank == 1 for rank in row["token_ranks"])
        assert sum(map(float, row["token_logprobs"])) == pytest.approx(row["logprob"], abs=1e-4)
        ids = tokenizer.encode(" " + docs[row["doc_id"]].responses[row["category"]])
        first = 1 if tokenizer.decode(ids[:1]) == " " else 0
        assert row["logprob_first"] == pytest.approx(float(row["token_logprobs"][first]))
        assert row["logprob_eos"] < 0


def test_scores_equal_a_float64_reference(swept_run: Path) -> None:
    model_dir = swept_run / "weights/step_000004"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    frame = scores(swept_run).query("step == 4").set_index(["doc_id", "category"])
    for doc in load_probe_set("helpful-mini").of_split("heldout"):
        for category in CATEGORIES:
            row: Any = frame.loc[(doc.doc_id, category)]
            expected = reference(model, tokenizer, hh(doc.messages), doc.responses[category])
            assert row["logprob"] == pytest.approx(expected, abs=2e-3)
            assert row["num_bytes"] == len(doc.responses[category].encode())


def test_the_trajectory_is_the_mean_of_the_score_rows(swept_run: Path) -> None:
    table = pd.read_csv(swept_run / "trajectory.csv")
    required = [
        "step",
        "category",
        "split",
        "num_docs",
        "logprob",
        "logprob_low",
        "logprob_high",
        "change",
        "low",
        "high",
    ]
    assert set(required) <= set(table.columns)
    frame = scores(swept_run)
    for _, row in table.iterrows():
        mine = frame[(frame["step"] == row["step"]) & (frame["category"] == row["category"])]
        assert row["num_docs"] == 32
        assert row["logprob"] == pytest.approx(mine["logprob"].mean(), abs=1e-4)
        assert row["logprob_low"] < row["logprob"] < row["logprob_high"]
    assert (table.query("step == 0")["change"] == 0).all()
    assert (table.query("step == 4 and category == 'chosen'")["change"] > 0).all()


def test_lm_evals_own_results_stand_beside_the_score_rows(swept_run: Path) -> None:
    (path,) = (swept_run / "sweep/step_000004/heldout").glob("results_*.json")
    results = json.loads(path.read_text())
    frame = scores(swept_run).query("step == 4")
    for category in CATEGORIES:
        mean = results["results"][f"sft_probe_{category}"]["logprob,none"]
        assert mean == pytest.approx(
            frame[frame["category"] == category]["logprob"].mean(), abs=1e-9
        )
        assert results["results"][f"sft_probe_{category}"]["logprob_stderr,none"] > 0
    assert len(list(path.parent.glob("samples_*.jsonl"))) == 6


def copy(run: Path, target: Path) -> Path:
    shutil.copytree(run, target / "tiny")
    return target / "tiny"


def test_a_complete_sweep_scores_nothing_again(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(swept_run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.glob("sweep/step_*/**/*")}
    table = (run / "trajectory.csv").read_bytes()
    (run / "trajectory.csv").unlink()
    result = sft_probe("sweep", run)
    assert result.returncode == 0
    assert "step 4 is complete" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in run.glob("sweep/step_*/**/*")} == before
    assert (run / "trajectory.csv").read_bytes() == table


@pytest.mark.slow
def test_a_killed_sweep_is_finished_by_the_same_command(
    swept_run: Path, tiny_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(tiny_run, tmp_path)
    process = Forked(["sweep", run], log=tmp_path / "log")
    while not (run / "sweep/step_000000/heldout").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "sweep/step_000004/heldout").exists()
    (run / "sweep/step_000001").mkdir(exist_ok=True)
    (run / "sweep/step_000001/.heldout.tmp").mkdir(exist_ok=True)  # what a kill in mid-write leaves
    (run / "sweep/step_000001/.heldout.tmp/rows.jsonl").write_text('{"half": ')
    assert sft_probe("sweep", run).returncode == 0
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_snapshots_are_reported_and_the_others_scored(
    tiny_run: Path, swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(tiny_run, tmp_path)
    truncate(run / "weights/step_000001/model.safetensors")
    shutil.copytree(run / "weights/step_000004", run / "weights/step_000009")
    (run / "weights/step_000009/meta.json").unlink()
    message = user_error(sft_probe("sweep", run))
    assert "2 checkpoints could not be scored in full" in message
    assert "step_000001/model.safetensors is damaged" in message
    assert "step_000009: cannot read" in message
    left = pd.read_csv(run / "trajectory.csv")
    whole = pd.read_csv(swept_run / "trajectory.csv").query("step != 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(left, whole)


def test_shards_make_the_same_table(
    tiny_run: Path, swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(tiny_run, tmp_path)
    assert sft_probe("sweep", run, "--shard", "2/2").returncode == 0
    assert list(pd.read_csv(run / "trajectory.csv")["step"].unique()) == [1]
    assert sft_probe("sweep", run, "--shard", "1/2").returncode == 0
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()


def test_the_train_split_is_added_to_a_finished_sweep(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(swept_run, tmp_path)
    result = sft_probe("sweep", run, "--splits", "train")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(run / "trajectory.csv")
    assert table.groupby("split")["num_docs"].unique().map(list).to_dict() == {
        "heldout": [32],
        "train": [64],
    }


@pytest.fixture(scope="session")
def foreign(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What somebody else's Trainer leaves: checkpoint-N directories, one without its state."""
    out = tmp_path_factory.mktemp("foreign")
    for step, target in ((1, "checkpoint-10"), (4, "checkpoint-20")):
        shutil.copytree(tiny_run / f"weights/step_{step:06d}", out / target)
        (out / target / "meta.json").unlink()
    (out / "checkpoint-20/trainer_state.json").write_text('{"global_step": 25}')
    return out


def test_checkpoints_of_any_trainer_are_swept(
    foreign: Path, swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe("sweep", tmp_path / "theirs", "--checkpoints", foreign / "checkpoint-*")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "theirs/trajectory.csv")
    assert sorted(table["step"].unique()) == [10, 25]
    mine = (
        pd.read_csv(swept_run / "trajectory.csv")
        .query("step == 4")
        .set_index("category")["logprob"]
    )
    theirs = table.query("step == 25").set_index("category")["logprob"]
    pd.testing.assert_series_equal(theirs, mine, atol=2e-4, rtol=0)


def test_revisions_of_a_hub_model_are_swept(
    tiny_model: Path, sft_probe: Run, tmp_path: Path
) -> None:
    """A local path stands for the hub, which is out of reach here: every revision is the same
    model."""
    result = sft_probe(
        "sweep", tmp_path / "hub", "--model", tiny_model, "--revisions", "step0,step1000"
    )
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "hub/trajectory.csv")
    assert sorted(table["step"].unique()) == [0, 1000]
    assert (table["change"] == 0).all()


@needs_shared
@pytest.mark.slow
def test_benchmarks_are_swept_beside_the_probe_set(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(swept_run, tmp_path)
    result = sft_probe("sweep", run, "--tasks", blimp_task(tmp_path), "--limit", 40)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(run / "benchmarks.csv")
    assert list(table.columns) == [
        "run",
        "step",
        "task",
        "metric",
        "filter",
        "value",
        "stderr",
        "n",
        "clusters",
    ]
    assert list(table["step"]) == [0, 1, 4]
    assert set(table["task"]) == {"blimp_adjunct_island"}
    assert set(table["metric"]) == {"acc"}
    assert set(table["n"]) == {40}
    assert table["value"].between(0.2, 1).all()
    assert (table["stderr"] > 0).all()
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()


def test_an_unknown_benchmark_is_refused_before_any_model_loads(
    swept_run: Path, sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(swept_run, tmp_path)
    monkeypatch.setenv("SFT_PROBE_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "capitals.jsonl", [{"context": "France:", "answer": "Paris"}])
    assert sft_probe("benchmarks", "add", tmp_path / "capitals.jsonl").returncode == 0
    monkeypatch.setattr(LiveModel, "load", lambda *_: pytest.fail("a model was loaded"))
    for task, reason in {
        str(tmp_path / "no.yaml"): "is missing",
        "capitols": "Did you mean capitals",
    }.items():
        assert reason in user_error(sft_probe("sweep", run, "--tasks", task))


def test_a_benchmark_of_ones_own_is_found_by_its_name(
    swept_run: Path, sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(swept_run, tmp_path)
    monkeypatch.setenv("SFT_PROBE_CACHE", str(tmp_path / "cache"))
    items = [{"query": "2 + 2 =", "choices": ["4", "5"], "gold": 0}] * 3
    write_jsonl(tmp_path / "sums.jsonl", items)
    added = sft_probe("benchmarks", "add", tmp_path / "sums.jsonl")
    assert added.stdout == "sums: 3 items, a question with choices\n"
    assert sft_probe("sweep", run, "--tasks", "sums").returncode == 0
    table = pd.read_csv(run / "benchmarks.csv")
    assert set(table["metric"]) == {"acc", "acc_norm", "bits_per_byte"}
    assert sorted(table["step"].unique()) == [0, 1, 4]


def test_a_sweep_records_where_its_texts_are_and_a_hash_of_each(swept_run: Path) -> None:
    manifest = json.loads((swept_run / "sweep/manifest.json").read_text())
    docs = load_probe_set(manifest["probe_set_source"]).docs
    assert manifest["doc_sha256"] == {doc.doc_id: doc.sha256 for doc in docs}


def test_a_dry_run_lists_checkpoints_and_what_is_done(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(swept_run, tmp_path)
    shutil.rmtree(run / "sweep/step_000004")
    before = sorted(run.rglob("*"))
    result = sft_probe("sweep", run, "--splits", "heldout,train", "--dry-run")
    assert (
        "probe set: helpful-mini (that of the run), 32 heldout docs and 64 train" in result.stdout
    )
    assert "prompt format: hh+prefix (that of the run)" in result.stdout
    foreign = ("sweep", tmp_path / "y", "--checkpoints", f"{run / 'weights'}/step_*", "--dry-run")
    shown = sft_probe(*foreign).stdout
    assert "probe set: helpful-mini (the default, embedded: --probe-set names another)" in shown
    assert "prompt format: hh (that of the probe set)" in shown
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [(line[0], line[3]) for line in lines[1:4]] == [
        ("0", "heldout"),
        ("1", "heldout"),
        ("4", "-"),
    ]
    assert lines[-1] == ["asked", "for:", "heldout,", "train"]
    assert sorted(run.rglob("*")) == before
    assert "no directory matches" in user_error(
        sft_probe("sweep", tmp_path / "x", "--checkpoints", "nothing-*", "--dry-run")
    )


def test_another_probe_set_format_or_dtype_is_refused(
    swept_run: Path, write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    run = copy(swept_run, tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.move(write_set(make_docs()), plain / "set.jsonl")
    manifest = {
        "name": "plain",
        "categories": {"chosen": "?", "other": "?"},
        "prompt_format": "plain",
    }
    (plain / "probe_set.json").write_text(json.dumps(manifest))
    message = user_error(sft_probe("sweep", run, "--probe_set", plain))
    assert "the run was trained with 'hh', the sweep would score 'plain'" in message
    assert "'chat'" in user_error(sft_probe("sweep", run, "--prompt_format", "chat"))
    assert "dtype (float32 there, bfloat16 now)" in user_error(
        sft_probe("sweep", run, "--dtype", "bfloat16")
    )
    shutil.move(plain / "set.jsonl", tmp_path / "other.jsonl")
    assert "probe_set_sha256" in user_error(
        sft_probe("sweep", run, "--probe_set", tmp_path / "other.jsonl")
    )
    assert (run / "trajectory.csv").read_bytes() == (swept_run / "trajectory.csv").read_bytes()


def test_directories_that_cannot_be_swept_are_refused_with_the_reason(
    tiny_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    assert "holds no snapshots" in user_error(sft_probe("sweep", tmp_path))
    run = copy(tiny_run, tmp_path)
    (run / "manifest.json").unlink()
    assert "holds no finished run" in user_error(sft_probe("sweep", run))
    assert "no directory matches" in user_error(
        sft_probe("sweep", tmp_path, "--checkpoints", tmp_path / "x-*")
    )
    foreign = ("--checkpoints", tiny_run / "weights/step_000001")
    assert "cannot write to the directory" in user_error(
        sft_probe("sweep", "/proc/nothing", *foreign)
    )
    (tmp_path / "nameless").mkdir()
    assert "tells no step" in user_error(
        sft_probe("sweep", tmp_path, "--checkpoints", tmp_path / "nameless")
    )


def test_an_over_long_response_never_kills_a_sweep(
    write_set: WriteSet, tiny_model: Path, sft_probe: Run, tmp_path: Path
) -> None:
    docs = make_docs(8)
    docs[2]["other"] = "word " * 3000 + "end."
    docs[4]["chosen"] = ""
    flags = ("--model", tiny_model, "--revisions", "step0", "--probe_set", write_set(docs))
    result = sft_probe("sweep", tmp_path / "run", *flags)
    assert result.returncode == 0, result.stderr
    assert "left out of all categories: d2: `other`" in result.stderr
    assert "left out of all categories: d4" in result.stderr
    frame = scores(tmp_path / "run")
    assert frame.groupby("category")["doc_id"].agg(sorted).to_dict() == {
        "chosen": ["d0", "d6"],
        "other": ["d0", "d6"],
    }


@reads_task_index
@pytest.mark.slow
@pytest.mark.parametrize("num_docs", [2, pytest.param(20, marks=pytest.mark.full)])
def test_real_model_agrees_with_stock_lm_eval_and_with_float64(
    num_docs: int, sft_probe: Run, tmp_path: Path
) -> None:
    """6 categories of the real model: the sweep, `lm_eval` and a float64 reference, to 2e-3
    nats."""
    from sft_probe.models import EMBEDDED_MODEL, resolve_model

    embedded = Path(str(resources.files("sft_probe.data") / "helpful-mini/heldout.jsonl"))
    lines = embedded.read_text().splitlines()[:num_docs]
    path = tmp_path / "some.jsonl"
    rows = [{k: v for k, v in json.loads(line).items() if k != "random_doc_id"} for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model_dir = resolve_model(EMBEDDED_MODEL)
    result = sft_probe(
        "sweep", tmp_path / "run", "--model", model_dir, "--revisions", "step0", "--probe_set", path
    )
    assert result.returncode == 0, result.stderr
    swept = scores(tmp_path / "run").set_index(["category", "doc_id"])["logprob"]
    assert len(swept) == 6 * num_docs
    stock = run_forked(
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model_dir},dtype=float32,softmax_dtype=float32",
        "--tasks",
        "sft_probe",
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--include_path",
        sft_probe("tasks-dir").stdout.strip(),
        "--log_samples",
        "--metadata",
        json.dumps({"probe_set": str(path)}),
        "--output_path",
        str(tmp_path / "stock"),
        target=run_lm_eval,
    )
    assert stock.returncode == 0, stock.stderr
    samples = [
        json.loads(line)
        for file in (tmp_path / "stock").rglob("samples_*.jsonl")
        for line in file.open()
    ]
    assert len(samples) == 6 * num_docs
    for sample in samples:
        key = (sample["doc"]["category"], sample["doc"]["doc_id"])
        assert swept[key] == pytest.approx(float(sample["resps"][0][0][0]), abs=2e-3)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    for row in rows:
        for category in CATEGORIES:
            expected = reference(model, tokenizer, hh(row["messages"]), row[category])
            assert swept[(category, row["doc_id"])] == pytest.approx(expected, abs=2e-3)
