"""The runs of a transfer experiment: one per row and order, trained once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Run, make_docs, user_error

from sft_probe.analysis.studies.training_runs import HALVES, contrast_rows, half_rows, train_rows
from sft_probe.errors import UserError
from sft_probe.probe_set import load_probe_set

WriteSet = Callable[[list[dict[str, Any]]], Path]


def preference_docs(num_docs: int) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in doc.items() if k != "other"}, "rejected": doc["other"]}
        for doc in make_docs(num_docs)
    ]


@pytest.fixture
def recipe(tiny_model: Path, write_set: WriteSet, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tiny_model}\nprobe_set: {write_set(preference_docs(16))}\n"
        "max_steps: 3\n"
        "deepspeed: none\nper_device_train_batch_size: 2\nlearning_rate: 1e-3\nsnapshot_steps: "
        "last\n"
    )
    return path


@pytest.mark.slow
def test_transfer_trains_sweeps_and_writes_its_tables(
    recipe: Path, sft_probe: Run, tmp_path: Path
) -> None:
    flags = (
        "--recipe",
        recipe,
        "--order-seeds",
        1,
        "--train-flags",
        "--max_steps 4",
        "--out",
        tmp_path / "out",
    )
    result = sft_probe("transfer", "--rows", "chosen,rejected", *flags)
    assert result.returncode == 0, result.stderr
    assert "chosen" in result.stdout
    assert "rejected" in result.stdout
    assert list((tmp_path / "out").glob("*.csv"))
    assert "--train-on needs --recipe" in user_error(
        sft_probe("transfer", "--train-on", "chosen,rejected")
    )


@pytest.mark.slow
def test_each_row_is_trained_once_in_each_order(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = ["chosen_no_prompt", "tagged"]
    first = train_rows(rows, out, recipe=recipe, num_orders=1, shard=(1, 2), extra=[])
    assert first == [f"chosen_no_prompt={out}/chosen_no_prompt-order0"]
    before = (out / "chosen_no_prompt-order0/manifest.json").stat().st_mtime_ns
    both = train_rows(rows, out, recipe=recipe, num_orders=1, shard=(1, 1), extra=[])
    assert both == [f"{row}={out}/{row}-order0" for row in rows]
    assert (out / "chosen_no_prompt-order0/manifest.json").stat().st_mtime_ns == before
    for row in rows:
        assert sorted(file.name for file in (out / f"{row}-order0").glob("probe/step_*")) == [
            f"step_00000{step}.jsonl" for step in (0, 1, 2, 3)
        ]
    assert json.loads((out / "tagged-order0/manifest.json").read_text())["num_examples"] == 16
    with pytest.raises(
        UserError,
        match="training on nothing ended with code 2: sft-probe: --train_category nothing",
    ):
        train_rows(["nothing"], out, recipe=recipe, num_orders=1, shard=(1, 1), extra=[])


def test_the_contrast_set_asks_for_both_responses(write_set: WriteSet) -> None:
    docs = preference_docs(4)
    rows = contrast_rows(load_probe_set(str(write_set(docs))))
    assert [row["messages"][-1]["content"] for row in rows] == [
        text for doc in docs[1::2] for text in (doc["chosen"], doc["rejected"])
    ]
    assert rows[0]["messages"][0]["content"] == "What is 1 plus 1?\n\nGive the better answer."
    with pytest.raises(UserError, match="needs the category rejected"):
        contrast_rows(load_probe_set(str(write_set(make_docs()))))
    assert rows[1]["messages"][0]["content"] == "What is 1 plus 1?\n\nGive the worse answer."


def test_halves_share_no_conversation(write_set: WriteSet) -> None:
    docs = preference_docs(16)
    for doc in docs[3:8:2]:
        doc["conversation_id"] = "one"
    train = {doc["doc_id"]: doc for doc in docs if doc["split"] == "train"}
    halves = [
        half_rows(load_probe_set(str(write_set(docs))), number) for number in range(len(HALVES))
    ]
    ids = [[row["source_doc_id"] for row in half] for half in halves]
    assert sorted(ids[0] + ids[1]) == sorted(train)
    assert any({docs[n]["doc_id"] for n in (3, 5, 7)} <= set(half) for half in ids)
    assert halves[0][0]["messages"][-1] == {
        "role": "assistant",
        "content": train[ids[0][0]]["chosen"],
    }


def test_transfer_refuses_to_train_on_a_mixture(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the mixture chosen:0\.5 has no one category as its target"
    ):
        train_rows(
            ["chosen", "chosen:0.5"],
            tmp_path / "out",
            recipe=recipe,
            num_orders=1,
            shard=(1, 1),
            extra=[],
        )
    assert not list((tmp_path / "out").glob("chosen*")), "nothing is trained before"
