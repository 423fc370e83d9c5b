"""One bad piece never stops the rest of a sweep, whichever it is and wherever it stands; each is
one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import Run, make_checkpoint, make_docs, user_error

from sft_probe.analysis.sweep.live_model import LiveModel

WRONG_SHAPES = ["[]", "\xff", '"x"', "7", "null", '{"a": 1', "", "{}"]


def slice_of(texts: list[str], number: int = 2) -> list[Any]:
    """The first ones for every run of the tests, the rest for the full one."""
    return [
        *texts[:number],
        *(pytest.param(text, marks=pytest.mark.full) for text in texts[number:]),
    ]


def wrong_values(*keys: str) -> list[str]:
    """Objects with all keys but one of them of a wrong type."""
    values: list[Any] = [None, "x", []]
    return [json.dumps({**dict.fromkeys(keys, 1), key: value}) for key in keys for value in values]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3, and a small probe set."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"checkpoint-{step}", tiny_model, step)
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(8)))
    return tmp_path


@pytest.fixture
def sweep(folder: Path, sft_probe: Run) -> Callable[..., Any]:
    def run(*flags: str) -> Any:
        paths = ("--checkpoints", folder / "checkpoint-*", "--probe_set", folder / "set.jsonl")
        return sft_probe("sweep", folder / "out", *paths, *flags)

    return run


def steps(out: Path) -> list[int]:
    return sorted(pd.read_csv(out / "trajectory.csv")["step"].unique())


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def list_as_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"version": "1.0"}')


def break_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"no tensors")


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def index_alone(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')


def index_of_metadata(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')


def one_layer_more(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1})
    )


def unknown_quantisation(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )


def state_of_brackets(path: Path) -> None:
    (path / "trainer_state.json").write_text("[" * 100_000)


def state_of_digits(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"global_step": ' + "9" * 5000 + "}")


def step_of_no_int64(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"global_step": 1000000000000000000000000}')


def negative_step(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"global_step": -5}')


def break_state(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"global_step": null}')


BREAKS = [
    remove_config,
    break_config,
    list_as_config,
    break_tokenizer,
    break_weights,
    remove_weights,
    index_alone,
    index_of_metadata,
    break_state,
    one_layer_more,
    unknown_quantisation,
    state_of_brackets,
    state_of_digits,
    step_of_no_int64,
    negative_step,
]


@pytest.mark.parametrize(
    ("breaks", "step"),
    [
        pytest.param(breaks, step, marks=[] if (number + step) % 3 == 1 else pytest.mark.full)
        for number, breaks in enumerate(BREAKS)
        for step in (1, 2, 3)
    ],
)
def test_a_bad_checkpoint_anywhere_in_the_sequence_costs_only_its_own_step(
    folder: Path, sweep: Callable[..., Any], breaks: Callable[[Path], None], step: int
) -> None:
    breaks(folder / f"checkpoint-{step}")
    message = user_error(sweep())
    assert "1 checkpoints could not be scored in full" in message
    assert f"checkpoint-{step}" in message
    assert steps(folder / "out") == sorted({1, 2, 3} - {step})


@pytest.mark.parametrize("step", [1, 3])
def test_a_checkpoint_without_a_tokenizer_is_scored_with_that_of_the_others(
    folder: Path, sweep: Callable[..., Any], step: int
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / f"checkpoint-{step}" / name).unlink()
    assert sweep().returncode == 0
    assert steps(folder / "out") == [1, 2, 3]


def test_a_sweep_without_a_readable_checkpoint_names_every_fault(
    folder: Path, sweep: Callable[..., Any]
) -> None:
    for step in (1, 2, 3):
        remove_config(folder / f"checkpoint-{step}")
    message = user_error(sweep())
    assert "no checkpoint can be scored" in message
    assert all(f"step {step}: " in message for step in (1, 2, 3))


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub, which is out of reach: revisions step1 and step2 of some/model. Returns
    their refs."""
    repository = folder / "hub/models--some--model"
    (repository / "refs").mkdir(parents=True)
    for step in (1, 2, 3):
        shutil.copytree(folder / f"checkpoint-{step}", repository / "snapshots" / (str(step) * 40))
    for step in (1, 2):
        (repository / "refs" / f"step{step}").write_text(str(step) * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    return repository / "refs"


@pytest.mark.parametrize("revisions", ["step0,step1,step2", "step1,step2,step3"])
def test_a_missing_revision_costs_only_its_own_step(
    hub: Path, folder: Path, sft_probe: Run, revisions: str
) -> None:
    flags = ("--model", "some/model", "--revisions", revisions, "--probe_set", folder / "set.jsonl")
    message = user_error(sft_probe("sweep", folder / "out", *flags))
    assert "1 checkpoints could not be scored in full" in message
    assert "no directory and no model on the hub: 'some/model' (revision step" in message
    assert steps(folder / "out") == [1, 2]
    record = json.loads((folder / "out/sweep/step_000001/heldout/checkpoint.json").read_text())
    assert (record["place"], record["commit"]) == ("some/model@step1", "1" * 40)
    assert set(pd.read_parquet(folder / "out/scores.parquet")["model"]) == {"some/model"}
    assert hub.is_dir()


def test_a_branch_that_was_moved_is_scored_again(hub: Path, folder: Path, sft_probe: Run) -> None:
    flags = (
        "--model",
        "some/model",
        "--revisions",
        "step1,step2",
        "--probe_set",
        folder / "set.jsonl",
    )
    assert sft_probe("sweep", folder / "out", *flags).returncode == 0
    before = pd.read_csv(folder / "out/trajectory.csv").set_index("step")["logprob"]
    (hub / "step2").write_text("3" * 40)
    result = sft_probe("sweep", folder / "out", *flags)
    assert result.returncode == 0, result.stderr
    assert "step 1 is complete" in result.stderr
    assert "some/model@step2 has changed since heldout were scored" in result.stderr
    after = pd.read_csv(folder / "out/trajectory.csv").set_index("step")["logprob"]
    assert (before.loc[1] == after.loc[1]).all()
    assert (before.loc[2] != after.loc[2]).all()
    (hub / "step2").unlink()
    assert sft_probe("sweep", folder / "out", *flags).returncode == 0, (
        "a cache that was emptied changes nothing"
    )


def test_an_unforeseen_error_is_reported_with_its_class_and_a_log(
    folder: Path, sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = LiveModel.load

    def failing(self: LiveModel, checkpoint: Any) -> Any:
        if checkpoint.step == 2:
            raise ZeroDivisionError("the library is broken")
        return load(self, checkpoint)

    monkeypatch.setattr(LiveModel, "load", failing)
    message = user_error(sweep())
    log = folder / "out/sweep/step_000002/error.log"
    assert f"checkpoint-2: ZeroDivisionError: the library is broken (traceback: {log})" in message
    assert "in failing" in log.read_text()
    assert steps(folder / "out") == [1, 3]
    monkeypatch.undo()
    assert sweep().returncode == 0
    assert not log.exists()
    assert steps(folder / "out") == [1, 2, 3]


def test_scores_that_cannot_be_written_cost_only_their_own_step(
    folder: Path, sweep: Callable[..., Any]
) -> None:
    (folder / "out/sweep").mkdir(parents=True)
    (folder / "out/sweep/step_000002").write_text("a file where a directory should be")
    message = user_error(sweep())
    assert "checkpoint-2: FileExistsError: " in message
    assert "no traceback: " in message
    assert steps(folder / "out") == [1, 3]


META = ("step", "examples_seen", "tokens_seen", "epoch", "dtype", "sha256")


@pytest.mark.parametrize("text", slice_of([*WRONG_SHAPES, *wrong_values(*META)]))
def test_a_meta_json_of_another_shape_is_named(
    swept_run: Path, sft_probe: Run, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    (run / "weights/step_000000/meta.json").write_text(text, encoding="latin-1")
    message = user_error(sft_probe("sweep", run))
    assert "1 checkpoints could not be scored in full" in message
    assert str(run / "weights/step_000000/meta.json") in message
    assert "step 4 is complete" in message


@pytest.mark.parametrize(
    "text", slice_of([*WRONG_SHAPES, *wrong_values("prompt_format", "request")])
)
def test_a_manifest_of_another_shape_is_named(
    swept_run: Path, sft_probe: Run, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    (run / "manifest.json").write_text(text, encoding="latin-1")
    assert str(run / "manifest.json") in user_error(sft_probe("sweep", run))
    shutil.copy2(swept_run / "manifest.json", run / "manifest.json")
    (run / "sweep/manifest.json").write_text(text, encoding="latin-1")
    assert str(run / "sweep/manifest.json") in user_error(sft_probe("sweep", run))


@pytest.mark.parametrize("text", slice_of(WRONG_SHAPES[:-1]))
def test_each_command_that_reads_runs_names_a_damaged_file(
    swept_run: Path, sft_probe: Run, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    for name in ("sweep/manifest.json", "manifest.json"):
        whole = (run / name).read_text("utf-8")
        (run / name).write_text(text, encoding="latin-1")
        assert str(run / name) in user_error(sft_probe("analyze", run))
        (run / name).write_text(whole, encoding="utf-8")


@pytest.mark.parametrize("text", [*WRONG_SHAPES[:-1], '{"categories": []}', '{"categories": {}}'])
def test_a_probe_set_of_another_shape_is_named(sft_probe: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(4)))
    (tmp_path / "probe_set.json").write_text(text, encoding="latin-1")
    assert str(tmp_path / "probe_set.json") in user_error(sft_probe("probe-set", tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"doc_id": ' + "9" * 5000 + "}"])
def test_a_line_of_a_probe_set_that_is_no_json_is_a_fault(
    sft_probe: Run, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(4)) + text + "\n")
    result = sft_probe("probe-set", path)
    assert result.returncode == 2
    assert f"{path}, line 5: not valid JSON" in result.stdout + result.stderr


@pytest.mark.parametrize("text", slice_of(WRONG_SHAPES))
def test_a_run_of_another_shape_is_not_trained_on(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    (run / "manifest.json").write_text(text, encoding="latin-1")
    assert str(run / "manifest.json") in user_error(
        sft_probe("train", *tiny_flags, "--output_dir", run)
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in ("rows.jsonl", "benchmarks.jsonl") for text in ("[1]", '{"a": 1')]
    + [("rows.jsonl", "{}")],
)
def test_score_rows_of_another_shape_name_their_file(
    swept_run: Path, sft_probe: Run, tmp_path: Path, name: str, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    path = run / "sweep/step_000001/heldout" / name
    path.write_text(text + "\n")
    assert str(path) in user_error(sft_probe("sweep", run))


@pytest.mark.parametrize("text", slice_of([*WRONG_SHAPES, *wrong_values("place", "files")]))
def test_a_damaged_record_of_a_step_costs_only_that_step(
    swept_run: Path, sft_probe: Run, tmp_path: Path, text: str
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    record = run / "sweep/step_000001/heldout/checkpoint.json"
    record.write_text(text, encoding="latin-1")
    message = user_error(sft_probe("sweep", run))
    assert str(record) in message
    assert "1 checkpoints could not be scored in full" in message
