"""Train and held-out docs, disjoint by conversation, near-duplicate prompt and response; and the
category `random`."""

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
from sft_probe.probe_set import SPLITS, Doc, LeftOut, common_reasons
from sft_probe.synth.duplicates import near_duplicates, prompt_text

DEFAULT_HELDOUT_FRAC = 0.2
RULE = 2
"""Version of the rule by which docs are drawn, split and given topics.

Rule 2 goes by hashes of a doc's content and the seed. Rule 1, of sft-probe 0.1, went by the place
of a doc, so that an appended row moved others between the splits and gave them other topics. A
directory keeps the rule that it was begun with: under another rule its topics would change, and
texts that are already paid for would be requested again.
"""
MIN_DOCS = 2
"""Fewest docs of a split: `random` needs two."""
_NUM_DRAWS = 100


def root_id(messages: Iterable[dict[str, str]]) -> str:
    """Return a hash of the first user turn, by which HH's copies of one conversation, each cut at
    another depth, are recognised."""
    root = next(turn["content"] for turn in messages if turn["role"] == "user")
    return hashlib.sha256(root.encode()).hexdigest()[:12]


def draw_key(content: dict[str, Any], seed: int) -> bytes:
    """Return the sort key by which docs are drawn. It does not depend on a doc's place."""
    return hashlib.sha256(json.dumps([seed, content], sort_keys=True).encode()).digest()


def shuffled(values: Sequence[Any], seed: int) -> list[Any]:
    """Return values in a random order, in which rule 1 draws docs and clusters."""
    values = list(values)
    random.Random(seed).shuffle(values)  # noqa: S311 - reproducible, not secret
    return values


def split_of(conversation: str, threshold: float, seed: int) -> str:
    """Return `heldout` where the hash of the conversation, from 0 to 1, is below the threshold,
    else `train`."""
    return "heldout" if _unit_hash(conversation, seed) < threshold else "train"


def choose_threshold(conversations: Sequence[str], heldout: float, seed: int) -> float:
    """Return the threshold of `split_of` that holds out as many docs as requested.

    Args:
        conversations: the conversation of each doc.
        heldout: below 1, the threshold itself, whatever the docs; it is moved only where a split
            would have too few docs. From 1 on, the number of docs, exceeded where the last
            conversation has several.
        seed: of the hashes.
    """
    sizes = Counter(conversations)
    hashes = sorted((_unit_hash(conversation, seed), size) for conversation, size in sizes.items())
    totals = list(itertools.accumulate(size for _, size in hashes))
    if heldout >= 1:
        last = next((i for i, total in enumerate(totals) if total >= heldout), len(totals) - 1)
    else:
        num_below = sum(size for value, size in hashes if value < heldout)
        most = len(conversations) - MIN_DOCS
        allowed = [i for i, total in enumerate(totals) if MIN_DOCS <= total <= most]
        if not allowed or num_below in (totals[i] for i in allowed):
            return heldout
        last = min(allowed, key=lambda i: abs(totals[i] - num_below))
    following = hashes[last + 1][0] if last + 1 < len(hashes) else 1.0
    return _shortest_above(hashes[last][0], following)


def _unit_hash(conversation: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed} {conversation}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _shortest_above(value: float, limit: float) -> float:
    """Return the number with the fewest digits in the interval (value, limit]."""
    steps = ((math.floor(value * 10**digits) + 1) / 10**digits for digits in range(1, 17))
    return next((step for step in steps if value < step <= limit), limit)


def clusters(docs: Sequence[Doc]) -> list[int]:
    """Return the cluster number of each doc: docs of one conversation, or with near-duplicate
    prompts (transitively), share a cluster."""
    edges = near_duplicates([prompt_text(doc.messages) for doc in docs])
    roots: dict[str, int] = {}
    edges += [(roots.setdefault(doc.conversation_id, i), i) for i, doc in enumerate(docs)]
    rows, columns = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(len(docs), len(docs)))
    return [int(label) for label in connected_components(graph, directed=False)[1]]


