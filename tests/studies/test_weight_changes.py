"""Changes of weights, against numpy's SVD of the same snapshots."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sft_probe.analysis.studies.weight_changes import (
    by_layer,
    effective_rank,
    layer_and_kind,
    weight_changes,
)
from sft_probe.errors import UserError


def reference(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return the same numbers from whole singular value decompositions."""
    change = after - before
    singular = np.linalg.svd(change, compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    left, _, right = np.linalg.svd(before)
    left_after, _, right_after = np.linalg.svd(after)
    cosines = (left[:, 0] @ left_after[:, 0], right[0] @ right_after[0])
    return {
        "relative_change": float(np.linalg.norm(change) / np.linalg.norm(before)),
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
        "angle_degrees": math.degrees(max(math.acos(min(1, abs(c))) for c in cosines)),
    }


def test_every_matrix_of_a_run_agrees_with_its_whole_decomposition(tiny_run: Path) -> None:
    table = weight_changes(tiny_run).set_index(["step", "parameter"])
    first, last = (
        load_file(tiny_run / f"weights/step_{step:06d}/model.safetensors") for step in (0, 4)
    )
    assert set(table.index.get_level_values("step")) == {1, 4}
    assert set(table.loc[4].index) == set(first)
    for name, tensor in first.items():
        row: Any = table.loc[(4, name)]
        if tensor.dim() == 2:
            expected = reference(tensor.double().numpy(), last[name].double().numpy())
            assert row["relative_change"] == pytest.approx(expected["relative_change"], rel=1e-9)
            assert row["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-4)
            assert row["angle_degrees"] == pytest.approx(expected["angle_degrees"], abs=1e-3)
        else:
            assert row["relative_change"] > 0
            assert math.isnan(row["effective_rank"])


def test_layers_add_up_to_the_whole_model(tiny_run: Path) -> None:
    changes = weight_changes(tiny_run)
    layers = by_layer(changes)
    for step in (1, 4):
        whole, parts = (
            (table[table["step"] == step]["change_norm"] ** 2).sum() for table in (changes, layers)
        )
        assert parts == pytest.approx(whole)
    assert set(layers["kind"]) == {"attention", "mlp", "norm", "embedding"}
    assert set(layers["layer"].dropna()) == set(range(layers["layer"].max() + 1))


def test_a_lora_moves_the_matrices_it_sits_on_by_its_rank(
    tiny_flags: list[str], tmp_path: Path, sft_probe: Run
) -> None:
    flags = ["--lora_r", 2, "--lora_target_modules", "q_proj", "--output_dir", tmp_path / "lora"]
    assert sft_probe("train", *tiny_flags, *flags).returncode == 0
    table = weight_changes(tmp_path / "lora").query("step == 4")
    moved = table[table["change_norm"] > 0]
    assert set(moved["parameter"].str.split(".").str[-2]) == {"q_proj"}
    assert (moved["effective_rank"] < 2 + 1e-3).all()


@given(rank=st.integers(1, 5), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_the_effective_rank_of_equal_singular_values_is_their_number(
    rank: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.linalg.qr(torch.randn(12, rank, generator=generator, dtype=torch.float64))[0]
    other = torch.linalg.qr(torch.randn(7, rank, generator=generator, dtype=torch.float64))[0]
    assert effective_rank(scale * base @ other.T) == pytest.approx(rank, rel=1e-3)
    assert math.isnan(effective_rank(torch.zeros(12, 7, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11, "attention")),
        ("model.layers.0.input_layernorm.weight", (0, "norm")),
        ("model.layers.3.mlp.down_proj.weight", (3, "mlp")),
        ("gpt_neox.layers.2.attention.query_key_value.weight", (2, "attention")),
        ("gpt_neox.layers.2.attention.dense.weight", (2, "attention")),
        ("transformer.h.7.attn.c_attn.weight", (7, "attention")),
        ("transformer.h.7.ln_1.weight", (7, "norm")),
        ("transformer.wte.weight", (None, "embedding")),
        ("model.layers.4.self_attn.q_norm.weight", (4, "norm")),
        ("model.layers.5.mlp.experts.gate_up_proj", (5, "mlp")),
        ("lm_head.weight", (None, "embedding")),
        ("model.norm.weight", (None, "norm")),
    ],
)
def test_layer_and_kind_are_read_from_names(name: str, expected: tuple[int | None, str]) -> None:
    assert layer_and_kind(name) == expected


def test_runs_without_two_like_snapshots_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "weights/step_000001")
    shutil.rmtree(run / "weights/step_000004")
    with pytest.raises(UserError, match="1 snapshots that can be read; two are needed"):
        weight_changes(run)


def test_the_table_has_one_row_per_step_and_parameter(tiny_run: Path) -> None:
    table: pd.DataFrame = weight_changes(tiny_run)
    assert not table.duplicated(["step", "parameter"]).any()


def test_the_command_names_the_layer_that_moved_most_and_draws(
    tiny_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    result = sft_probe("weights", tiny_run, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "moved most: " in result.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {
        "weights.csv",
        "weights_by_layer.csv",
        "weights_by_layer.pdf",
    }
