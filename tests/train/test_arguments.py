"""Every flag of `transformers.TrainingArguments`, with plausible and wrong values: it works, or is
one message."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers import Run, user_error
from transformers import TrainingArguments

VALUES: dict[str, list[str]] = {
    "output_dir": [],  # of every test
    "per_device_train_batch_size": ["2", "0", "-1"],
    "num_train_epochs": ["0.01", "0"],
    "max_steps": ["2", "0"],
    "learning_rate": ["1e-4", "0", "-1"],
    "lr_scheduler_type": [
        "cosine",
        "linear",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "greedy",
        "no_such",
    ],
    "lr_scheduler_kwargs": ['{"num_cycles": 2}', '{"no_such": 1}', "{", "no_such.json"],
    "warmup_steps": ["3", "0.5", "-1"],
    "optim": [
        "sgd",
        "adafactor",
        "adagrad",
        "adamw_torch",
        "adamw_bnb_8bit",
        "adamw_apex_fused",
        "galore_adamw",
        "lomo",
        "schedule_free_adamw",
        "apollo_adamw",
        "rmsprop",
        "stable_adamw",
        "no_such",
    ],
    "optim_args": ["eps=1e-6", "nonsense"],
    "weight_decay": ["0.1"],
    "adam_beta1": ["0.8", "2"],
    "adam_beta2": ["0.95"],
    "adam_epsilon": ["1e-6"],
    "optim_target_modules": ["attn"],
    "gradient_accumulation_steps": ["2", "0"],
    "average_tokens_across_devices": ["false"],
    "max_grad_norm": ["0", "0.5"],
    "label_smoothing_factor": ["0.1"],
    "bf16": ["true"],
    "fp16": ["true"],
    "bf16_full_eval": ["true"],
    "fp16_full_eval": ["true"],
    "tf32": ["true", "false"],
    "activation_checkpointing": ["true"],
    "activation_checkpointing_kwargs": ['{"use_reentrant": false}', '{"no_such": 1}', "nonsense"],
    "gradient_checkpointing": ["true"],
    "gradient_checkpointing_kwargs": ['{"use_reentrant": true}'],
    "torch_compile": ["true"],
    "torch_compile_backend": ["eager", "no_such"],
    "torch_compile_mode": ["default"],
    "use_liger_kernel": ["true"],
    "liger_kernel_config": ['{"rope": false}'],
    "use_cache": ["true"],
    "neftune_noise_alpha": ["5"],
    "torch_empty_cache_steps": ["1", "0"],
    "auto_find_batch_size": ["true"],
    "logging_strategy": ["epoch", "no", "no_such"],
    "logging_steps": ["2", "0.5", "0"],
    "logging_first_step": ["true"],
    "log_on_each_node": ["false"],
    "logging_nan_inf_filter": ["true", "false"],
    "include_num_input_tokens_seen": ["all", "non_padding", "true"],
    "log_level": ["info", "no_such"],
    "log_level_replica": ["error"],
    "disable_tqdm": ["true"],
    "report_to": ["tensorboard", "wandb", "mlflow", "no_such", "all"],
    "run_name": ["mine"],
    "project": ["mine"],
    "trackio_space_id": ["me/space"],
    "trackio_bucket_id": ["me/bucket"],
    "trackio_static_space_id": ["false"],
    "eval_strategy": ["steps", "epoch"],
    "eval_steps": ["2"],
    "eval_delay": ["1"],
    "per_device_eval_batch_size": ["2"],
    "prediction_loss_only": ["true"],
    "eval_on_start": ["true"],
    "eval_do_concat_batches": ["false"],
    "eval_use_gather_object": ["true"],
    "eval_accumulation_steps": ["1"],
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": ["true"],
    "save_only_model": ["true"],
    "save_strategy": ["steps", "best"],
    "save_steps": ["2"],
    "save_on_each_node": ["true"],
    "save_total_limit": ["1", "3"],
    "enable_jit_checkpoint": ["true"],
    "push_to_hub": ["true"],
    "hub_token": ["x"],
    "hub_private_repo": ["true"],
    "hub_model_id": ["me/model"],
    "hub_strategy": ["end", "no_such"],
    "hub_always_push": ["true"],
    "hub_revision": ["main"],
    "load_best_model_at_end": ["true"],
    "metric_for_best_model": ["loss"],
    "greater_is_better": ["true"],
    "ignore_data_skip": ["true"],
    "restore_callback_states_from_checkpoint": ["true"],
    "full_determinism": ["true"],
    "seed": ["7", "-1"],
    "data_seed": ["7"],
    "use_cpu": ["true"],
    "accelerator_config": [
        '{"split_batches": true}',
        '{"dispatch_batches": true}',
        '{"even_batches": false}',
        '{"use_seedable_sampler": false}',
        '{"gradient_accumulation_kwargs": {"num_steps": 2}}',
        '{"non_blocking": true}',
        '{"use_configured_state": true}',
        '{"no_such": 1}',
        "{",
        "no_such.json",
    ],
    "parallelism_config": ['{"tp_size": 2}'],
    "dataloader_drop_last": ["true"],
    "dataloader_num_workers": ["1", "-1"],
    "dataloader_pin_memory": ["false"],
    "dataloader_persistent_workers": ["true"],
    "dataloader_prefetch_factor": ["2"],
    "dataloader_multiprocessing_context": ["fork", "no_such"],
    "dataloader_in_order": ["false"],
    "remove_unused_columns": ["true"],
    "label_names": ["labels", "other"],
    "train_sampling_strategy": ["sequential", "group_by_length", "no_such"],
    "length_column_name": ["size"],
    "ddp_find_unused_parameters": ["true"],
    "ddp_bucket_cap_mb": ["10"],
    "ddp_broadcast_buffers": ["true"],
    "ddp_static_graph": ["true"],
    "ddp_backend": ["gloo", "no_such"],
    "ddp_timeout": ["60"],
    "fsdp": ["full_shard"],
    "fsdp_config": ['{"min_num_params": 1}', "no_such.json"],
    "deepspeed": ["none", "zero9"],
    "debug": ["underflow_overflow", "no_such"],
    "skip_memory_metrics": ["false"],
    "do_train": ["true"],
    "do_eval": ["true"],
    "do_predict": ["true"],
    "resume_from_checkpoint": ["x"],
    "local_rank": ["0"],
}

CHANGES_THE_FIRST_LOSS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "neftune_noise_alpha",
    "bf16",
}
"""Any other flag that is accepted must leave the examples of the first step, and what the model
says of them, alone."""
QUICK = [
    ("per_device_train_batch_size", "0"),
    ("gradient_accumulation_steps", "0"),
    ("max_steps", "0"),
    ("optim", "galore_adamw"),
    ("lr_scheduler_type", "warmup_stable_decay"),
    ("bf16", "true"),
    ("use_cpu", "true"),
    ("report_to", "wandb"),
    ("train_sampling_strategy", "group_by_length"),
    ("train_sampling_strategy", "sequential"),
    ("accelerator_config", '{"split_batches": true}'),
    ("accelerator_config", '{"non_blocking": true}'),
    ("dataloader_multiprocessing_context", "no_such"),
]
ALL = [(name, value) for name, values in VALUES.items() for value in values]


def test_every_flag_of_training_is_in_a_test() -> None:
    assert {field.name for field in dataclasses.fields(TrainingArguments)} == set(VALUES)
    assert set(QUICK) <= set(ALL)


@pytest.fixture
def clean_process() -> Iterator[None]:
    """Some flags change the whole process."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity_warning()


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize(
    "flag",
    [flag if flag in QUICK else pytest.param(flag, marks=pytest.mark.full) for flag in ALL],
    ids=[f"{name}={value}" for name, value in ALL],
)
def test_a_flag_works_or_is_one_message(
    flag: tuple[str, str], tiny_run: Path, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    name, value = flag
    run = tmp_path / "run"
    result = sft_probe(
        "train",
        *tiny_flags,
        "--max_steps",
        1,
        "--report_to",
        "none",
        f"--{name}={value}",
        "--output_dir",
        run,
    )
    if result.returncode:
        message = user_error(result)
        assert name in message or len(message.strip().splitlines()[-1]) > 20, "nothing to go by"
        assert not (run / "manifest.json").exists()
        return
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["snapshot_steps"][-1] >= 1
    if name not in CHANGES_THE_FIRST_LOSS:
        first, expected = (
            json.loads((path / "losses.jsonl").open().readline()) for path in (run, tiny_run)
        )
        assert first["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert first["examples_seen"] == expected["examples_seen"]


@pytest.mark.parametrize(
    "flags", [["--bf16", "true"], ["--use_cpu", "true"], ["--bf16", "true", "--use_cpu", "true"]]
)
@pytest.mark.parametrize("stage", [[], ["--deepspeed", "none"]], ids=["default", "none"])
def test_flags_that_refusals_recommend_work_without_a_gpu(
    flags: list[str], stage: list[str], tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    rest = [flag for flag in tiny_flags if flag not in ("--deepspeed", "none")]
    result = sft_probe(
        "train", *rest, *stage, *flags, "--output_dir", tmp_path / "run", "--dry_run"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "split_batches",
        "dispatch_batches",
        "even_batches",
        "use_seedable_sampler",
        "gradient_accumulation_kwargs",
    ],
)
def test_settings_that_change_the_batch_are_refused_by_name(
    name: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    value = {
        "even_batches": False,
        "use_seedable_sampler": False,
        "gradient_accumulation_kwargs": {"num_steps": 2},
    }
    path = tmp_path / "accelerator.json"
    path.write_text(json.dumps({name: value.get(name, True)}))
    flags = ("--accelerator_config", path, "--output_dir", tmp_path / "run")
    message = user_error(sft_probe("train", *tiny_flags, *flags))
    assert f"--accelerator_config: {name!r}" in message
    assert "changes which examples make a step" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            '--activation_checkpointing true --activation_checkpointing_kwargs {"no_such":1}',
            "there is no 'no_such'",
        ),
        (
            '--lr_scheduler_type cosine --lr_scheduler_kwargs {"no_such":1}',
            "unexpected keyword argument 'no_such'",
        ),
        (
            "--lr_scheduler_kwargs file.json",
            "--lr_scheduler_kwargs file.json: a JSON object is needed",
        ),
        ("--optim adamw_torch --optim_args nonsense", "--optim_args nonsense: write name=value"),
        ("--optim galore_adamw --optim_target_modules attn", "galore_torch"),
        (
            "--per_device_train_batch_size 100 --dataloader_drop_last true",
            "64 examples do not fill one batch of 100",
        ),
        ("--probe_steps 1 --probe_train -1", "--probe_train -1: it must be 0 or more"),
        ("--lora_r 0", "--lora_r 0: it must be 1 or more"),
        ("--seed 99999999999", "Seed must be between 0 and 2**32 - 1"),
        ("--train_sampling_strategy group_by_length --dry_run", "Use one of random, sequential"),
    ],
)
def test_flags_that_depend_on_each_other_work_together_or_are_refused(
    flags: str, words: str, tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    assert words in user_error(
        sft_probe("train", *tiny_flags, *flags.split(), "--output_dir", tmp_path / "run")
    )


def test_what_the_trainer_refuses_does_not_spoil_the_directory(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path
) -> None:
    flags = (*tiny_flags, "--max_steps", 1, "--output_dir", tmp_path / "run")
    assert "galore_torch" in user_error(
        sft_probe("train", *flags, "--optim", "galore_adamw", "--optim_target_modules", "x")
    )
    result = sft_probe("train", *flags)
    assert result.returncode == 0, result.stderr


def test_mixed_precision_asked_for_by_the_launcher_is_reported(
    tiny_flags: list[str], sft_probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    message = user_error(sft_probe("train", *tiny_flags, "--output_dir", tmp_path))
    assert (
        "the launcher asks for mixed precision bf16, the flags do not: add --bf16 true" in message
    )
