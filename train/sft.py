"""Supervised fine-tuning on one category, with snapshots.

Run as: sft-probe train --config recipes/quickstart.yaml --output_dir runs/mine
    or: torchrun --nproc_per_node 2 -m sft_probe.train.sft --config recipes/quickstart.yaml --output_dir runs/mine
"""

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_probe.errors import UserError, exit_on_user_error
from sft_probe.files import make_dir, read_json, write_json
from sft_probe.malloc import keep_freed_memory
from sft_probe.models import check_window, load_model, load_tokenizer
from sft_probe.prompts import PromptFormat, terminator_id
from sft_probe.records import ProbeSet, load_probe_set
from sft_probe.train.arguments import SftArguments, parse_arguments
from sft_probe.train.data import PadRight, TrainingExamples, build_examples
from sft_probe.train.probe import ProbeCallback
from sft_probe.train.schedule import parse_steps
from sft_probe.train.snapshots import SftTrainer, SnapshotCallback

log = logging.getLogger("sft_probe.train")


def main(argv: list[str]) -> None:
    """Trains as the flags say; does nothing where the run is already complete.

    Raises:
        UserError: bad flags or data, or a run directory that holds something else.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments, asked = parse_arguments(argv)
    run_dir = make_dir(Path(str(arguments.output_dir)))
    probe_set = load_probe_set(arguments.probe_set)
    request = {"flags": asked, "probe_set_sha256": probe_set.sha256}
    if _is_complete(run_dir, request):
        log.info("the run in %s is complete", run_dir)
        return
    manifest = train(arguments, probe_set, run_dir, request)
    if arguments.should_save:
        write_json(run_dir / "manifest.json", {"request": request, "argv": sys.argv, **manifest})
        (run_dir / "started.json").unlink()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(arguments: SftArguments, probe_set: ProbeSet, run_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs the training and returns the manifest's content."""
    set_seed(arguments.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    for flag in ("snapshot_steps", "probe_steps"):  # a fault is told before the model is loaded
        parse_steps(getattr(arguments, flag) or "last", flag=f"--{flag}", max_steps=0, steps_per_epoch=1)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    prompt_format = PromptFormat(arguments.prompt_format or probe_set.prompt_format, tokenizer)
    examples = build_examples(
        probe_set,
        arguments.train_category,
        prompt_format,
        tokenizer,
        max_length=arguments.max_length,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )
    _check_launch(arguments, len(examples))
    model = load_model(arguments.model_name_or_path, arguments.dtype).train()
    check_window(arguments.max_length, model)
    disable_dropout(model)
    trainer = SftTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=PadRight(terminator_id(prompt_format.name, tokenizer)),
    )
    if trainer.is_deepspeed_enabled != (arguments.deepspeed is not None):
        raise UserError("the launcher and --deepspeed disagree on whether DeepSpeed is used.")
    callback = SnapshotCallback(run_dir / "weights", arguments.snapshot_steps, tokenizer)
    callback.trainer = trainer
    trainer.add_callback(callback)
    if arguments.probe_steps is not None:
        probe = _probe(arguments, run_dir, tokenizer)
        probe.trainer = trainer
        trainer.add_callback(probe)
    if arguments.should_save:
        _claim(run_dir, request)
        _log_plan(arguments, examples)
    trainer.train()
    return {
        **_run_columns(arguments, run_dir),
        "probe_set": _absolute(arguments.probe_set),
        "prompt_format": prompt_format.name,
        "prompt_format_source": arguments.prompt_format or probe_set.prompt_format,
        "terminator_id": terminator_id(prompt_format.name, tokenizer),
        "max_length": arguments.max_length,
        "num_examples": len(examples),
        "num_cut_prompts": examples.num_cut_prompts,
        "dropped": [vars(drop) for drop in examples.dropped],
        "doc_ids": examples.doc_ids,
        "snapshot_steps": callback.steps,
        "arguments": arguments.to_dict(),
        "versions": _versions(),
        "git_revision": _git_revision(),
    }


def _run_columns(arguments: SftArguments, run_dir: Path) -> dict[str, Any]:
    return {
        "run": run_dir.resolve().name,
        "model": arguments.model_name_or_path,
        "train_category": arguments.train_category,
        "order_seed": arguments.data_seed if arguments.data_seed is not None else arguments.seed,
    }


def _probe(arguments: SftArguments, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> ProbeCallback:
    return ProbeCallback(
        arguments.probe_set,
        out=run_dir,
        steps=str(arguments.probe_steps),
        num_train=arguments.probe_train,
        prompt_format=arguments.prompt_format,
        max_length=arguments.max_length,
        tokenizer=tokenizer,
        columns=_run_columns(arguments, run_dir),
    )


def disable_dropout(model: PreTrainedModel) -> None:
    """Sets every dropout probability to zero, so that a run depends on its data order alone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _is_complete(run_dir: Path, request: dict[str, Any]) -> bool:
    """True for a finished run of the same request. Raises `UserError` where the directory is not free for it."""
    for name in ("manifest.json", "started.json"):
        if not (run_dir / name).exists():
            continue
        earlier = read_json(run_dir / name)
        earlier = earlier["request"] if name == "manifest.json" else earlier
        if earlier != request:
            raise UserError(
                f"{run_dir} holds another run ({_difference(earlier, request)}). Choose another --output_dir."
            )
        if name == "manifest.json":
            return True
    if (run_dir / "weights").exists() and not (run_dir / "started.json").exists():
        raise UserError(f"{run_dir} holds weights of another origin. Choose another --output_dir.")
    return False


def _claim(run_dir: Path, request: dict[str, Any]) -> None:
    """Notes the request once all of it is known to be sound, and clears what a killed attempt at it left behind."""
    if (run_dir / "started.json").exists():
        log.info("an earlier attempt in %s was cut off; training starts again", run_dir)
        shutil.rmtree(run_dir / "weights", ignore_errors=True)
    write_json(run_dir / "started.json", request)


def _difference(earlier: dict[str, Any], request: dict[str, Any]) -> str:
    if earlier["probe_set_sha256"] != request["probe_set_sha256"]:
        return "the probe set has changed"
    old, new = earlier["flags"], request["flags"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"--{name}: {old.get(name, 'unset')} there, {new.get(name, 'unset')} now" for name in names)


def _check_launch(arguments: SftArguments, num_examples: int) -> None:
    world_size = arguments.world_size
    if world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(f"the launcher asked for {os.environ['WORLD_SIZE']} processes, but {world_size} take part.")
    if is_deepspeed_zero3_enabled():
        raise UserError("ZeRO stage 3 is not supported yet: its snapshots would be empty. Use stage 1 or 2.")
    rows = world_size * arguments.per_device_train_batch_size
    if world_size > 1 and num_examples % rows and not arguments.dataloader_drop_last:
        raise UserError(
            f"{num_examples} examples do not fill batches of {rows} ({world_size} processes), so some would be shown "
            "twice. Choose another --per_device_train_batch_size or --dataloader_drop_last true."
        )


def _log_plan(arguments: SftArguments, examples: TrainingExamples) -> None:
    for drop in examples.dropped:
        log.warning("not trained on: %s: %s", drop.doc_id, drop.reason)
    log.info(
        "training on %d examples of `%s` (%d dropped, %d prompts cut); snapshots at steps %s",
        len(examples),
        arguments.train_category,
        len(examples.dropped),
        examples.num_cut_prompts,
        arguments.snapshot_steps,
    )


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        name: version(name) for name in ("sft-probe", "torch", "transformers", "accelerate", "deepspeed", "lm_eval")
    }


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return result.stdout.strip() or None


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
