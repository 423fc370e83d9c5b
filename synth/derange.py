"""The category `random`: every doc gets the chosen response of another one, each used once."""

import random
from collections import Counter
from collections.abc import Sequence

from sft_probe.errors import UserError

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
