"""The probe in training: the same numbers as the sweep's, and a training that does not notice."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers import Run, make_docs, user_error
from peft import LoraConfig, get_peft_model
from references import ROW_KEY, expected_logprob, live_rows, make_trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe import ProbeCallback
from sft_probe.analysis.stats.runs import load_recording
from sft_probe.errors import UserError
from sft_probe.train.live import record, score

WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture(scope="module")
def probed_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], tiny_run: Path, sft_probe: Run
) -> Path:
    """The run of `tiny_run`, with a probe in it."""
    run = tmp_path_factory.mktemp("probed") / "tiny"
    flags = ("--probe_steps", "0,1,last", "--probe_train", 5, "--output_dir", run)
    result = sft_probe("train", *tiny_flags, *flags)
    assert result.returncode == 0, result.stderr
    return run


def test_the_live_probe_does_not_change_the_training(probed_run: Path, tiny_run: Path) -> None:
    for step in (1, 4):
        one, other = (
            load_file(run / f"weights/step_{step:06d}/model.safetensors")
            for run in (probed_run, tiny_run)
        )
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_live_scores_equal_those_of_the_sweep(
    probed_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(probed_run, run)
    result = sft_probe("sweep", run, "--splits", "heldout,train")
    assert result.returncode == 0, result.stderr
    scores = pd.read_parquet(run / "scores.parquet").set_index(ROW_KEY)
    live, swept = (
        scores[scores["source"] == source].sort_index() for source in ("live", "lm_eval")
    )
    assert live.index.is_unique
    assert len(live) == 3 * (32 + 5) * 6
    swept = swept.loc[live.index]
    for name in ("logprob", "logprob_first", "logprob_eos"):
        pd.testing.assert_series_equal(live[name], swept[name], rtol=0, atol=2e-3)
    same = [
        "run",
        "model",
        "train_category",
        "order_seed",
        "examples_seen",
        "tokens_seen",
        "epoch",
        "num_tokens",
        "num_bytes",
        "prompt_format",
        "weights_dtype",
        "compute_dtype",
        "conversation_id",
    ]
    pd.testing.assert_frame_equal(live[same], swept[same])
    table = pd.read_csv(run / "trajectory.csv")
    assert set(table["source"]) == {"live", "lm_eval"}
    assert not table.duplicated(["source", "step", "split", "category"]).any()


def test_a_run_with_live_scores_alone_is_drawn(
    probed_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    shutil.copytree(probed_run, tmp_path / "tiny")
    assert sft_probe("plot", tmp_path / "tiny", "--format", "svg").returncode == 0
    assert "32 held-out prompts" in (tmp_path / "tiny/figures/trajectory_heldout.svg").read_text()


def test_the_callback_probes_a_lora_in_any_trainer(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    (tmp_path / "run/probe").mkdir(parents=True)
    (tmp_path / "run/probe/step_000009.jsonl").write_text("of an earlier run\n")
    callback = ProbeCallback(
        write_set(make_docs()), out=tmp_path / "run", steps="log2,last", overwrite=True
    )
    trainer = make_trainer(model, tokenizer, tmp_path / "out", callback)
    callback.trainer = trainer
    trainer.train()
    rows = live_rows(tmp_path / "run")
    assert sorted(set(rows.index.get_level_values("step"))) == [0, 1, 2, 4, 5]
    assert set(rows.index.get_level_values("split")) == {"heldout"}
    logged = [entry for entry in trainer.state.log_history if "probe/chosen" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 2, 4, 5]
    last: Any = rows.loc[(5, "heldout", "chosen")]
    assert logged[-1]["probe/chosen"] == pytest.approx(last["logprob"].mean(), abs=1e-3)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [
        1,
        2,
        3,
        4,
        5,
    ]
    merged = model.merge_and_unload()
    assert last.loc["d2", "logprob"] == pytest.approx(
        expected_logprob(merged, tokenizer, make_docs()[2]), abs=1e-3
    )
    manifest = json.loads((tmp_path / "run/probe/manifest.json").read_text())
    assert manifest["doc_ids"] == ["d0", "d2", "d4"]


def test_under_mixed_precision_the_probe_computes_in_the_dtype_of_the_weights(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    callback = ProbeCallback(str(write_set(make_docs())), out=tmp_path / "run", steps="0,last")
    caplog.set_level("INFO")
    make_trainer(model, tokenizer, tmp_path / "out", callback, bf16=True).train()
    assert "shared prefixes are computed once" in caplog.text
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits
        assert not torch.equal(logits, model._original_forward(torch.arange(9)[None]).logits), (
            "training lost bf16"
        )
    rows = live_rows(tmp_path / "run")
    assert set(rows["compute_dtype"]) == {"float32"}
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    del model.forward
    for step, reference in ((0, plain), (5, model)):
        live = rows.loc[(step, "heldout", "chosen", "d2"), "logprob"]
        assert live == pytest.approx(
            expected_logprob(reference, tokenizer, make_docs()[2]), abs=2e-3
        )


def test_each_module_is_in_its_former_mode_after_a_probe(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    modes: list[dict[str, bool]] = []

    class Watch(ProbeCallback):
        def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            model.model.norm.eval()
            modes.append({name: module.training for name, module in model.named_modules()})
            super().on_step_end(args, state, *more, **kwargs)
            modes.append({name: module.training for name, module in model.named_modules()})

    callback = Watch(str(write_set(make_docs())), out=tmp_path / "run", steps="2")
    make_trainer(model, tokenizer, tmp_path / "out", callback).train()
    assert len(modes) == 10
    assert all(before == after for before, after in zip(modes[::2], modes[1::2], strict=True))
    assert modes[2]["model.norm"] is False
    assert modes[2]["model.layers.0"] is True


def test_responses_with_nan_are_named_and_left_out(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    callback = ProbeCallback(str(write_set(make_docs())), out=tmp_path / "run", steps="0")
    make_trainer(model, tokenizer, tmp_path / "out", callback).train()
    assert (tmp_path / "run/probe/step_000000.jsonl").read_text() == ""
    assert "step 0: 6 logits are NaN or infinite: d0 chosen, d0 other" in caplog.text
    faults = (tmp_path / "run/probe/faults_000000.jsonl").read_text().splitlines()
    assert len(faults) == 6
    assert json.loads(faults[0]) == {
        "step": 0,
        "split": "heldout",
        "category": "chosen",
        "doc_id": "d0",
        "reason": "NaN or inf",
    }


def test_rows_of_an_earlier_run_are_kept(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    for attempt in range(2):
        callback = ProbeCallback(
            write_set(make_docs()), out=tmp_path / "run", steps="0,2", train_category="chosen"
        )
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = make_trainer(model, tokenizer, tmp_path / "out", callback)
        if not attempt:
            trainer.train()
            before = live_rows(tmp_path / "run")
            continue
        with pytest.raises(UserError, match=r"has rows of an earlier run\. Choose another `out`"):
            trainer.train()
    assert set(before["train_category"]) == {"chosen"}
    pd.testing.assert_frame_equal(live_rows(tmp_path / "run"), before)


def test_a_resumed_trainer_keeps_the_rows_of_its_probe_set_alone(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)

    def train(docs: list[dict[str, Any]], **flags: Any) -> None:
        callback = ProbeCallback(write_set(docs), out=tmp_path / "run", steps="+1")
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = make_trainer(
            model, tokenizer, tmp_path / "out", callback, save_strategy="steps", save_steps=2
        )
        trainer.train(**flags)

    train(make_docs())
    whole = live_rows(tmp_path / "run")
    state = str(tmp_path / "out/checkpoint-2")
    train(make_docs(), resume_from_checkpoint=state)
    pd.testing.assert_frame_equal(live_rows(tmp_path / "run"), whole)
    with pytest.raises(UserError, match="has rows of another probe set"):
        train(make_docs(8), resume_from_checkpoint=state)
    pd.testing.assert_frame_equal(live_rows(tmp_path / "run"), whole)


def test_the_probe_set_is_found_again(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    path = write_set(make_docs())
    monkeypatch.chdir(tmp_path)
    record("run", 0, score(model, tokenizer, path.name))
    monkeypatch.chdir("/")
    texts = load_recording(tmp_path / "run").texts
    assert texts["d0"] == {name: make_docs()[0][name] for name in ("chosen", "other")}
    path.rename(tmp_path / "run" / path.name)
    assert load_recording(tmp_path / "run").texts == texts
    changed = make_docs()
    changed[0]["chosen"] = "Another answer."
    write_set(changed).rename(tmp_path / "run" / path.name)
    recording = load_recording(tmp_path / "run")
    assert recording.texts == {name: texts[name] for name in ("d2", "d4")}
    assert any("1 of 3 docs have no texts here" in note for note in recording.notes)


def test_in_a_loop_of_plain_pytorch(tiny_model: Path, write_set: WriteSet, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    model.model.norm.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path, run = write_set(make_docs()), tmp_path / "run"
    ids = tokenizer("The number 7 has always been a friend.", return_tensors="pt").input_ids
    for step in range(4):
        if step in (0, 1, 3):
            record(run, step, score(model, tokenizer, path), examples_seen=step)
            assert model.training
            assert not model.model.norm.training
        optimizer.zero_grad()
        if step < 3:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    rows = live_rows(run)
    assert sorted(set(rows.index.get_level_values("step"))) == [0, 1, 3]
    for step, reference in ((0, AutoModelForCausalLM.from_pretrained(tiny_model)), (3, model)):
        assert rows.loc[(step, "heldout", "chosen", "d2"), "logprob"] == pytest.approx(
            expected_logprob(copy.deepcopy(reference), tokenizer, make_docs()[2]), abs=1e-3
        )
    with pytest.raises(UserError, match="has rows of step 3 already"):
        record(run, 3, score(model, tokenizer, path))
    record(run, 3, score(model, tokenizer, path), overwrite=True)
    with pytest.raises(UserError, match="rows of another probe set"):
        record(run, 4, score(model, tokenizer, "helpful-mini"))
    assert load_recording(run).splits == ["heldout"]


def test_the_live_probe_refuses_fsdp(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ProbeCallback(str(write_set(make_docs())), out=tmp_path / "run")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    trainer = make_trainer(
        AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer, tmp_path / "out", callback
    )
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="does not work under FSDP"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_unreadable_probe_steps_are_reported(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = ("--probe_steps", "never", "--output_dir", tmp_path / "run")
    message = user_error(sft_probe("train", *tiny_flags, *flags))
    assert "--probe_steps 'never': 'never' is neither a step" in message
