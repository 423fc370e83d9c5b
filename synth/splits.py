"""Train and held-out: disjoint by conversation, by near-duplicate prompts and by response."""

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc
from sft_probe.synth import first_rule
from sft_probe.synth.duplicates import near_duplicates, prompt_text
from sft_probe.synth.hh import Pair
from sft_probe.synth.sources import Rejected, SourcePair

DEFAULT_HELDOUT_FRAC = 0.2


RULE = 2
"""Version of the rule by which docs are drawn, split and given topics: by hashes of what they say
and the seed.

By rule 1 it was their place that counted (`first_rule`). A set and its store keep the rule that
they were begun with.
"""
MIN_DOCS = 2
"""Of a split: `random` needs two."""


def conversation_id(doc: Pair | Doc) -> str:
    """A hash of the conversation's root, its first user turn: HH holds one conversation at several
    depths."""
    return root_id(doc.messages)


def root_id(messages: Iterable[dict[str, str]]) -> str:
    """Return the `conversation_id` of these turns."""
    root = next(turn["content"] for turn in messages if turn["role"] == "user")
    return hashlib.sha256(root.encode()).hexdigest()[:12]


def draw_key(content: dict[str, Any], seed: int) -> bytes:
    """A place in the order in which docs are drawn, the same wherever a doc stands in its
    source."""
    return hashlib.sha256(json.dumps([seed, content], sort_keys=True).encode()).digest()


def split_of(conversation: str, threshold: float, seed: int) -> str:
    """`heldout` where the hash of the conversation, a number from 0 to 1, is below the threshold,
    else `train`."""
    return "heldout" if _unit_hash(conversation, seed) < threshold else "train"


def choose_threshold(conversations: Sequence[str], heldout: float, seed: int) -> float:
    """The threshold of `split_of` that holds out as many docs as are asked for.

    Args:
        conversations: the conversation of each doc.
        heldout: below 1 the threshold itself, which no doc has a part in, moved only where it would
        leave a split
            fewer docs than it needs. From 1 on the number of docs, passed where the last
            conversation has several.
        seed: of the hashes.
    """
    sizes = Counter(conversations)
    hashes = sorted((_unit_hash(conversation, seed), size) for conversation, size in sizes.items())
    totals = list(itertools.accumulate(size for _, size in hashes))
    if heldout >= 1:
        last = next(
            (number for number, total in enumerate(totals) if total >= heldout), len(totals) - 1
        )
    else:
        num_below = sum(size for value, size in hashes if value < heldout)
        allowed = [
            i
            for i, total in enumerate(totals)
            if MIN_DOCS <= total <= len(conversations) - MIN_DOCS
        ]
        if not allowed or num_below in (totals[i] for i in allowed):
            return heldout
        last = min(allowed, key=lambda i: abs(totals[i] - num_below))
    following = hashes[last + 1][0] if last + 1 < len(hashes) else 1.0
    return _shortest_above(hashes[last][0], following)


def _unit_hash(conversation: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed} {conversation}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _shortest_above(value: float, limit: float) -> float:
    """The number with the fewest digits that is above `value` and not above `limit`."""
    steps = ((math.floor(value * 10**digits) + 1) / 10**digits for digits in range(1, 17))
    return next((step for step in steps if value < step <= limit), limit)


def clusters(pairs: Sequence[SourcePair]) -> list[int]:
    """For each pair the number of its cluster: one conversation, or prompts that are
    near-duplicates (transitively)."""
    first: dict[str, int] = {}  # equal prompts are compared with others once
    edges = [
        (first.setdefault(prompt_text(pair.messages), number), number)
        for number, pair in enumerate(pairs)
    ]
    numbers = list(first.values())
    edges += [(numbers[i], numbers[j]) for i, j in near_duplicates(list(first))]
    roots: dict[str, int] = {}
    edges += [
        (roots.setdefault(conversation_id(pair), number), number)
        for number, pair in enumerate(pairs)
    ]
    rows, columns = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(len(pairs), len(pairs)))
    return [int(label) for label in connected_components(graph, directed=False)[1]]


