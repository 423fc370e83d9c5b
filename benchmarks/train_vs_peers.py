"""Response tokens per second of this driver, of plain `transformers.Trainer` and of TRL's
SFTTrainer, in turns.

The same model, docs, order of batches, mask, optimizer and number of steps; snapshots and probe
off, no DeepSpeed. This driver runs with what a real run adds at each step: the loss log, and the
check for an early stop.

Run as: python benchmarks/train_vs_peers.py [--docs 48] [--batch 4] [--repeats 3] [--probe_set SET]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, terminator_id
from sft_probe.train.examples import (
    PadRight,
    TrainingExamples,
    assign,
    build_examples,
    parse_mixture,
)
from sft_probe.train.run_dir import ResumeCallback
from sft_probe.train.trainer import LossLog, SftTrainer


class Clock(TrainerCallback):
    """Seconds from the end of the first step, which warms up, to the end of the last."""

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Notes the time."""
        if state.global_step == 1:
            self.start = time.perf_counter()
        self.stop = time.perf_counter()


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--probe_set", default="helpful-mini")
    parser.add_argument("--docs", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(options.model)
    probe_set = load_probe_set(options.probe_set)
    docs = assign(
        probe_set.of_split("train")[: options.docs],
        parse_mixture("chosen", probe_set.categories, "set"),
        0,
    )
    examples = build_examples(
        docs, PromptFormat("hh"), tokenizer, max_length=1024, max_prompt_tokens=None, dropped=[]
    )
    makers = {"sft-probe": ours, "transformers.Trainer": plain, "trl.SFTTrainer": trl}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(options.repeats):
        for name, make in makers.items():
            seconds[name].append(run(make, options, tokenizer, examples))
    num_tokens = sum(example.num_tokens for example in examples.examples)
    prompts = sum(len(example.input_ids) for example in examples.examples) - num_tokens
    print(
        f"{len(examples)} docs, {prompts} prompt tokens, {num_tokens} response tokens, batches of "
        f"{options.batch}"
    )
    print(
        f"{torch.get_num_threads()} threads, float32, {options.model}, medians of {options.repeats}"
    )
    mine = statistics.median(seconds["sft-probe"])
    share = 1 - options.batch / len(examples)  # about what the steps after the first hold
    for name, times in seconds.items():
        middle = statistics.median(times)
        low, high = min(times), max(times)
        rate = num_tokens * share / middle
        print(
            f"{name:<22}{rate:8.1f} response tokens/s  {middle:7.2f} s [{low:.2f}, {high:.2f}]  "
            f"{middle / mine:5.2f}x"
        )


def run(make: Any, options: Any, tokenizer: Any, examples: TrainingExamples) -> float:
    """Seconds of one epoch but for its first step."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": str(Path(folder)),
            "num_train_epochs": 1,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-6,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "disable_tqdm": True,
            "bf16": False,
        }
        trainer = make(load_model(options.model, "float32").train(), arguments, tokenizer, examples)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return clock.stop - clock.start


def ours(
    model: Any, arguments: dict[str, Any], tokenizer: Any, examples: TrainingExamples
) -> Trainer:
    """This driver's trainer, with the callbacks that every run has."""
    trainer = SftTrainer(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=examples,
        data_collator=PadRight(terminator_id("hh", tokenizer)),
    )
    losses = LossLog(Path(arguments["output_dir"]), trainer, examples, {"run": "benchmark"})
    trainer.add_callback(losses)
    trainer.add_callback(ResumeCallback(losses, None, resume_steps=None, max_wall_time_s=None))
    return trainer


def plain(
    model: Any, arguments: dict[str, Any], tokenizer: Any, examples: TrainingExamples
) -> Trainer:
    """Transformers' own, with the same collator."""
    pad = PadRight(terminator_id("hh", tokenizer))

    def collate(items: Any) -> dict[str, Any]:
        batch = pad(items)
        del batch["example_index"]
        return batch

    data: Any = examples
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=data,
        data_collator=collate,
    )


def trl(
    model: Any, arguments: dict[str, Any], tokenizer: Any, examples: TrainingExamples
) -> Trainer:
    """TRL's, on the same ids and mask."""
    rows = [
        {
            "input_ids": example.input_ids,
            "completion_mask": [int(label >= 0) for label in example.labels],
        }
        for example in examples.examples
    ]
    config = SFTConfig(**arguments, max_length=None, completion_only_loss=True)
    return SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


if __name__ == "__main__":
    main()
