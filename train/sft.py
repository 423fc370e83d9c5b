"""Supervised fine-tuning on one category or a mixture, with snapshots, live probe and exact resume.

Run as: sft-probe train --config quickstart --output_dir runs/mine
    or: torchrun --nproc_per_node 2 -m sft_probe.train.sft --config quickstart --output_dir runs/two
    or: deepspeed --module sft_probe.train.sft --config quickstart --output_dir runs/all-gpus
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, set_seed

from sft_probe.command_line import log_written, write_config
from sft_probe.errors import UserError, doing, exit_on_user_error, quiet
from sft_probe.files import make_dir, write_json
from sft_probe.malloc import keep_freed_memory
from sft_probe.models import load_tokenizer
from sft_probe.probe_set import Doc, ProbeSet
from sft_probe.prompts import (
    DroppedDoc,
    PromptFormat,
    dropped_by_faults,
    resolve_format,
    terminator_id,
)
from sft_probe.synth.splits import with_random
from sft_probe.train import plan, run_dir
from sft_probe.train.arguments import SftArguments, as_user_error, parse_arguments
from sft_probe.train.checks import check_inputs
from sft_probe.train.examples import (
    PadRight,
    TrainingExamples,
    assign,
    build_examples,
    describe_first,
    read_docs,
    sha256_of_source,
    without_heldout,
)
from sft_probe.train.model import PrecisionCallback, load_trained_model, model_version
from sft_probe.train.options import PROG, expand, given_options, mixture_of
from sft_probe.train.preference import (
    PreferenceTrainer,
    preference_loss,
    reference_logprobs,
    reference_sha256,
)
from sft_probe.train.probe import ProbeCallback
from sft_probe.train.run_dir import STOPPED_EXIT_CODE, ResumeCallback, latest_state
from sft_probe.train.snapshots import SnapshotCallback, parent_of
from sft_probe.train.trainer import (
    FiniteTrainer,
    LossLog,
    NonFiniteLossError,
    save_last_good_step,
    weights_are_finite,
)

log = logging.getLogger("sft_probe.train")

Inputs = tuple[PreTrainedTokenizerBase, PromptFormat, TrainingExamples]


def main(argv: list[str], probe_set: ProbeSet | None = None) -> None:
    """Train as the flags say; do nothing if the run is already complete.

    Args:
        argv: the flags.
        probe_set: the one that the flags name, if it is read already.

    Raises:
        UserError: bad flags or data, or a run directory that holds something else.
        SystemExit: with `STOPPED_EXIT_CODE` if the run stopped early, with a state.
    """
    quiet()
    if probe_set is None:  # before anything is compiled
        probe_set = check_inputs(expand(argv))
    arguments, asked = parse_arguments(argv)
    inputs = load_inputs(arguments, probe_set)
    _check_launch(arguments, len(inputs[-1]))
    if arguments.dry_run:
        text = plan.describe(arguments, probe_set, *inputs)
        if arguments.should_log:
            print(text)  # noqa: T201
        return
    folder = make_dir(Path(str(arguments.output_dir)))
    with run_dir.lock_run(folder) if arguments.should_save else nullcontext():
        config = given_options(expand(argv))
        stopped = _train_unless_complete(arguments, asked, probe_set, inputs, folder, config=config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if stopped:
        raise SystemExit(STOPPED_EXIT_CODE)


def load_inputs(arguments: SftArguments, probe_set: ProbeSet) -> Inputs:
    """Return all inputs that need no weights: their faults are found before the model loads.

    Raises:
        UserError: tokenizer, data, mixture or prompt format are unusable.
    """
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    docs, categories, dropped = _train_docs(arguments, probe_set)
    prompt_format = _resolve_format(arguments, tokenizer, probe_set, docs)
    shares = mixture_of(
        arguments.objective,
        arguments.train_category,
        categories,
        arguments.train_data or arguments.probe_set,
    )
    examples = build_examples(
        assign(docs, shares, arguments.seed),
        prompt_format,
        tokenizer,
        max_length=arguments.max_length,
        max_prompt_tokens=arguments.max_prompt_tokens,
        dropped=dropped,
        per_item=2 if arguments.objective == "dpo" else 1,
    )
    return tokenizer, prompt_format, examples


def _resolve_format(
    arguments: SftArguments,
    tokenizer: PreTrainedTokenizerBase,
    probe_set: ProbeSet,
    docs: Sequence[Doc],
) -> PromptFormat:
    """Return the prompt format that all ranks, and every further attempt at this run, share."""
    given = arguments.prompt_format or probe_set.prompt_format
    recorded = run_dir.recorded_format(Path(str(arguments.output_dir)))
    found = resolve_format(given, tokenizer, [*probe_set.docs, *docs], recorded)
    (source,) = broadcast_object_list([found.source])  # each rank may have read another time
    return PromptFormat(source, tokenizer)


def _train_docs(
    arguments: SftArguments, probe_set: ProbeSet
) -> tuple[list[Doc], Sequence[str], list[DroppedDoc]]:
    """Return the docs to train on, their categories, and the docs left out."""
    if arguments.train_data is None:
        return probe_set.of_split("train"), probe_set.categories, dropped_by_faults(probe_set)
    docs, faulty = read_docs(
        arguments.train_data,
        prompt_column=arguments.prompt_column,
        response_column=arguments.response_column,
    )
    docs, twins = without_heldout(docs, probe_set.of_split("heldout"))
    if not docs:
        raise UserError(
            f"{arguments.train_data}: no row can be trained on. {describe_first([*faulty, *twins])}"
        )
    if "random" in arguments.train_category:
        docs = with_random(docs, arguments.seed)
    return docs, tuple(docs[0].responses), [*faulty, *twins]


def _train_unless_complete(
    arguments: SftArguments,
    asked: dict[str, str],
    probe_set: ProbeSet,
    inputs: Inputs,
    folder: Path,
    *,
    config: dict[str, Any],
) -> bool:
    """Train what is not complete, and return whether it stopped early.

    The first rank alone looks at what an earlier attempt has left, and writes `config.yaml`.
    """
    tokenizer, prompt_format, _ = inputs
    request: dict[str, Any] = {}
    if arguments.should_save:
        request = run_dir.request_of(
            asked, arguments.world_size, **contents_of(arguments, probe_set, inputs)
        )
    (is_complete,) = broadcast_object_list(
        [arguments.should_save and run_dir.is_complete(folder, request)]
    )
    if arguments.should_save and not is_complete:
        write_config(folder / "config.yaml", PROG, config)
        for drop in plan.find_unscorable(probe_set, prompt_format, tokenizer, arguments.max_length):
            log.warning("held out, but cannot be scored: %s: %s", drop.doc_id, drop.reason)
    if is_complete:
        log.info("the run in %s is complete", folder)
    else:
        manifest = train(arguments, probe_set, inputs, folder, request)
        if manifest is None:
            return True
        if arguments.should_save:
            write_json(folder / "manifest.json", {"request": request, "argv": sys.argv, **manifest})
    if arguments.should_save:
        run_dir.finish_run(folder)
        log_written([folder], f"sweep {folder}")
    return False


def contents_of(
    arguments: SftArguments, probe_set: ProbeSet, inputs: Inputs
) -> dict[str, str | None]:
    """Return what a run is made from beside its flags: hashes of data and files, and the format."""
    _, prompt_format, examples = inputs
    return {
        "probe_set_sha256": probe_set.sha256,
        "train_data_sha256": sha256_of_source(arguments.train_data),
        "deepspeed_config_sha256": run_dir.sha256_text(arguments.deepspeed),
        "model_version": model_version(arguments.model_name_or_path),
        "prompt_format": prompt_format.name,
        "encoded_data_sha256": examples.sha256,
    }


def train(
    arguments: SftArguments,
    probe_set: ProbeSet,
    inputs: Inputs,
    folder: Path,
    request: dict[str, Any],
) -> dict[str, Any] | None:
    """Run the training and return the manifest's content; `None` if it stopped early."""
    with as_user_error():
        set_seed(arguments.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    tokenizer, prompt_format, examples = inputs
    end_id = terminator_id(prompt_format.name, tokenizer)
    kind: Callable[..., FiniteTrainer] = FiniteTrainer
    is_preference = arguments.objective == "dpo"
    if is_preference:
        reference = reference_logprobs(arguments, tokenizer, examples, folder)
        preference = preference_loss(arguments)
        kind = partial(PreferenceTrainer, preference=preference, reference=reference)
    trainer, precision = make_trainer(arguments, examples, end_id, kind)
    state = latest_state(folder)
    losses = LossLog(folder, trainer, examples, _run_columns(arguments, folder))
    known = {
        **losses.columns,
        "prompt_format": prompt_format.name,
        "prompt_format_source": prompt_format.source,
        "terminator_id": end_id,
        **_about(arguments, probe_set, examples),
    }
    snapshots = SnapshotCallback(
        folder / "weights", arguments.snapshot_steps, arguments.snapshot_dtype, tokenizer, losses
    )
    resume = ResumeCallback(
        losses,
        state,
        resume_steps=arguments.resume_steps,
        max_wall_time_s=arguments.max_wall_time_s,
    )
    probes = (
        [_probe(arguments, tokenizer, prompt_format.source, losses)]
        if arguments.probe_steps
        else []
    )
    for callback in (losses, snapshots, *probes, resume):  # in this order at the end of each step
        trainer.add_callback(callback)
    with as_user_error():
        needed = plan.plan_run(arguments, trainer, trainer.model)
    if arguments.should_save:  # no other rank may walk a directory that this one clears
        plan.check_disk(needed, folder)
        _log_plan(arguments, examples, run_dir.begin_run(folder, request))
        write_json(folder / run_dir.BEGUN, {"request": request, **known})
    try:
        _run(trainer, losses, precision, state)
    except (UserError, KeyboardInterrupt):
        if arguments.should_save:
            run_dir.abandon_run(folder)
        raise
    if resume.stopped:
        log.warning(
            "stopped by %s at step %d. To resume, run the same command again.",
            resume.stopped,
            trainer.state.global_step,
        )
        return None
    if trainer.state.global_step < trainer.state.max_steps:
        raise UserError(
            f"training ended after step {trainer.state.global_step} of {trainer.state.max_steps}."
        )
    if arguments.should_save:
        losses.write_exposure()
        log.info("saving %d snapshots took %.1f s", len(snapshots.steps), snapshots.save_s())
    return {
        **precision.columns,
        **known,
        "snapshot_steps": snapshots.steps,
        "snapshot_save_s": round(snapshots.save_s(), 3),
        "noise_nats": trainer.noise_nats,
        **({"reference_sha256": reference_sha256(folder)} if is_preference else {}),
    }


Kind = TypeVar("Kind", bound=FiniteTrainer)


def make_trainer(
    arguments: SftArguments,
    examples: TrainingExamples,
    end_id: int,
    kind: Callable[..., Kind],
) -> tuple[Kind, PrecisionCallback]:
    """Load the model and return its trainer.

    Raises:
        UserError: the Trainer or the launcher refuses the flags.
    """
    model, precision = load_trained_model(arguments), PrecisionCallback(arguments.dtype)
    with as_user_error(), doing("setting up the trainer"):
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=PadRight(end_id),
            callbacks=[precision],
        )
    if trainer.is_deepspeed_enabled != (arguments.deepspeed is not None):
        raise UserError("the launcher and --deepspeed disagree on whether DeepSpeed is used.")
    return trainer, precision


