"""Probe results in Weights & Biases and Trackio, with the offline modes of these libraries."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Run, make_docs, user_error
from references import live_rows, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import WandbCallback

from sft_probe import ProbeCallback
from sft_probe.train import probe
from sft_probe.train.live import record, score

WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return library


def records_of(path: Path) -> Iterator[bytes]:
    """Yield the records of a `.wandb` file: a LevelDB log after 7 bytes, in blocks of 32 KiB."""
    content, position, record = path.read_bytes(), 7, b""
    while position < len(content):
        if 2**15 - position % 2**15 < 7:  # too little is left of the block for a header
            position += 2**15 - position % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def recorded_of_wandb(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """Return the logged rows, the defined metrics and the config of the one offline run."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.finish()
    wandb.teardown()  # ends its process, so that all is written; the next one reads WANDB_DIR again
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    history: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    library: Any = wandb_internal_pb2
    for data in records_of(path):
        entry = library.Record()
        entry.ParseFromString(data)
        kind = entry.WhichOneof("record_type")
        if kind == "history":
            items = entry.history.item
            names = [item.key or "/".join(item.nested_key) for item in items]
            values = [json.loads(item.value_json) for item in items]
            history.append(dict(zip(names, values, strict=True)))
        elif kind == "metric":
            metrics.append({"name": entry.metric.name, "axis": entry.metric.step_metric})
        elif kind == "config":
            config |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in entry.config.update
            }
    return history, metrics, config


def test_the_probe_has_an_axis_and_tables_in_wandb(
    wandb: Any, tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    callback = ProbeCallback(write_set(make_docs()), out=tmp_path / "run", steps="0,2,last")
    make_trainer(model, tokenizer, tmp_path / "out", callback, report_to="wandb").train()
    history, metrics, config = recorded_of_wandb(tmp_path)
    probed = [row for row in history if "probe/step" in row]
    assert [row["probe/step"] for row in probed] == [0, 2, 5]
    rows = live_rows(tmp_path / "run")
    for row in probed:
        mean = rows.loc[(row["probe/step"], "heldout", "chosen"), "logprob"].mean()
        assert row["probe/chosen"] == pytest.approx(mean)
        assert row["probe/docs/nrows"] == 6  # 3 docs, 2 categories
        path = next(tmp_path.glob("wandb/offline-run-*/files")) / row["probe/docs/path"]
        assert len(json.loads(path.read_text())["data"]) == 6
    assert {"name": "probe/other", "axis": "probe/step"} in metrics
    assert config["probe/prompt_format"] == "hh"
    assert [row["train/global_step"] for row in history if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert not [name for row in history for name in row if name.startswith("train/probe")]


def test_the_curves_of_the_probe_are_sent_once(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    logged: list[dict[str, Any]] = []

    class OfTheTrainer(WandbCallback):
        def __init__(self) -> None: ...

        def on_train_begin(self, *_: Any, **__: Any) -> None: ...

        def on_train_end(self, *_: Any, **__: Any) -> None: ...

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logged.append(logs)

    class Ours:
        def __init__(self, name: str, *_: Any) -> None:
            self.name = name

        def send(self, step: int, _: Any) -> None:
            sent.append(step)

    monkeypatch.setattr(probe, "Tracker", Ours)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    callback = ProbeCallback(write_set(make_docs()), out=tmp_path / "run", steps="0,2,last")
    trainer = make_trainer(model, tokenizer, tmp_path / "out", callback)
    callback.trainer = trainer
    trainer.args.report_to = ["wandb"]
    trainer.add_callback(OfTheTrainer())
    trainer.train()
    assert sent == [0, 2, 5]
    assert [entry["loss"] for entry in logged if "loss" in entry]
    assert not [name for entry in logged for name in entry if "probe" in name]
    assert [entry for entry in trainer.state.log_history if "probe/chosen" in entry]


def test_scores_are_sent_afterwards_to_wandb(
    wandb: Any, tiny_model: Path, write_set: WriteSet, sft_probe: Run, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = score(model, tokenizer, write_set(make_docs()))
    for step in (8, 2):
        record(tmp_path / "run", step, rows)
    result = sft_probe("track", tmp_path / "run", "--to", "wandb")
    assert result.returncode == 0, result.stderr
    history, metrics, config = recorded_of_wandb(tmp_path)
    assert [row["probe/step"] for row in history] == [2, 8]
    assert {"name": "probe/chosen", "axis": "probe/step"} in metrics
    assert config["probe/probe_set"] == "set"


def test_the_probe_is_in_trackio(
    tiny_model: Path,
    write_set: WriteSet,
    sft_probe: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trackio = pytest.importorskip("trackio")
    for module in ("utils", "sqlite_storage", "media.utils"):
        name = f"trackio.{module}.TRACKIO_DIR"
        monkeypatch.setattr(name, tmp_path / "trackio", raising=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = score(model, tokenizer, write_set(make_docs()))
    for step in (8, 2):
        record(tmp_path / "run", step, rows)
    result = sft_probe("track", tmp_path / "run", "--to", "trackio", "--project", "mine")
    assert result.returncode == 0, result.stderr
    logs = trackio.SQLiteStorage.get_logs("mine", "run")
    assert [entry["probe/step"] for entry in logs] == [2, 8]
    assert all(len(entry["probe/docs"]["_value"]) == 6 for entry in logs)


def test_a_run_without_scores_is_not_sent(sft_probe: Run, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    message = user_error(sft_probe("track", tmp_path, "--to", "wandb"))
    assert f"{tmp_path} holds no scores. Run:  sft-probe sweep" in message
