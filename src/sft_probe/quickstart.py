"""The demo: SFT of the embedded model on the embedded probe set, sweep, table and figure."""

import logging
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

from sft_probe.errors import UserError

log = logging.getLogger(__name__)


def quickstart(directory: Path) -> None:
    """Runs train, sweep and plot, each in a process of its own; what is complete is reused.

    Raises:
        UserError: one of them failed; its own message stands above.
    """
    recipe = Path(str(resources.files("sft_probe.data").joinpath("quickstart.yaml")))
    commands = [
        ["train", "--config", str(recipe), "--output_dir", str(directory)],
        ["sweep", str(directory)],
        ["plot", str(directory)],
    ]
    started = time.monotonic()
    for number, command in enumerate(commands, start=1):
        log.info("[%d/3] sft-probe %s", number, " ".join(command))
        code = subprocess.run([sys.executable, "-m", "sft_probe", *command], check=False).returncode
        if code != 0:
            raise UserError(
                f"`sft-probe {' '.join(command)}` failed with exit code {code}; nothing complete "
                "is lost."
            )
    log.info(
        "done in %.0f s\n  table:   %s\n  figure:  %s\n  scores:  %s",
        time.monotonic() - started,
        directory / "trajectory.csv",
        directory / "figures" / "trajectory_heldout.png",
        directory / "scores.parquet",
    )