def _run(
    trainer: FiniteTrainer, losses: LossLog, precision: PrecisionCallback, state: Path | None
) -> None:
    """Train to the end or to an early stop.

    Raises:
        UserError: the Trainer cannot be set up with these flags, or a loss or weight is no longer
            finite.
    """
    started_finite = weights_are_finite(trainer.model, trainer.args.device)
    try:
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    except NonFiniteLossError as error:
        raise save_last_good_step(trainer, losses, state) from error
    except Exception:
        if precision.columns:  # training had begun, so that no flag is to blame
            raise
        with as_user_error():
            raise
    if started_finite and not weights_are_finite(trainer.model, trainer.args.device):
        raise UserError(
            f"after step {trainer.state.global_step} some weights are NaN or infinite: the last "
            "update diverged. Lower --learning_rate."
        )


def _about(
    arguments: SftArguments, probe_set: ProbeSet, examples: TrainingExamples
) -> dict[str, Any]:
    return {
        "objective": arguments.objective,
        "parent": parent_of(arguments.model_name_or_path),
        "probe_set": probe_set.absolute_source,
        "train_data": arguments.train_data,
        "max_length": arguments.max_length,
        "num_examples": len(examples),
        "num_cut_prompts": examples.num_cut_prompts,
        "dropped": [vars(drop) for drop in examples.dropped],
        "doc_ids": [example.doc_id for example in examples.examples[:: examples.per_item]],
        "arguments": arguments.to_dict(),
        "versions": run_dir.versions(),
        "git_revision": run_dir.git_revision(),
    }


