"""What is installed: a wheel and an sdist that hold everything, and scoring without the training
packages."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [
    "sft_probe/cli.py",
    "sft_probe/py.typed",
    "sft_probe/tasks/sft_probe_train_non_response.yaml",
    "sft_probe/tasks/_probe_template",
    "sft_probe/train/sft.py",
    "sft_probe/synth/output.py",
    "sft_probe/ds_configs/zero2.json",
    "sft_probe/recipes/quickstart.yaml",
    "sft_probe/data/helpful-mini/heldout.jsonl",
    "sft_probe/data/helpful-mini/probe_set.json",
]


@pytest.mark.slow
def test_wheel_and_sdist_hold_all_code_data_and_recipes(tmp_path: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        target = tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    # by way of the sdist, as pip would build it
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(tmp_path / "src"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in NEEDED if name not in in_wheel]
    with tarfile.open(sdist) as archive:
        in_sdist = archive.getnames()
    assert not [
        name for name in NEEDED if not any(path.endswith(f"src/{name}") for path in in_sdist)
    ]


def test_a_sweep_works_without_deepspeed_and_altair_installed(
    swept_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    shutil.rmtree(run / "sweep")
    (run / "trajectory.csv").unlink()
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['deepspeed', 'altair', 'vl_convert']));"
        f"from sft_probe.cli import main; main(['sweep', {str(run)!r}])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    pd.testing.assert_frame_equal(
        pd.read_csv(run / "trajectory.csv"), pd.read_csv(swept_run / "trajectory.csv")
    )
