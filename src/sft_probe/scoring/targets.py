"""Logits to numbers: what a model says of each target token, read from a few rows of logits at a
time.

Beside the log-prob of the target itself these are the log-prob of the most likely token, the
entropy, the rank of the target and the norm of the distribution; beside a second model, how far the
two distributions are from each other. All are sums and comparisons over logits that are in the
cache already, so that no second tensor of [rows, vocabulary] exists.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sft_probe.scoring.packing import IntArray

_PART_ROWS = {"cpu": 16}
"""Rows read at a time: so few stay in a CPU's cache from the first pass over them to the last."""
_PART_ROWS_OF_GPU = 256
_LOWEST = -1e4
"""Log-prob of what a model never says, since 0 times the -inf of two models would be NaN."""


class TokenColumns(NamedTuple):
    """What a model says of each of R tokens beside its log-prob; each array is [R]."""

    max_logprobs: npt.NDArray[np.float32]
    """Log-prob of the most likely token."""
    entropies: npt.NDArray[np.float32]
    """Entropy of the distribution over the vocabulary, in nats."""
    ranks: npt.NDArray[np.int32]
    """1 + the number of tokens with a higher logit."""
    norms: npt.NDArray[np.float32]
    """Euclidean norm of the vector of probabilities."""

    def between(self, start: int, stop: int) -> "TokenColumns":
        """Return the columns of the tokens from `start` to `stop`."""
        part = slice(start, stop)
        return TokenColumns(
            self.max_logprobs[part], self.entropies[part], self.ranks[part], self.norms[part]
        )


class Distances(NamedTuple):
    """How far a model is from a reference where each of R tokens stands; each array is [R]."""

    kl_forward: npt.NDArray[np.float32]
    """KL(reference || model) over the vocabulary, in nats."""
    kl_reverse: npt.NDArray[np.float32]
    """KL(model || reference)."""
    reference_ranks: npt.NDArray[np.int32]
    """Rank under the reference of the token that the model finds most likely: 1 is no shift."""

    def between(self, start: int, stop: int) -> "Distances":
        """Return the distances of the tokens from `start` to `stop`."""
        part = slice(start, stop)
        return Distances(self.kl_forward[part], self.kl_reverse[part], self.reference_ranks[part])


@dataclass(frozen=True, kw_only=True)
class TargetScores:
    """What a model says of Q targets; natural logarithms."""

    logprobs: npt.NDArray[np.float32]
    """[Q]"""
    greedy: npt.NDArray[np.bool_]
    """[Q], True where no token has a higher logit."""
    columns: TokenColumns | None
    """`None` where the log-probs alone were asked for."""
    distances: Distances | None = None
    """`None` without a reference."""


def read_targets(
    chunks: Iterable[torch.Tensor],
    row_of_target: IntArray,
    targets: IntArray,
    *,
    with_columns: bool,
    reference: Iterable[torch.Tensor] | None = None,
) -> TargetScores:
    """Read the scores of targets from chunks of logits [chunk, V]; float32 logits are overwritten.

    Args:
        chunks: every row of them predicts one target at least.
        row_of_target: [Q], counted over all chunks.
        targets: [Q], token ids.
        with_columns: False for the log-probs alone.
        reference: the logits of another model, in chunks of the same shapes.
    """
    order = np.argsort(row_of_target, kind="stable")
    sorted_rows = row_of_target[order]
    found, start = [], 0
    second: Iterable[torch.Tensor | None] = repeat(None) if reference is None else reference
    for logits, others in zip(chunks, second, strict=False):
        stop = start + len(logits)
        mine = slice(*np.searchsorted(sorted_rows, [start, stop]))
        found.append(
            _read_chunk(
                logits, others, sorted_rows[mine] - start, targets[order[mine]], with_columns
            )
        )
        start = stop
    back = np.argsort(order, kind="stable")
    logprobs, greedy, *more = (
        torch.cat(parts).cpu().numpy()[back] for parts in zip(*found, strict=True)
    )
    num_columns = len(TokenColumns._fields) if with_columns else 0
    columns, distances = more[:num_columns], more[num_columns:]
    return TargetScores(
        logprobs=logprobs,
        greedy=greedy,
        columns=TokenColumns(*columns) if columns else None,
        distances=Distances(*distances) if distances else None,
    )


