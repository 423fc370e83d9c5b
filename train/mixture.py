"""What is trained on: the grammar of `--train_category`.

mixture  = part {"," part}
part     = category [":" fraction]      the response of that category, for that fraction of the
docs; default: all category = a category of the set, or one followed by `_no_prompt`: the same
response tokens, without the prompt
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc

_NO_PROMPT = "_no_prompt"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a mixture."""

    name: str
    """As written: the category, with `_no_prompt` where the prompt is left out."""
    category: str
    with_prompt: bool
    fraction: float


def parse_mixture(text: str, categories: Sequence[str], source: str) -> list[Part]:
    """Reads `"chosen"`, `"chosen_no_prompt"` or `"chosen:0.5,rejected:0.5"`.

    Raises:
        UserError: an unknown category, one that comes twice, or a fraction that is not above 0 and
        at most 1.
    """
    parts = []
    for item in text.split(","):
        name, _, fraction = (piece.strip() for piece in item.partition(":"))
        category = name if name in categories else name.removesuffix(_NO_PROMPT)
        if category not in categories:
            raise UserError(
                f"--train_category {text}: {source} has only {', '.join(categories)}, not {name!r}."
            )
        share = _fraction(fraction, text)
        parts.append(
            Part(name=name, category=category, with_prompt=category == name, fraction=share)
        )
    if len({part.name for part in parts}) < len(parts):
        raise UserError(f"--train_category {text}: a category comes twice.")
    return parts


def _fraction(text: str, flag: str) -> float:
    try:
        value = float(text or 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(
            f"--train_category {flag}: a fraction is above 0 and at most 1, not {text!r}."
        )
    return value


def assign(docs: Sequence[Doc], parts: Sequence[Part], seed: int) -> list[tuple[Doc, Part]]:
    """Which doc is trained on with which part, in the order of the docs.

    The docs are shuffled once into a circle; each part takes its share of it where the part before
    ended. So `chosen:0.5,rejected:0.5` gives each doc one response, and `chosen,rejected` both.
    """
    order = list(range(len(docs)))
    random.Random(seed).shuffle(order)  # noqa: S311 - reproducible, not secret
    pairs, total = [], 0.0
    for part in parts:
        start, total = round(total * len(docs)), total + part.fraction
        pairs += [(order[i % len(docs)], part) for i in range(start, round(total * len(docs)))]
    pairs.sort(key=lambda pair: pair[0])  # stable: of one doc, the parts in their order
    return [(docs[index], part) for index, part in pairs]
