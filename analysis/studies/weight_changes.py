"""Where the weights moved: how far, in how many directions, and whether their main one turned.

Read from the snapshots of a run alone. The effective rank is that of Roy & Vetterli (EUSIPCO 2007).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from scipy.sparse.linalg import eigsh

from sft_probe.adapters import load_adapter
from sft_probe.analysis.sweep.checkpoints import Checkpoint, snapshots_of_run
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text
from sft_probe.weights import ADAPTER_CONFIG, weight_files

_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
_KINDS = (
    ("norm", re.compile(r"norm|\bln_|\.ln\d")),
    ("embedding", re.compile(r"embed|\bwte\b|\bwpe\b|lm_head")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|dense|experts|\bfc\d")),
)


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Return the layer that a parameter belongs to, if any, and its kind by its name.

    Kinds are attention, mlp, norm, embedding (input and output) and other.
    """
    found = _LAYER.search(f".{name}")
    kind = next((kind for kind, pattern in _KINDS if pattern.search(name.lower())), "other")
    return int(found.group(1)) if found else None, kind


@dataclass(frozen=True)
class _Top:
    """Main direction of a matrix: its top left and right singular vectors."""

    left: np.ndarray
    right: np.ndarray


def weight_changes(run: Path) -> pd.DataFrame:
    """Measure how each parameter differs from the first snapshot, at every later one.

    Returns:
        A row per step and parameter: `step`, `parameter`, `layer` (absent outside of layers),
        `kind`, `num_weights`, `norm` (of the first snapshot), `change_norm` (both Frobenius),
        `relative_change`, their ratio; for matrices also `effective_rank`, the exponential of the
        entropy of the change's singular values, each divided by their sum, and `angle_degrees`
        between the top singular vectors before and after, the larger of left and right.

    Raises:
        UserError: the run has fewer than two snapshots that can be read, or they do not hold the
            same parameters.
    """
    checkpoints, problems = snapshots_of_run(run)
    if len(checkpoints) < 2:
        raise UserError(
            f"{run} has {len(checkpoints)} snapshots that can be read; two are needed. "
            f"{' '.join(problems)}".rstrip()
        )
    first, *later = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    tops: dict[str, _Top] = {}
    rows = [row for checkpoint in later for row in _compare(first, checkpoint, tops)]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def by_layer(changes: pd.DataFrame) -> pd.DataFrame:
    """Sum the changes of all parameters of one layer and kind: a row per step, layer and kind.

    Squared norms are summed, so that `relative_change` is that of all these parameters together.
    """
    squared = changes.assign(norm=changes["norm"] ** 2, change_norm=changes["change_norm"] ** 2)
    keys = ["step", "layer", "kind"]
    sums = squared.groupby(keys, dropna=False, sort=True)[["num_weights", "norm", "change_norm"]]
    table = sums.sum().reset_index()
    table[["norm", "change_norm"]] = table[["norm", "change_norm"]] ** 0.5
    return table.assign(relative_change=_ratio(table["change_norm"], table["norm"]))


def _compare(
    first: Checkpoint, later: Checkpoint, tops: dict[str, _Top]
) -> Iterator[dict[str, object]]:
    """Yield a row for each parameter; fills `tops` with the first snapshot's main directions."""
    nothing = ("nothing", torch.empty(0))
    for (name, before), (other, after) in zip_longest(
        _tensors(Path(first.model)), _tensors(Path(later.model)), fillvalue=nothing
    ):
        if name != other or before.shape != after.shape:
            raise UserError(
                f"{later.model} does not hold the parameters of {first.model}: {other} "
                f"{list(after.shape)} stands where {name} {list(before.shape)} was."
            )
        layer, kind = layer_and_kind(name)
        change = after.double() - before.double()
        norm, change_norm = float(before.double().norm()), float(change.norm())
        yield {
            "step": later.step,
            "parameter": name,
            "layer": layer,
            "kind": kind,
            "num_weights": before.numel(),
            "norm": norm,
            "change_norm": change_norm,
            "relative_change": change_norm / norm if norm else math.nan,
            **(_spectrum(name, before, after, change, tops) if before.dim() == 2 else {}),
        }


def _spectrum(
    name: str,
    before: torch.Tensor,
    after: torch.Tensor,
    change: torch.Tensor,
    tops: dict[str, _Top],
) -> dict[str, float]:
    if name not in tops:
        tops[name] = _top(before.double())
    start, end = tops[name], _top(after.double())
    angles = [_angle(start.left, end.left), _angle(start.right, end.right)]
    return {"effective_rank": effective_rank(change), "angle_degrees": max(angles)}


def effective_rank(matrix: torch.Tensor) -> float:
    """Return exp(entropy) of a matrix's singular values divided by their sum; NaN of zeros.

    Args:
        matrix: float64 [rows, columns]. Singular values are square roots of the eigenvalues of the
            smaller Gram matrix, so that a tall matrix costs what its width does.
    """
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    if total == 0:
        return math.nan
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def _top(matrix: torch.Tensor) -> _Top:
    """Return the top singular vectors of a float64 matrix, by Lanczos on its Gram matrix."""
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if is_wide else matrix).numpy()
    gram = tall.T @ tall
    if len(gram) == 1:
        narrow = np.ones(1)
    else:
        _, vectors = eigsh(gram, k=1, v0=np.ones(len(gram)))
        narrow = vectors[:, 0]
    long = tall @ narrow
    long = long / (np.linalg.norm(long) or 1.0)
    return _Top(left=narrow, right=long) if is_wide else _Top(left=long, right=narrow)


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    """Return the angle between two lines in degrees: singular vectors have no sign."""
    sine = np.linalg.norm(other - one * (one @ other))
    return math.degrees(math.atan2(sine, abs(one @ other)))


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of each parameter of a snapshot, by name; adapters merged into their
    base."""
    if (folder / ADAPTER_CONFIG).exists():
        yield from _merged(folder)
        return
    files = {name: path for path in weight_files(folder) for name in _names(path)}
    for name in sorted(files):
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _merged(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    model = load_adapter(folder, "float32").merge_and_unload()
    tensors = dict(model.named_parameters())
    for name in sorted(tensors):
        yield name, tensors[name].detach()


def _ratio(part: pd.Series, whole: pd.Series) -> pd.Series:
    return part / whole.where(whole > 0)


def write_weight_changes(changes: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `weights.csv` and `weights_by_layer.csv`; return the paths."""
    make_dir(folder)
    tables = {"weights": changes, "weights_by_layer": by_layer(changes)}
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return [folder / f"{name}.csv" for name in tables]