def _read_chunk(
    logits: torch.Tensor,
    reference: torch.Tensor | None,
    rows: IntArray,
    targets: IntArray,
    with_columns: bool,
) -> tuple[torch.Tensor, ...]:
    """Return log-probs [Q], whether none is higher, and the fields of `TokenColumns` and
    `Distances`; `rows` [Q] are sorted."""
    device = logits.device
    row = torch.from_numpy(rows).to(device)
    target_logits = logits[row, torch.from_numpy(targets).to(device)].float()
    part_rows = _PART_ROWS.get(device.type, _PART_ROWS_OF_GPU)
    scratch = torch.empty(
        (min(part_rows, len(logits)) if with_columns else 0, logits.shape[1]), device=device
    )
    ranks, by_row, apart = [], [], []
    for start in range(0, len(logits), part_rows):
        values = logits[start : start + part_rows].float()
        if reference is not None:
            apart.append(_distances(values, reference[start : start + part_rows]))
        if with_columns:
            mine = slice(*np.searchsorted(rows, [start, start + part_rows]))
            ranks.append(_ranks(values, row[mine] - start, target_logits[mine], scratch))
            by_row.append(_statistics(values, scratch))
        else:
            by_row.append(_top_and_log_sum(values))
    top, log_sum, *others = (torch.cat(parts) for parts in zip(*by_row, strict=True))
    found = [target_logits - log_sum[row], target_logits == top[row]]
    if with_columns:
        entropies, norms = others
        found += [(top - log_sum)[row], entropies[row], torch.cat(ranks), norms[row]]
    return (*found, *(torch.cat(parts)[row] for parts in zip(*apart, strict=True)))


def _distances(
    values: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fields of `Distances` for each row, computed in float64."""
    new, old = (
        logits.double().log_softmax(dim=-1).clamp_(min=_LOWEST) for logits in (values, reference)
    )
    likeliest = old.gather(-1, new.argmax(dim=-1, keepdim=True))
    ranks = 1 + (old > likeliest).sum(dim=-1)
    rise = new - old
    forward, reverse = -(old.exp_() * rise).sum(dim=-1), (new.exp_() * rise).sum(dim=-1)
    # no divergence is below 0 but for rounding
    return forward.clamp_(min=0).float(), reverse.clamp_(min=0).float(), ranks.int()


def _ranks(
    values: torch.Tensor, row: torch.Tensor, target_logits: torch.Tensor, scratch: torch.Tensor
) -> torch.Tensor:
    """Return 1 + the number of higher logits in the row of each target; every row has one at
    least."""
    ranks = []
    # a row that predicts many targets is compared with a few of them at a time
    for start in range(0, len(row), len(values)):
        some = slice(start, start + len(values))
        mine = values if len(row) == len(values) else values[row[some]]
        # 0 and 1 as floats: a CPU adds these up three times as fast as booleans
        is_higher = torch.gt(mine, target_logits[some, None], out=scratch[: len(mine)])
        ranks.append(is_higher.sum(dim=-1).int() + 1)
    return torch.cat(ranks)


def _top_and_log_sum(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum and the log-sum-exp of each row; the values are overwritten."""
    top = values.amax(dim=-1)
    return top, values.sub_(top[:, None]).exp_().sum(dim=-1).log_() + top


def _statistics(values: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return maximum, log-sum-exp, entropy and norm of each row; the values are overwritten.

    With x = value - maximum and Z = sum(exp x), the entropy is log Z - sum(x exp x) / Z, two terms
    that are never negative, and the norm ||exp x|| / Z.
    """
    top = values.amax(dim=-1)
    # a logit of -inf has probability 0, but 0 times -inf would be NaN
    shifted = values.sub_(top[:, None]).clamp_(min=torch.finfo(values.dtype).min)
    weights = torch.exp(shifted, out=scratch[: len(shifted)])
    total = weights.sum(dim=-1)
    log_total = total.log()
    norm = torch.linalg.vector_norm(weights, dim=-1) / total
    entropy = log_total - shifted.mul_(weights).sum(dim=-1) / total
    return top, log_total + top, entropy, norm
