"""What the live probe costs in a run of 1000 steps: seconds of a step and of a probe, and the share
that follows.

Run as: python benchmarks/probe_cost.py [--probe_set SET] [--batch 16] [--steps 6] [--docs 20]
The share is for 12 probes of 100 docs; `--docs` are measured and scaled up.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from sft_probe import ProbeCallback
from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import PromptFormat, terminator_id
from sft_probe.train.examples import PadRight, assign, build_examples, parse_mixture
from sft_probe.train.trainer import SftTrainer


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops."""
        self.seconds.append(time.perf_counter() - self.start)


class TimedProbe(ProbeCallback):
    """A probe that measures itself."""

    seconds: list[float]

    def _probe(self, *args: Any) -> None:
        start = time.perf_counter()
        super()._probe(*args)
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Prints medians and the share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--probe_set", default="helpful-mini")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--docs", type=int, default=20)
    options = parser.parse_args()
    keep_freed_memory()
    set_seed(0)
    tokenizer, probe_set = load_tokenizer(options.model), load_probe_set(options.probe_set)
    docs = assign(
        probe_set.of_split("train"), parse_mixture("chosen", probe_set.categories, "set"), 0
    )
    examples = build_examples(
        docs, PromptFormat("hh"), tokenizer, max_length=1024, max_prompt_tokens=None, dropped=[]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SftTrainer(
            model=load_model(options.model, "float32").train(),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=1e-6,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                remove_unused_columns=False,
                disable_tqdm=True,
                dataloader_drop_last=True,
            ),
            train_dataset=examples,
            data_collator=PadRight(terminator_id("hh", tokenizer)),
        )
        probe = TimedProbe(
            options.probe_set, out=folder, steps="+2", prompt_format="hh", tokenizer=tokenizer
        )
        probe.seconds = []
        clock = Clock()
        trainer.add_callback(clock)
        probe.probe_set = probe_set
        trainer.add_callback(probe)
        trainer.add_callback(Limit(probe, options.docs))
        trainer.train()
    report(clock.seconds[1:], probe.seconds[1:], probe, options)


class Limit(TrainerCallback):
    """Cuts the probe down to a number of docs, once it has encoded them."""

    def __init__(self, probe: ProbeCallback, num_docs: int) -> None:
        self.probe, self.num_docs = probe, num_docs

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """After the probe's own."""
        self.probe.docs = self.probe.docs[: self.num_docs]


def report(steps: list[float], probes: list[float], probe: ProbeCallback, options: Any) -> None:
    """Prints the table."""
    step_s, probe_s = statistics.median(steps), statistics.median(probes)
    num_docs = len(probe.docs)
    share = 12 * probe_s * 100 / num_docs / (1000 * step_s)
    print(f"{options.model}, float32, {torch.get_num_threads()} threads, {options.probe_set}")
    print(f"a step at batch {options.batch}     {step_s:7.2f} s  (median of {len(steps)})")
    print(
        f"a probe of {num_docs} docs x {len(probe.probe_set.categories)}   {probe_s:7.2f} s  "
        f"(median of {len(probes)})"
    )
    print(f"12 probes of 100 docs in 1000 steps: {share:.1%} of the training")


if __name__ == "__main__":
    main()
