"""The commands that bring in runs from elsewhere: import, published. Heavy imports wait until one
runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sft_probe.options import Command, Positional


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Make a run of results that were published or exported, and say what was taken for what.

    Reads prob_train_metrics.json of the Learning-Dynamics code, with the log-probs of docs in the
    .npy beside it; results of lm-eval, of versions before 0.4 too; CSVs of means, and wide ones of
    benchmarks; logs of preference training (trainer_state.json, W&B as CSV or JSONL).
    analyze, plot and report read the run like any other.

    Examples:
        sft-probe import exp_results/pythia410m_dpo --texts probe_train.jsonl --out runs/dpo
        sft-probe import evals/pythia-v1/pythia-70m/zero-shot --out runs/pythia-70m
    """

    path: Positional[Annotated[Path, "PATH"]]
    """A file or a directory."""
    out: Annotated[Path, "DIR"]
    """Directory of the run; of several models, that of their runs."""
    texts: Annotated[Path | None, "FILE"] = None
    """JSONL file with the prompt and the responses of each doc of a .npy, in its order: docs that
    share a response are then one cluster."""

    def execute(self) -> None:
        """Write the run, or one for each model, and print what was taken for what."""
        from sft_probe.analysis.stats.imports.store import import_to

        for text in import_to(self.path, self.out, self.texts):
            print(text)  # noqa: T201
