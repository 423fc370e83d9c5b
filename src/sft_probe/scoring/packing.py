"""Token trees: many continuations in one sequence, every distinct prefix computed once. Plain
numpy.

The sequences of a pack are sorted, so that neighbours share the most; a token that two of them
share at the same place is one node. A node's position is its depth, and it sees its ancestors and
itself. A prompt that categories share, a few-shot header that docs share and sentences that differ
in the last word alone (BLiMP) are one and the same case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Continuation(NamedTuple):
    """One continuation to score: token ids, none of them empty."""

    prefix_ids: Sequence[int]
    continuation_ids: Sequence[int]
    terminator_id: int | None = None
    """Scored after the continuation, apart from it."""

    @property
    def input_ids(self) -> list[int]:
        """What the model must read: the last token only where something is predicted from it."""
        ids = [*self.prefix_ids, *self.continuation_ids]
        return ids if self.terminator_id is not None else ids[:-1]

    @property
    def target_ids(self) -> list[int]:
        """What is predicted: continuation, then terminator."""
        return [
            *self.continuation_ids,
            *([] if self.terminator_id is None else [self.terminator_id]),
        ]


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A forest of token trees as one sequence of L tokens."""

    items: list[int]
    """Indices of its items, in the order of `rows`."""
    token_ids: IntArray
    """[L]"""
    position_ids: IntArray
    """[L], counted from the start of each item."""
    mask: npt.NDArray[np.bool_] | None
    """[L, L], True where row i sees column j; `None` for one plain causal sequence."""
    rows: list[IntArray]
    """Per item: the nodes from which its targets are predicted."""


def pack_shared(items: Sequence[Continuation], max_tokens: int) -> Iterator[Pack]:
    """Return packs of at most `max_tokens` tokens (more where one item alone is longer), in the
    order of the token ids.

    The items of one prefix stay together wherever they fit.
    """
    inputs = [item.input_ids for item in items]
    order = sorted(range(len(items)), key=inputs.__getitem__)
    shared = {i: _num_shared(inputs[before], inputs[i]) for before, i in pairwise(order)}
    pack: list[int] = []
    used = 0
    for _, group in groupby(order, key=lambda i: tuple(items[i].prefix_ids)):
        members = list(group)
        if pack and used + sum(len(inputs[i]) - shared[i] for i in members) > max_tokens:
            yield _build(items, inputs, pack)
            pack, used = [], 0
        for i in members:
            num_new = len(inputs[i]) - (shared[i] if pack else 0)
            if pack and used + num_new > max_tokens:
                yield _build(items, inputs, pack)
                pack, used, num_new = [], 0, len(inputs[i])
            pack.append(i)
            used += num_new
    if pack:
        yield _build(items, inputs, pack)


def pack_alone(items: Sequence[Continuation]) -> Iterator[Pack]:
    """Return one plain sequence per item, longest first."""
    inputs = [item.input_ids for item in items]
    for i in sorted(range(len(items)), key=lambda i: -len(inputs[i])):
        length = len(inputs[i])
        yield Pack(
            items=[i],
            token_ids=np.array(inputs[i]),
            position_ids=np.arange(length),
            mask=None,
            rows=[np.arange(len(items[i].prefix_ids) - 1, length)],
        )


def batches(packs: Sequence[Pack], max_tokens: int) -> Iterator[list[Pack]]:
    """Yield packs of like length that hold, padded to the longest, at most `max_tokens` tokens (or
    are a single one)."""
    batch: list[Pack] = []
    for pack in sorted(packs, key=lambda pack: -len(pack.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > max_tokens:
            yield batch
            batch = []
        batch.append(pack)
    if batch:
        yield batch


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def _build(items: Sequence[Continuation], inputs: Sequence[list[int]], members: list[int]) -> Pack:
    token_ids: list[int] = []
    position_ids: list[int] = []
    paths: list[tuple[int, IntArray]] = []
    path, previous = np.empty(0, np.int64), list[int]()
    for i in members:
        shared = _num_shared(previous, inputs[i])
        new = np.arange(len(token_ids), len(token_ids) + len(inputs[i]) - shared)
        path = np.concatenate([path[:shared], new])
        token_ids += inputs[i][shared:]
        position_ids += range(shared, len(inputs[i]))
        paths.append((shared, path))
        previous = inputs[i]
    mask = np.zeros((len(token_ids), len(token_ids)), dtype=bool)
    for shared, path in paths:
        if len(new := path[shared:]):
            mask[new[0] : new[-1] + 1, path[:shared]] = True
            mask[new[0] : new[-1] + 1, new[0] : new[-1] + 1] = np.tri(len(new), dtype=bool)
    return Pack(
        items=members,
        token_ids=np.array(token_ids),
        position_ids=np.array(position_ids),
        mask=mask,
        rows=[
            path[len(items[i].prefix_ids) - 1 :]
            for i, (_, path) in zip(members, paths, strict=True)
        ],
    )
