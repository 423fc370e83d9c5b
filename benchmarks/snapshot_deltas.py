"""How small a lossless delta between neighbouring snapshots gets: zstd on the XOR of their bytes,
planes apart.

Run as: python benchmarks/snapshot_deltas.py RUN...      runs with snapshots; pip install zstandard
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import zstandard
from safetensors.numpy import load_file

from sft_probe.files import read_json


def main(runs: list[str]) -> None:
    """Prints a line for each pair of neighbouring snapshots."""
    print(
        f"{'run':<24}{'lr':>8}{'steps':>12}{'equal':>9}{'snapshot':>10}{'delta':>10}  of "
        f"{'the size':<9}"
    )
    for run in map(Path, runs):
        folders = sorted((run / "weights").glob("step_*"))
        lr = read_json(run / "manifest.json")["arguments"]["learning_rate"]
        for before, after in itertools.pairwise(folders):
            size, delta, equal = compare(before, after)
            steps = f"{int(before.name[5:])}-{int(after.name[5:])}"
            print(
                f"{run.name:<24}{lr:>8g}{steps:>12}{equal:>9.1%}{size / 2**20:>6.0f} "
                f"MiB{delta / 2**20:>6.1f} MiB  "
                f"{delta / size:>10.1%}"
            )


def compare(before: Path, after: Path) -> tuple[int, int, float]:
    """Bytes of a snapshot, of its compressed XOR with the one before, and the share of equal
    weights."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    compressor = zstandard.ZstdCompressor(level=3)
    size = delta = num_equal = num_weights = 0
    for name, weights in new.items():
        one, two = (
            np.ascontiguousarray(tensor).view(np.uint8).reshape(weights.size, -1)
            for tensor in (old[name], weights)
        )
        xor = one ^ two
        size += xor.size
        # sign and exponent stand in one byte of each number: byte planes compress where whole
        # numbers do not
        delta += len(compressor.compress(np.ascontiguousarray(xor.T).tobytes()))
        num_equal += int((~xor.any(axis=1)).sum())
        num_weights += weights.size
    return size, delta, num_equal / num_weights


if __name__ == "__main__":
    main(sys.argv[1:])
