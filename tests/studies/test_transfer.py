"""Transfer: closed forms, known runs, and the null of disjoint halves."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import Run, user_error
from score_files import CURVES, NUM_TOKENS, write_run

from sft_probe.analysis.stats.curves import crossing
from sft_probe.analysis.studies.transfer_maths import divide, omega, selectivity

RATES = {  # nats per response and step: row to probe category
    "chosen": {"chosen": 4.0, "rejected": 3.0, "random": 3.6, "non_response": -1.0},
    "rejected": {"chosen": 2.0, "rejected": 4.0, "random": 2.0, "non_response": 0.0},
    "random": {"chosen": 3.0, "rejected": 2.0, "random": 3.2, "non_response": 1.0},
    "non_response": {"chosen": 0.4, "rejected": 0.4, "random": 0.4, "non_response": 8.0},
}


def _write(folder: Path, row: str, seed: int = 0, scale: float = 1.0, **columns: Any) -> Path:
    curves = {
        name: lambda step, rate=rate: scale * rate * step for name, rate in RATES[row].items()
    }
    return write_run(
        folder / f"{row}_{seed}", curves=curves, seed=seed, train_category=row, **columns
    )


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {
        path.stem.removeprefix("transfer_"): pd.read_csv(path)
        for path in folder.glob("transfer_*.csv")
    }


def test_transfer_numbers_equal_their_closed_forms() -> None:
    np.testing.assert_allclose(
        selectivity(np.array([4.0]), np.array([[2.0], [-1.0]])), [1 - (2 - 1) / 2 / 4]
    )
    assert np.isnan(divide(0.0, np.zeros(1))).all()
    same, apart = np.array(2.0), np.array(0.0)
    assert omega(same, same, same, same) == 0
    assert omega(same, apart, apart, same) == 1
    assert omega(np.array(4.0), np.array(2.0), np.array(1.0), np.array(5.0)) == pytest.approx(
        (3 + 3) / 9
    )
    halfway = crossing(np.array([0.0, 1.0, 3.0]), 2.0)
    assert halfway is not None
    assert list(halfway) == [0, 0.5, 0.5]
    assert crossing(np.array([0.0, 1.0]), 2.0) is None


def test_transfer_of_known_runs(sft_probe: Run, tmp_path: Path) -> None:
    runs = [_write(tmp_path, row, seed) for row in RATES for seed in range(3)]
    result = sft_probe("transfer", "--runs", *runs, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    tables = _tables(tmp_path / "out")
    assert {"transfer.png", "omega.png", "omega_curve.pdf"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    per_token = 0.9 * 8 / (NUM_TOKENS - 1)  # the body gains 0.9 of a curve; the last step is 8
    matrix = tables["matrix"].set_index(["row", "category"])
    for row, rates in RATES.items():
        for category, rate in rates.items():
            found = matrix["transfer"].to_dict()[row, category]
            assert found == pytest.approx(per_token * rate, abs=0.02), (row, category)
    known = (
        RATES["chosen"]["chosen"]
        - RATES["rejected"]["chosen"]
        + RATES["rejected"]["rejected"]
        - RATES["chosen"]["rejected"]
    )
    omegas = tables["omega"].set_index(["row", "other"])
    assert omegas["omega"].to_dict()["chosen", "rejected"] == pytest.approx(known / 8, abs=0.03)
    assert (omegas["low"] < omegas["omega"]).all()
    share = tables["shares"].set_index("row")["share"].to_dict()
    assert share["random"] == pytest.approx(3.0 / 4.0, abs=0.03)
    assert "that training on random gives: 0.7" in result.stdout
    assert "3 runs: intervals for other runs and prompts hold the truth in 92%" in result.stdout
    against = (
        tables["differences"].set_index(["row", "other"]).to_dict("index")["rejected", "chosen"]
    )
    assert against["category"] == "chosen"
    assert against["low"] < against["difference"] == pytest.approx(-2.0 * per_token, abs=0.03)
    assert f"training on rejected gained {against['difference']:+.3f}" in result.stdout
    ratios = tables["matrix"].set_index(["row", "category"]).to_dict("index")["rejected", "chosen"]
    assert ratios["efficiency_low"] < ratios["efficiency"] < ratios["efficiency_high"]
    selective = tables["selectivity"].set_index("row")["selectivity"].to_dict()
    assert selective["chosen"] == pytest.approx(1 - (3.0 + 3.6 - 1.0) / 3 / 4, abs=0.02)


def test_omega_at_matched_gain_does_not_depend_on_speed(sft_probe: Run, tmp_path: Path) -> None:
    runs = [_write(tmp_path, "chosen"), _write(tmp_path, "rejected", seed=5)]
    slow = _write(tmp_path / "slow", "rejected", seed=5, scale=0.25)
    assert sft_probe("transfer", "--runs", *runs, "--out", tmp_path / "a").returncode == 0
    assert sft_probe("transfer", "--runs", runs[0], slow, "--out", tmp_path / "b").returncode == 0
    fast, slowed = (_tables(tmp_path / name)["omega"].iloc[0].to_dict() for name in "ab")
    assert slowed["omega"] != pytest.approx(fast["omega"], abs=0.05), "at equal examples it does"
    assert slowed["matched_omega"] == pytest.approx(fast["matched_omega"], abs=0.05)


def test_training_on_disjoint_halves_of_one_category_shows_no_difference(
    sft_probe: Run, tmp_path: Path
) -> None:
    one, two = _write(tmp_path / "a", "chosen", seed=1), _write(tmp_path / "b", "chosen", seed=2)
    slower = _write(tmp_path / "c", "chosen", seed=2, scale=0.8)
    other = _write(tmp_path, "non_response", seed=3)
    rows = (f"half_1={one}", f"half_2={two}", f"slower={slower}")
    result = sft_probe("transfer", "--runs", *rows, other, "--out", tmp_path / "out")
    assert "noise floor of omega, from half_1 and half_2: 0.0" in result.stdout, result.stderr
    table = _tables(tmp_path / "out")["omega"]
    null = table[table["is_null"]].iloc[0].to_dict()
    real = table[~table["is_null"]].iloc[0].to_dict()
    assert 0 < null["omega"] < 0.05 < real["low"]
    found = _tables(tmp_path / "out")["differences"].set_index(["row", "other"])
    assert (
        found["low"].to_dict()["half_1", "half_2"] < 0 < found["high"].to_dict()["half_1", "half_2"]
    )
    assert found["low"].to_dict()["half_1", "slower"] > 0, "rows of one target that do differ"
    assert found["difference"].to_dict()["half_1", "slower"] == pytest.approx(
        0.2 * 4 * 7.2 / 39, abs=0.02
    )


def test_efficiency_is_of_the_row_that_bears_the_name(sft_probe: Run, tmp_path: Path) -> None:
    bare = _write(tmp_path / "bare", "chosen", seed=4, scale=0.5)
    rows = (_write(tmp_path, "chosen"), f"chosen_no_prompt={bare}")
    assert sft_probe("transfer", "--runs", *rows, "--out", tmp_path / "out").returncode == 0
    table = (
        _tables(tmp_path / "out")["matrix"]
        .query("category == 'chosen'")
        .set_index("row")["efficiency"]
    )
    assert table["chosen"] == 1.0
    assert table["chosen_no_prompt"] == pytest.approx(0.5, abs=0.02)


def test_omega_without_a_gain_is_not_defined(sft_probe: Run, tmp_path: Path) -> None:
    runs = [_write(tmp_path, "chosen"), _write(tmp_path, "rejected", seed=1, scale=0.0)]
    result = sft_probe("transfer", "--runs", *runs, "--out", tmp_path / "out")
    assert "not defined" in result.stdout, result.stderr
    table = _tables(tmp_path / "out")["omega"]
    assert table[["omega", "matched_omega"]].isna().all(axis=None)
    still = _write(tmp_path / "still", "chosen", seed=2, scale=0.0)
    rows = (f"chosen={still}", _write(tmp_path, "random", seed=3))
    result = sft_probe("transfer", "--runs", *rows, "--out", tmp_path / "share")
    assert "that training on random gives: not defined" in result.stdout, result.stderr


def test_one_doc_gives_no_interval_and_one_category_no_selectivity(
    sft_probe: Run, tmp_path: Path
) -> None:
    one = {"chosen": CURVES["chosen"]}
    runs = [
        write_run(tmp_path / f"r{seed}", curves=one, num_docs=1, seed=seed) for seed in range(2)
    ]
    named = [f"{name}={run}" for name, run in zip(("chosen", "other"), runs, strict=True)]
    text = sft_probe("transfer", "--runs", *named, "--out", tmp_path / "out").stdout
    assert "nan" not in text
    assert "(no interval) nats per body token more on chosen" in text
    assert re.search(r"chosen +1 +\+\d\.\d{3}\?  not defined \(one category\)", text), text


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(
    sft_probe: Run, tmp_path: Path
) -> None:
    one = _write(tmp_path, "chosen")
    assert "at least two rows" in user_error(sft_probe("transfer", "--runs", one))
    far = write_run(tmp_path / "far", curves={"else": float}, train_category="else")
    assert "share no held-out docs" in user_error(sft_probe("transfer", "--runs", one, far))
    foreign = _write(tmp_path, "rejected", model="another")
    assert "several models, another, made-up" in user_error(
        sft_probe("transfer", "--runs", one, foreign)
    )
    again = _write(tmp_path / "again", "chosen")
    twice = sft_probe("transfer", "--runs", one, again, _write(tmp_path, "random"))
    assert "no repeats: their order seeds are 0, 0" in user_error(twice)
    unknown = write_run(tmp_path / "unknown", train_category="something")
    assert "was trained on something, which was not probed" in user_error(
        sft_probe("transfer", "--runs", one, unknown)
    )
