"""Train and held-out: disjoint by conversation, by near-duplicate prompts and by response."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sft_probe.errors import UserError
from sft_probe.records import Doc
from sft_probe.synth.hh import Pair
from sft_probe.synth.report import near_duplicates, prompt_text
from sft_probe.synth.sources import Rejected, SourcePair

DEFAULT_HELDOUT_FRAC = 0.2


def conversation_id(pair: Pair | Doc) -> str:
    """A hash of the conversation's root, its first user turn: HH holds one conversation at several depths."""
    root = next(turn["content"] for turn in pair.messages if turn["role"] == "user")
    return hashlib.sha256(root.encode()).hexdigest()[:12]


def clusters(pairs: Sequence[SourcePair]) -> list[int]:
    """For each pair the number of its cluster: one conversation, or prompts that are near-duplicates (transitively)."""
    first: dict[str, int] = {}  # equal prompts are compared with others once
    edges = [(first.setdefault(prompt_text(pair.messages), number), number) for number, pair in enumerate(pairs)]
    numbers = list(first.values())
    edges += [(numbers[i], numbers[j]) for i, j in near_duplicates(list(first))]
    roots: dict[str, int] = {}
    edges += [(roots.setdefault(conversation_id(pair), number), number) for number, pair in enumerate(pairs)]
    rows, columns = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(len(pairs), len(pairs)))
    return [int(label) for label in connected_components(graph, directed=False)[1]]


def split_pairs(pairs: list[SourcePair], heldout_frac: float | None, seed: int, rejected: Rejected) -> list[SourcePair]:
    """Gives every pair its split; whoever cannot be held out cleanly goes to `rejected`.

    Args:
        pairs: in the order they are kept in.
        heldout_frac: share of the pairs held out, by whole clusters; `None` takes the source's own splits where it has
            both, else 0.2.
        seed: of the draw of the clusters.
        rejected: gets the held-out pairs that share a conversation, a near-duplicate prompt or a response with train.

    Raises:
        UserError: one of the splits is empty.
    """
    labels = clusters(pairs)
    own = [pair.split for pair in pairs]
    if heldout_frac is None and {"train", "heldout"} <= set(own):
        splits = [split or "train" for split in own]
    else:
        held = _draw(labels, DEFAULT_HELDOUT_FRAC if heldout_frac is None else heldout_frac, seed)
        splits = ["heldout" if label in held else "train" for label in labels]
    trained_clusters = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    trained = [pair for pair, split in zip(pairs, splits, strict=True) if split == "train"]
    trained_texts = {text for pair in trained for text in (pair.chosen, pair.rejected)}
    kept = []
    for pair, label, split in zip(pairs, labels, splits, strict=True):
        if split == "heldout" and label in trained_clusters:
            rejected.add(pair, "held out, but its conversation or a near-duplicate of its prompt is in train")
        elif split == "heldout" and not trained_texts.isdisjoint((pair.chosen, pair.rejected)):
            rejected.add(pair, "held out, but a response of it is in train")
        else:
            kept.append(replace(pair, split=split))
    check_sizes([str(pair.split) for pair in kept], rejected)
    return kept


def check_sizes(splits: Sequence[str], rejected: Rejected) -> None:
    """Raises `UserError` where a split has fewer than the two docs that `random` needs."""
    for split in ("train", "heldout"):
        if splits.count(split) < 2:
            raise UserError(
                f"the split {split} has {splits.count(split)} usable docs and needs 2 or more. Left out: "
                f"{rejected.reasons()}. Mend what was left out most, take more rows (--limit), or another "
                "--heldout-frac."
            )


def _draw(labels: Sequence[int], heldout_frac: float, seed: int) -> set[int]:
    """Clusters whose pairs make up about `heldout_frac` of all; a cluster that would overshoot stays in train."""
    sizes = np.bincount(labels)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)  # noqa: S311 - reproducible, not secret
    target = round(heldout_frac * len(labels))
    held: set[int] = set()
    num_held = 0
    for label in order:
        if num_held + sizes[label] <= target:
            held.add(label)
            num_held += int(sizes[label])
    return held
