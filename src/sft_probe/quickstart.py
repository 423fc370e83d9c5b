"""The demo: SFT of the embedded model on the embedded probe set, sweep, table and figure."""

import logging
import time
from pathlib import Path

from sft_probe.errors import UserError, run_command

log = logging.getLogger(__name__)


def quickstart(directory: Path) -> None:
    """Run train, sweep and plot, each in a process of its own; what is complete is reused.

    Raises:
        UserError: one of them failed; its own message stands above.
    """
    commands = [
        ["train", "--config", "quickstart", "--output_dir", str(directory)],
        ["sweep", str(directory)],
        ["plot", str(directory), "--figures", "trajectory", "--format", "png"],
    ]
    started = time.monotonic()
    for number, command in enumerate(commands, start=1):
        log.info("[%d/3] sft-probe %s", number, " ".join(command))
        code = run_command(command)
        if code != 0:
            raise UserError(
                f"`sft-probe {' '.join(command)}` failed with exit code {code}; nothing complete "
                "is lost."
            )
    log.info(
        "done in %.0f s\n  table:   %s\n  figure:  %s\n  scores:  %s\nnext: sft-probe report %s",
        time.monotonic() - started,
        directory / "trajectory.csv",
        directory / "figures" / "trajectory_heldout.png",
        directory / "scores.parquet",
        directory,
    )
