"""The step that a name tells: the number after step, checkpoint, ckpt, iter or global_step, or a
question."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.analysis.sweep.checkpoints import checkpoints_matching, hub_revisions, main_source
from sft_probe.errors import UserError

RIGHT = {
    "step0": 0,
    "step1000": 1000,
    "step_000016": 16,
    "step-7": 7,
    "Step 7": 7,
    "STEP=12": 12,
    "steps_40": 40,
    "checkpoint-500": 500,
    "checkpoint500": 500,
    "checkpoint_0500": 500,
    "ckpt-12": 12,
    "ckpt.12": 12,
    "ckpt12": 12,
    "iter_0000100": 100,
    "iter100": 100,
    "iteration-3": 3,
    "global_step500": 500,
    "globalstep500": 500,
    "global-step-500": 500,
    "step500.ckpt": 500,
    "model_step_20": 20,
    "pythia-70m-step3000": 3000,
    "stage1-step140000-tokens294B": 140000,
    "stage2-ingredient1-step11931-tokens100B": 11931,
    "step1000-tokens4B": 1000,
    "tokens4B-step1000": 1000,
    "checkpoint-500-bf16": 500,
    "checkpoint-1000-fp32": 1000,
    "checkpoint-1000-lora-r16": 1000,
    "global_step500-zero3": 500,
    "step1000-seed3": 1000,
    "seed3_step1000": 1000,
    "iter_0000100_v2": 100,
    "v2_iter_0000100": 100,
    "step500-4bit": 500,
    "step-1000-1B": 1000,
    "epoch=3-step=300": 300,
    "epoch=3-step=300-val_loss=2.31": 300,
    "epoch_2_checkpoint-40": 40,
    "checkpoint-500-step500": 500,
    "checkpoint-step-500": 500,
    "2024-01-15-step100": 100,
    "step1000-lr2e-5": 1000,
    "step_size3-step100": 100,
}
ASKED = [
    "warmup_steps100",
    "max_steps1000",
    "final",
    "base",
    "last",
    "main",
    "best",
    "checkpoint-last",
    "checkpoint-best",
    "step",
    "500",
    "0000500",
    "model-500",
    "tokens294B",
    "checkpoint-tokens4B",
    "footstep3",
    "timestep-7",
    "500steps",
    "a1b2c3d4",
    "step1.5",
    "step10k",
    "step1M",
    "checkpoint-1e3",
    "step1_000",
    "step1,000",
    "step100-200",
    "step_100_200",
    "checkpoint-2024-01-15",
    "checkpoint-10-step-500",
    "step100-iter200",
    "epoch-0.5",
    "epoch1-2",
]
EPOCHS = {"epoch_1": 1, "epoch-2": 2, "epoch3": 3, "ckpt-epoch-4": 4, "Epoch=5": 5}


def steps_of(*names: str) -> list[int]:
    return [checkpoint.step for checkpoint in hub_revisions("some/model", names)]


@pytest.mark.parametrize("name", RIGHT)
def test_the_step_is_the_number_after_step_or_checkpoint(name: str) -> None:
    (checkpoint,) = hub_revisions("some/model", [name])
    assert (checkpoint.step, checkpoint.step_unit, checkpoint.revision) == (
        RIGHT[name],
        "optimizer step",
        name,
    )


@pytest.mark.parametrize("name", ASKED)
def test_an_unclear_step_name_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(UserError, match="NAME=STEP") as caught:
        steps_of("step5", name)
    assert repr(name) in str(caught.value)
    assert steps_of("step5", f"{name}=70") == [5, 70] or name == "step", "the remedy works"


def test_all_unclear_names_are_listed_at_once() -> None:
    with pytest.raises(UserError) as caught:
        steps_of("step1", "final", "checkpoint-1e3", "step1-iter2")
    message = str(caught.value)
    assert "'final' tells no step" in message
    assert "'1e3'" in message
    assert "'step1-iter2' tells several steps: 1, 2" in message


@pytest.mark.parametrize("name", ["step9007199254740993", f"step{10**30}", f"final={10**30}"])
def test_a_step_that_tables_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no step; a step is a whole number from 0 to"):
        steps_of("step5", name)


@pytest.mark.parametrize("name", EPOCHS)
def test_names_of_epochs_alone_are_counted_in_epochs(name: str) -> None:
    (checkpoint,) = hub_revisions("some/model", [name])
    assert (checkpoint.step, checkpoint.step_unit) == (EPOCHS[name], "epoch")
    with pytest.raises(UserError, match="no common axis"):
        steps_of(name, "step100")
    assert steps_of("base=0", name) == [0, EPOCHS[name]], (
        "a step that the user gives counts what the names count"
    )


@pytest.mark.parametrize(
    ("first", "second", "step"),
    [
        (
            "stage2-ingredient1-step11931-tokens100B",
            "stage2-ingredient2-step11931-tokens100B",
            11931,
        ),
        ("checkpoint-500-bf16", "checkpoint-500-fp32", 500),
        ("epoch=1-step=50", "epoch=2-step=50", 50),
    ],
)
def test_two_checkpoints_of_one_step_are_refused(first: str, second: str, step: int) -> None:
    with pytest.raises(UserError, match=f"are both step {step}"):
        steps_of(first, second)


@given(
    word=st.sampled_from(["step", "checkpoint", "ckpt", "iter", "global_step"]),
    step=st.integers(0, 10**7),
    before=st.sampled_from(["", "stage1-", "v2_", "7b-", "lora.r16-", "2024-01-15_"]),
    gap=st.sampled_from(["", "-", "_", "="]),
    after=st.sampled_from(
        ["", "-bf16", "_v2", "-seed3", "-tokens4B", ".hf", "-lora-r16-alpha32", "-zero3"]
    ),
)
def test_the_step_is_read_whatever_stands_around_it(
    word: str, step: int, before: str, gap: str, after: str
) -> None:
    assert steps_of(f"{before}{word}{gap}{step}{after}") == [step]


def test_steps_are_read_from_directories_as_from_revisions(tmp_path: Path) -> None:
    for name in ("checkpoint-500-bf16", "checkpoint-1000-fp32", "final", "out=3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20/trainer_state.json").write_text('{"global_step": 25}')
    found, problems = checkpoints_matching(
        [f"{tmp_path}/checkpoint-*", f"{tmp_path}/final=2000", f"{tmp_path}/out=3=4"]
    )
    assert [checkpoint.step for checkpoint in found] == [4, 25, 500, 1000, 2000]
    assert problems == []
    with pytest.raises(UserError, match="'final' tells no step"):
        checkpoints_matching([f"{tmp_path}/*"])
    with pytest.raises(UserError, match="only one can be step 7"):
        checkpoints_matching([f"{tmp_path}/checkpoint-*=7"])


def test_a_pattern_that_matches_nothing_is_named_beside_others_that_do(tmp_path: Path) -> None:
    (tmp_path / "out/checkpoint-2").mkdir(parents=True)
    (tmp_path / "out/trainer.log").touch()
    good = [str(tmp_path / "out/checkpoint-*"), str(tmp_path / "out/trainer.log")]
    assert [point.step for point in checkpoints_matching(good)[0]] == [2]
    with pytest.raises(UserError, match=r"no directory matches .*outt"):
        checkpoints_matching([*good, str(tmp_path / "outt/checkpoint-*")])


def test_a_base_model_at_step_0_does_not_name_the_run(tmp_path: Path) -> None:
    for name in ("base", "out/step-1", "out/step-2"):
        (tmp_path / name).mkdir(parents=True)
    found, _ = checkpoints_matching([f"{tmp_path}/base=0", f"{tmp_path}/out/*"])
    assert [checkpoint.step for checkpoint in found] == [0, 1, 2]
    assert main_source(found) == str((tmp_path / "out").resolve())
