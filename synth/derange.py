"""The category `random`: every doc gets the chosen response of another one, each used once."""

import random
from collections.abc import Sequence

from sft_probe.errors import UserError


def derangement(texts: Sequence[str], seed: int) -> list[int]:
    """For each text, the index of another one with a different text; a permutation, the same for the same seed.

    Sattolo's algorithm (doi:10.1016/0020-0190(86)90073-6) draws a uniform cyclic permutation, which has no fixed point;
    it is drawn again where equal texts would meet.

    Raises:
        UserError: there is no such permutation, or none was found because most texts are equal.
    """
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    for _ in range(1000):
        order = list(range(len(texts)))
        for i in range(len(order) - 1, 0, -1):
            j = generator.randrange(i)
            order[i], order[j] = order[j], order[i]
        if all(texts[i] != texts[j] for i, j in enumerate(order)):
            return order
    raise UserError(f"`random` cannot be drawn: the {len(texts)} chosen responses of a split are too few or too alike.")
