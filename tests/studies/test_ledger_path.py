"""The path of a gain: it closes, it is exact where Simpson's rule is, and it finds the layer."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run, user_error
from safetensors.torch import load_file, save_file

from sft_probe.analysis.studies.ledger_path import _integrate, path_ledger
from sft_probe.files import read_json, sha256_file, write_json


class Cubic(torch.nn.Module):
    """Two groups of weights, and a function of third degree in them."""

    layers: Any

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ParameterDict({"mlp": torch.zeros(3)})])
        self.norm = torch.nn.Parameter(torch.zeros(3))
        self.double()

    def value(self, doc: int) -> torch.Tensor:
        """Return f of a doc: a product over both groups, and a cube of one."""
        one, other = self.layers[0]["mlp"], self.norm
        height: torch.Tensor = (one * other**2).sum() * (doc + 1) + (one**3).sum()
        return height


def test_a_function_of_third_degree_is_integrated_exactly() -> None:
    torch.manual_seed(0)
    model = Cubic()
    names = [name for name, _ in model.named_parameters()]
    nodes = [{name: torch.randn(3).double() for name in names} for _ in range(4)]
    groups, parts, values = _integrate(model, iter(nodes), [model.value], 2)[0]
    assert groups == [(None, "norm"), (0, "mlp")]
    assert parts.shape == (2, 3, 2)
    np.testing.assert_allclose(parts.sum(axis=2), np.diff(values, axis=1), atol=1e-12)


def test_one_group_of_weights_that_moves_alone_carries_all() -> None:
    torch.manual_seed(0)
    model = Cubic()
    start = {name: torch.randn(3).double() for name, _ in model.named_parameters()}
    end = {**start, "norm": torch.randn(3).double()}
    groups, parts, values = _integrate(model, iter([start, end]), [model.value], 2)[0]
    np.testing.assert_allclose(parts[:, 0, groups.index((0, "mlp"))], 0)
    np.testing.assert_allclose(
        parts[:, 0, groups.index((None, "norm"))], np.diff(values, axis=1)[:, 0], atol=1e-12
    )


@pytest.fixture(scope="session")
def slow_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str], sft_probe: Run
) -> Path:
    """A run whose snapshots are close together."""
    run = tmp_path_factory.mktemp("path") / "run"
    flags = ["--max_steps", "2", "--learning_rate", "1e-4", "--snapshot_steps", "0,1,2"]
    assert sft_probe("train", *tiny_flags, *flags, "--output_dir", run).returncode == 0
    return run


def test_the_path_of_a_run_closes(slow_run: Path) -> None:
    found = path_ledger(slow_run, ["chosen"], num_docs=10)
    assert list(found.closure["first_step"]) == [0, 1]
    assert (found.closure["error"] < 1e-3).all()
    assert found.too_long == []
    sums = found.parts.groupby("first_step")["change"].sum()
    np.testing.assert_allclose(sums, found.closure["path"], atol=1e-9)
    assert (found.closure["measured"] > 0).all()


def test_a_layer_that_moved_alone_carries_the_whole_path(slow_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(slow_run, run)
    shutil.rmtree(run / "weights/step_000001")
    folder = run / "weights/step_000002"
    first = load_file(run / "weights/step_000000/model.safetensors")
    last = load_file(folder / "model.safetensors")
    kept = {name: last[name] if ".layers.1.mlp." in name else first[name] for name in first}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    meta = read_json(folder / "meta.json")
    meta["sha256"]["model.safetensors"] = sha256_file(folder / "model.safetensors")
    write_json(folder / "meta.json", meta)
    parts = path_ledger(run, ["chosen"], num_docs=10).parts
    moved = parts[parts["change"] != 0]
    assert list(zip(moved["layer"], moved["kind"], strict=True)) == [(1, "mlp")]


def test_the_path_of_a_lora_closes(tiny_flags: list[str], sft_probe: Run, tmp_path: Path) -> None:
    flags = ["--max_steps", "1", "--snapshot_steps", "0,1", "--lora_r", "2"]
    run = tmp_path / "run"
    assert sft_probe("train", *tiny_flags, *flags, "--output_dir", run).returncode == 0
    found = path_ledger(run, ["chosen"], num_docs=10)
    assert (found.closure["error"] < 1e-2).all()
    assert found.closure["sum_abs"].sum() > 0


def test_runs_without_a_path_are_one_message(
    slow_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(slow_run, run)
    assert "no 'nothing'" in user_error(
        sft_probe("ledger", run, "--path", "--categories", "nothing")
    )
    meta = read_json(run / "weights/step_000001/meta.json")
    write_json(run / "weights/step_000001/meta.json", {**meta, "dtype": "bfloat16"})
    message = user_error(sft_probe("ledger", run, "--path"))
    assert "--snapshot_dtype float32" in message
    for step in (1, 2):
        shutil.rmtree(run / f"weights/step_{step:06d}")
    assert "a path needs two" in user_error(sft_probe("ledger", run, "--path"))


def test_the_command_names_the_layers_and_draws(
    slow_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe(
        "ledger", slow_run, "--path", "--categories", "chosen", "--docs", "10", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "closes" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"path.csv", "ledger_path.pdf"}
