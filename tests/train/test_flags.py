"""The flags of training: what is refused, and what makes two attempts the same run."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import Run, user_error
from safetensors.torch import load_file, save_file

from sft_probe.errors import UserError
from sft_probe.train import launch
from sft_probe.train.arguments import SftArguments


def test_another_run_in_the_same_directory_is_refused(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run
) -> None:
    message = user_error(
        sft_probe("train", *tiny_flags, "--learning_rate", "5e-4", "--output_dir", tiny_run)
    )
    assert "--learning_rate: 1e-3 there, 5e-4 now" in message


def test_weights_of_another_origin_are_never_removed(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/precious").write_text("mine")
    assert "another origin" in user_error(sft_probe("train", *tiny_flags, "--output_dir", tmp_path))
    assert (tmp_path / "weights/precious").read_text() == "mine"


def test_a_bad_flag_does_not_spoil_the_directory(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    user_error(sft_probe("train", *flags, "--train_category", "nothing"))
    assert sft_probe("train", *flags).returncode == 0


@pytest.mark.parametrize("name", ["--hub_token", "--hub-token", "--hub_tok", "--hub-token="])
def test_a_token_on_the_command_line_is_refused(
    name: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    token = ["hf_secret"] if "=" not in name else []
    flags = [
        *tiny_flags,
        "--output_dir",
        str(tmp_path / "run"),
        name + "hf_secret" * (not token),
        *token,
    ]
    assert ("Did you mean --hub_token?" if name == "--hub_tok" else "HF_TOKEN") in user_error(
        sft_probe("train", *flags)
    )
    assert not list(tmp_path.rglob("*.json"))


def test_a_flag_with_dashes_is_the_same_flag(
    tiny_run: Path, tiny_flags: list[str], sft_probe: Run
) -> None:
    flags = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in tiny_flags]
    result = sft_probe("train", *flags, "--output-dir", tiny_run, "--max-wall-time-s", 600)
    assert "is complete" in result.stderr


def test_one_process_on_several_gpus_is_refused(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SftArguments, "n_gpu", 2)
    message = user_error(sft_probe("train", *tiny_flags, "--output_dir", tmp_path / "run"))
    assert "one process sees 2 GPUs. Start one for each (torchrun --nproc_per_node 2" in message


def test_a_gpu_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        launch.build_extension()
    compiled: list[str] = []
    monkeypatch.setattr(
        type(get_accelerator()), "create_op_builder", lambda _, name: compiled.append(name)
    )
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda *_: "cuda")
    launch.build_extension()
    assert compiled == []


def test_flags_override_those_of_a_recipe(tiny_model: Path, tmp_path: Path, sft_probe: Run) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_model}\nmax_steps: 3\nlearning_rate: 1e-4\ndeepspeed: none\n"
    )
    result = sft_probe(
        "train", "--config", recipe, "--max_steps", 1, "--output_dir", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["arguments"]["max_steps"], manifest["arguments"]["learning_rate"]) == (1, 1e-4)


BAD_FLAGS = [
    (
        ["--train_category", "nothing"],
        "there is no category 'nothing'. Use one of chosen, rejected",
    ),
    (["--snapshot_steps", "0,often"], "--snapshot_steps '0,often': 'often' is neither a step"),
    (["--snapshot_steps", "1,2,4,...,11"], "does not reach 11"),
    (["--model_name_or_path", "no/such-model"], "cannot load the tokenizer of 'no/such-model'"),
    (["--probe_set", "no-such-set"], "no probe set"),
    (["--prompt_format", "nothing"], "no prompt format 'nothing'"),
    (["--max_length", "4096"], "over the model's window of 1024 tokens"),
    (["--max_length=4096", "--dry-run"], "over the model's window of 1024 tokens"),
    (["--max_length", "20"], "is left to train on; 64 were dropped"),
    (["--dtype", "int8"], "--dtype: there is no choice 'int8'"),
    (["--deepspeed", "zero9"], "--deepspeed: there is no setting 'zero9'"),
    (["--output_dir", "/proc/nothing"], "cannot write to the directory /proc/nothing"),
    (["--config", "/no/recipe.yaml"], "there is no recipe"),
    (["--no_such_flag", "1"], "no_such_flag"),
    (
        ["--save_only_model", "true"],
        "--save_only_model True does not work here. Leave it out: it must be False",
    ),
    (["--ignore-data-skip", "true"], "--ignore_data_skip True"),
    (["--auto_find_batch_size", "true"], "--auto_find_batch_size True"),
    (["--average_tokens_across_devices", "false"], "--average_tokens_across_devices False"),
    (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1"),
    (["--eval_strategy", "steps"], "--eval_strategy steps"),
    (["--load_best_model_at_end", "true"], "--load_best_model_at_end True"),
    (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint x"),
    (["--fsdp", "full_shard"], "--fsdp full_shard"),
]


@pytest.mark.parametrize(
    ("flags", "words"), BAD_FLAGS, ids=[flags[0] + "=" + flags[1] for flags, _ in BAD_FLAGS]
)
def test_bad_flags_are_user_errors(
    flags: list[str], words: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    message = user_error(sft_probe("train", *tiny_flags, "--output_dir", tmp_path / "run", *flags))
    assert words in message


def test_without_a_compiler_one_process_trains_with_deepspeed_and_two_are_refused(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*tiny_flags, "--deepspeed", "cpu", "--output_dir", str(tmp_path / "run")]
    result = sft_probe("train", *flags, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--deepspeed none"):
        launch.provide_extension()


def test_another_model_or_format_under_the_same_name_is_refused(
    tiny_model: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    model, template = tmp_path / "model", tmp_path / "own.jinja"
    shutil.copytree(tiny_model, model)
    template.write_text("{{ messages[-1].content }} -> ")
    names = ("--model_name_or_path", model, "--prompt_format", template, "--max_wall_time_s", 0.01)
    flags = [*tiny_flags, *names, "--output_dir", tmp_path / "run"]
    assert sft_probe("train", *flags).returncode == 75
    template.write_text("{{ messages[-1].content }} => ")
    message = user_error(sft_probe("train", *flags))
    assert "the prompt format has changed" in message
    assert "the encoded data has changed" in message
    template.write_text("{{ messages[-1].content }} -> ")
    save_file(
        load_file(model / "model.safetensors"),
        model / "model.safetensors",
        metadata={"format": "pt", "v": "2"},
    )
    message = user_error(sft_probe("train", *flags))
    assert "(the model version has changed)" in message
