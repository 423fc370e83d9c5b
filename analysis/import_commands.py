"""The commands that bring in runs from elsewhere: import, published. Heavy imports wait until one
runs."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sft_probe.command_line import log_written
from sft_probe.files import check_exists
from sft_probe.options import Command, Positional

log = logging.getLogger(__name__)


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

    def check(self) -> None:
        """Check that the files are there."""
        check_exists(self.path)
        if self.texts:
            check_exists(self.texts)

    def execute(self) -> None:
        """Write the run, or one for each model, and print what was taken for what."""
        from sft_probe.analysis.stats.imports.store import import_to

        for text in import_to(self.path, self.out, self.texts):
            print(text)  # noqa: T201


@dataclass(frozen=True, kw_only=True)
class PublishedList(Command):
    """List runs that others have published, with licence, address, size and SHA-256.

    Nothing of them is shipped with sft-probe.

    Examples:
        sft-probe published
        sft-probe published list --files pythia410m-dpo
    """

    files: Annotated[str | None, "NAME"] = None
    """List the files of one run."""

    def execute(self) -> None:
        """Print the list, or the files of one run."""
        from sft_probe.analysis.stats.imports.published import (
            files_text,
            list_text,
            published_run,
            published_runs,
        )

        text = list_text(published_runs())
        print(text if self.files is None else files_text(published_run(self.files)))  # noqa: T201


@dataclass(frozen=True, kw_only=True)
class PublishedGet(Command):
    """Download a published run, check it, import it and draw it.

    A download stays in the cache. What has another size or SHA-256 than listed is not kept.

    Examples:
        sft-probe published get pythia410m-dpo
        sft-probe published get pythia-70m --out runs/pythia
    """

    name: Positional[Annotated[str, "NAME"]]
    """A run of `sft-probe published`."""
    out: Annotated[Path | None, "DIR"] = None
    """Directory of the run. Default: runs/NAME."""

    def execute(self) -> None:
        """Download, import and draw the run."""
        from sft_probe.analysis.stats.imports.published import download, published_run
        from sft_probe.analysis.stats.imports.store import import_to

        run = published_run(self.name)
        out = self.out or Path("runs") / run.name
        folder = download(run)
        for text in import_to(folder, out, folder / run.texts if run.texts else None):
            print(text)  # noqa: T201
        _draw(out)


def _draw(run: Path) -> None:
    """Draw a run where the packages for figures are there."""
    try:
        from sft_probe.analysis.figures.figure import Style
        from sft_probe.analysis.figures.plot import plot
    except ImportError as error:
        log.info("no figures (%s): pip install 'sft-probe[report]'", error)
        return
    log_written(plot([run], style=Style(), formats=("png",)), f"report {run}")