def _run_columns(arguments: SftArguments, folder: Path) -> dict[str, Any]:
    return {
        "run": folder.resolve().name,
        "model": arguments.model_name_or_path,
        "train_category": arguments.train_category,
        "order_seed": arguments.data_seed if arguments.data_seed is not None else arguments.seed,
    }


def _probe(
    arguments: SftArguments, tokenizer: PreTrainedTokenizerBase, format_source: str, losses: LossLog
) -> ProbeCallback:
    probe = ProbeCallback(
        arguments.probe_set,
        out=losses.run_dir,
        steps=str(arguments.probe_steps),
        num_train=arguments.probe_train,
        prompt_format=format_source,
        max_length=arguments.max_length,
        tokenizer=tokenizer,
        max_tokens=arguments.probe_max_tokens,
        columns=losses.columns,
    )
    probe.trainer = losses.trainer
    probe.totals = losses.totals
    return probe


def _check_launch(arguments: SftArguments, num_examples: int) -> None:
    world_size = arguments.world_size
    if world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            f"the launcher was asked for {os.environ['WORLD_SIZE']} processes, but {world_size} "
            "take part."
        )
    rows = world_size * arguments.per_device_train_batch_size
    if arguments.dataloader_drop_last and num_examples < rows:
        raise UserError(
            f"{num_examples} examples do not fill one batch of {rows}, and --dataloader_drop_last "
            "drops it."
        )
    if world_size > 1 and num_examples % rows and not arguments.dataloader_drop_last:
        raise UserError(
            f"{num_examples} examples do not fill batches of {rows} ({world_size} processes), so "
            "some would be shown twice. Choose another --per_device_train_batch_size or "
            "--dataloader_drop_last true."
        )


def _log_plan(arguments: SftArguments, examples: TrainingExamples, resumption: str | None) -> None:
    if resumption:
        log.info(resumption)
    for drop in examples.dropped:
        log.warning("not trained on: %s: %s", drop.doc_id, drop.reason)
    log.info(
        "training on %d %s (%d dropped, %d prompts cut); snapshots at steps %s",
        len(examples),
        arguments.data_name,
        len(examples.dropped),
        examples.num_cut_prompts,
        arguments.snapshot_steps,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
