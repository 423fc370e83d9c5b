"""The first rule of draw, split and topics, by the place of a doc: kept for sets and stores that
were begun with it.

An appended row moved docs between the splits and gave others another topic, so that their texts
were asked for again.
"""

import itertools
import random
from collections.abc import Sequence

import numpy as np

from sft_probe.synth.sources import SourcePair


def draw_order(pairs: Sequence[SourcePair], seed: int) -> list[SourcePair]:
    """The pairs in a seeded order of their places."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - reproducible, not secret
    return shuffled


def held_clusters(labels: Sequence[int], heldout_frac: float, seed: int) -> set[int]:
    """Clusters whose pairs make up about `heldout_frac` of all; a cluster that would overshoot
    stays in train."""
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


def order_topics(parts: Sequence[Sequence[str]], seed: int) -> list[str]:
    """The topics in the order in which the docs take them, made of the first three lists."""
    topics = list(dict.fromkeys(" ".join(words) for words in itertools.product(*parts[:3])))
    random.Random(seed).shuffle(topics)  # noqa: S311 - reproducible, not secret
    return topics