def split_pairs(
    pairs: list[SourcePair],
    heldout_frac: float | None,
    seed: int,
    rejected: Rejected,
    rule: int = RULE,
) -> list[SourcePair]:
    """Gives every pair its split; whoever cannot be held out cleanly goes to `rejected`.

    Args:
        pairs: in the order they are kept in.
        heldout_frac: share of the conversations held out; `None` takes the source's own splits
        where it has both, else
            0.2.
        seed: of the hashes.
        rejected: gets the held-out pairs that share a conversation, a near-duplicate prompt or a
        response with train. rule: version of the rule, see `RULE`.

    Raises:
        UserError: one of the splits is empty.
    """
    labels = clusters(pairs)
    own = [pair.split for pair in pairs]
    if heldout_frac is None and {"train", "heldout"} <= set(own):
        splits = [split or "train" for split in own]
    elif rule == 1:
        held = first_rule.held_clusters(labels, heldout_frac or DEFAULT_HELDOUT_FRAC, seed)
        splits = ["heldout" if label in held else "train" for label in labels]
    else:
        roots = [conversation_id(pair) for pair in pairs]
        threshold = choose_threshold(roots, heldout_frac or DEFAULT_HELDOUT_FRAC, seed)
        splits = [split_of(root, threshold, seed) for root in roots]
    trained_clusters = {
        label for label, split in zip(labels, splits, strict=True) if split == "train"
    }
    trained = [pair for pair, split in zip(pairs, splits, strict=True) if split == "train"]
    trained_texts = {text for pair in trained for text in (pair.chosen, pair.rejected)}
    kept = []
    for pair, label, split in zip(pairs, labels, splits, strict=True):
        if split == "heldout" and label in trained_clusters:
            rejected.add(
                pair, "held out, but its conversation or a near-duplicate of its prompt is in train"
            )
        elif split == "heldout" and not trained_texts.isdisjoint((pair.chosen, pair.rejected)):
            rejected.add(pair, "held out, but a response of it is in train")
        else:
            kept.append(replace(pair, split=split))
    check_sizes([str(pair.split) for pair in kept], rejected)
    return kept


def check_sizes(splits: Sequence[str], rejected: Rejected) -> None:
    """Raises `UserError` where a split has fewer docs than `random` needs."""
    for split in ("train", "heldout"):
        if splits.count(split) < MIN_DOCS:
            raise UserError(
                f"the split {split} has {splits.count(split)} usable docs and needs {MIN_DOCS} or "
                "more. Left out: "
                f"{rejected.reasons()}. Fix what was left out most, take more rows (--limit), or "
                "another --heldout-frac or --seed."
            )


_NUM_DRAWS = 100


def derangement(texts: Sequence[str], seed: int) -> list[int]:
    """For each text, the index of another one with a different text; a permutation, the same for
    the same seed.

    Sattolo's algorithm (doi:10.1016/0020-0190(86)90073-6) draws a uniform cyclic permutation, which
    has no fixed point; it is drawn again where equal texts would meet. Where that is likely every
    time, the texts are sorted, equal ones in a random order, and each takes the one that stands
    further on by the size of the largest group of equal ones.

    Raises:
        UserError: there is no such permutation, because one text is more than half of all.
    """
    text, largest = Counter(texts).most_common(1)[0] if texts else ("", 0)
    if len(texts) < 2 or 2 * largest > len(texts):
        why = (
            f"{largest} of them are the same ({text[:60]!r})"
            if len(texts) > 1
            else "two are needed"
        )
        raise UserError(
            f"`random` cannot be drawn: of the {len(texts)} chosen responses of a split, {why}. No "
            "response may be "
            "more than half of its split."
        )
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    for _ in range(_NUM_DRAWS):
        order = list(range(len(texts)))
        for i in range(len(order) - 1, 0, -1):
            j = generator.randrange(i)
            order[i], order[j] = order[j], order[i]
        if all(texts[i] != texts[j] for i, j in enumerate(order)):
            return order
    return _rotation(texts, largest, generator)


def _rotation(texts: Sequence[str], distance: int, generator: random.Random) -> list[int]:
    """Each index with the one `distance` further in a list where equal texts stand together, in a
    random order."""
    shuffled = list(range(len(texts)))
    generator.shuffle(shuffled)
    place: dict[str, int] = {}  # of each text, by its first index in the shuffled order
    for index in shuffled:
        place.setdefault(texts[index], len(place))
    grouped = sorted(shuffled, key=lambda index: place[texts[index]])
    order = [0] * len(texts)
    for index, partner in zip(grouped, grouped[distance:] + grouped[:distance], strict=True):
        order[index] = partner
    return order


def add_random(docs: list[dict[str, Any]], seed: int) -> None:
    """Gives each doc of one split its `random` response and the `random_doc_id` it comes from."""
    for doc, partner in zip(docs, derangement([doc["chosen"] for doc in docs], seed), strict=True):
        doc["random"] = docs[partner]["chosen"]
        doc["random_doc_id"] = docs[partner]["doc_id"]
