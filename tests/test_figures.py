"""The figure: drawn, complete, and honest about what it shows."""

import shutil
from pathlib import Path

from helpers import Run, user_error

from sft_probe.records import CATEGORIES


def test_figure_in_three_formats(swept_run: Path, sft_probe: Run, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    result = sft_probe("plot", run)
    assert result.returncode == 0, result.stderr
    figures = run / "figures"
    assert sorted(path.name for path in figures.iterdir()) == [
        f"trajectory_heldout.{kind}" for kind in ("pdf", "png", "svg")
    ]
    assert (figures / "trajectory_heldout.png").read_bytes().startswith(b"\x89PNG")
    assert (figures / "trajectory_heldout.pdf").read_bytes().startswith(b"%PDF")
    svg = (figures / "trajectory_heldout.svg").read_text()
    for words in (
        *CATEGORIES,
        "nats per response",
        "optimizer step",
        "32 held-out prompts",
        "no evidence",
        "of one run",
    ):
        assert words in svg, words


def test_a_run_that_was_not_swept(sft_probe: Run, tmp_path: Path) -> None:
    assert "sft-probe sweep" in user_error(sft_probe("plot", tmp_path))


def test_help_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sft_probe.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in result.stdout
    assert result.stdout.strip().endswith("[]")