def split_docs(
    docs: list[Doc],
    heldout_frac: float | None,
    seed: int,
    left_out: list[LeftOut],
    rule: int = RULE,
) -> list[Doc]:
    """Return the docs with their splits, in their order, without those that cannot be held out
    cleanly: they share a conversation, a near-duplicate prompt or a response with train.

    Args:
        docs: with the splits of the source, where it has some.
        heldout_frac: share of the conversations to hold out. None keeps the source's own splits
            where it has both, else holds out 0.2.
        seed: of the hashes.
        left_out: receives the other docs.
        rule: version of the rule, see `RULE`.

    Raises:
        UserError: one of the splits has too few docs.
    """
    labels = clusters(docs)
    splits = _draw_splits(docs, labels, heldout_frac, seed, rule)
    trained = {i for i, split in enumerate(splits) if split == "train"}
    trained_clusters = {labels[i] for i in trained}
    trained_texts = {text for i in trained for text in docs[i].responses.values()}
    kept = []
    for doc, label, split in zip(docs, labels, splits, strict=True):
        reason = ""
        if split == "heldout" and label in trained_clusters:
            reason = "held out, but its conversation or a near-duplicate of its prompt is in train"
        elif split == "heldout" and not trained_texts.isdisjoint(doc.responses.values()):
            reason = "held out, but one of its responses is in train"
        if reason:
            left_out.append(LeftOut(place=doc.place, doc_id=doc.doc_id, reason=reason))
        else:
            kept.append(replace(doc, split=split))
    check_sizes(kept, left_out)
    return kept


def _draw_splits(
    docs: Sequence[Doc], labels: Sequence[int], heldout_frac: float | None, seed: int, rule: int
) -> list[str]:
    own = [doc.split for doc in docs]
    if heldout_frac is None and {"train", "heldout"} <= set(own):
        return [split or "train" for split in own]
    heldout = heldout_frac or DEFAULT_HELDOUT_FRAC
    if rule == 1:
        held = _held_clusters(labels, heldout, seed)
        return ["heldout" if label in held else "train" for label in labels]
    roots = [doc.conversation_id for doc in docs]
    threshold = choose_threshold(roots, heldout, seed)
    return [split_of(root, threshold, seed) for root in roots]


def _held_clusters(labels: Sequence[int], heldout_frac: float, seed: int) -> set[int]:
    """Return the clusters that rule 1 holds out: about this share of docs, and never more."""
    sizes = Counter(labels)
    target = round(heldout_frac * len(labels))
    held: set[int] = set()
    num_held = 0
    for label in shuffled(range(len(sizes)), seed):
        if num_held + sizes[label] <= target:
            held.add(label)
            num_held += sizes[label]
    return held


def check_sizes(docs: Sequence[Doc], left_out: Sequence[LeftOut]) -> None:
    """Raise `UserError` where a split has fewer docs than `random` needs."""
    counts = Counter(doc.split for doc in docs)
    fix = "Take more rows (--limit), or choose another --heldout-frac or --seed."
    if left_out:
        fix = f"Left out: {common_reasons(left_out)}. Fix the most common reason, or: {fix}"
    for split in SPLITS:
        if counts[split] < MIN_DOCS:
            raise UserError(
                f"the split {split} has {counts[split]} usable docs but needs {MIN_DOCS} or more. "
                f"{fix}"
            )


def with_random(docs: Sequence[Doc], seed: int) -> list[Doc]:
    """Return docs of one split with `random`: the chosen response of another doc, each used once.

    Raises:
        UserError: one response is more than half of all.
    """
    order = derangement([doc.responses["chosen"] for doc in docs], seed)
    return [
        replace(
            doc,
            responses={**doc.responses, "random": docs[partner].responses["chosen"]},
            random_doc_id=docs[partner].doc_id,
        )
        for doc, partner in zip(docs, order, strict=True)
    ]


def with_random_in_splits(docs: Sequence[Doc], seed: int) -> list[Doc]:
    """Return the train docs and then the held-out docs, with `random` drawn within each split."""
    parts = ([doc for doc in docs if doc.split == split] for split in SPLITS)
    return [doc for part in parts for doc in with_random(part, seed)]


def derangement(texts: Sequence[str], seed: int) -> list[int]:
    """Return a permutation that gives each text the index of a different text.

    Sattolo's algorithm (doi:10.1016/0020-0190(86)90073-6) draws a uniform cyclic permutation,
    which has no fixed point. It is drawn again where equal texts would meet. Where that is likely
    every time, the texts are sorted, equal ones in a random order, and each takes the text that
    stands further on by the size of the largest group of equal ones.

    Raises:
        UserError: one text is more than half of all, so that no such permutation exists.
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
            "response may be more than half of its split."
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
    """Pair each index with the one `distance` further on in a list that groups equal texts."""
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
