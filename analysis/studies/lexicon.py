"""What a response is made of, by a rule without a tokenizer: words, numbers, marks, blanks."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

from sft_probe.analysis.stats.intervals import Floats

CLASSES = (
    "first",
    "function word",
    "content word",
    "number",
    "punctuation",
    "markup",
    "white space",
    "EOS",
)
"""Every piece of a response is of one class; `first` is its first visible piece, `EOS` the
terminator."""

_PIECE = regex.compile(
    r"(?P<markup>\ ?(?:</?[A-Za-z][^<>\n]{0,40}>|[*_`\#~|]+))"
    r"|(?P<number>\ ?\p{Nd}+(?:[.,:/]\p{Nd}+)*%?)"
    r"|(?P<word>\ ?(?:[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{M}]+(?:['’\-][\p{L}\p{M}]+)*))"
    r"|(?P<space>\s+)"
    r"|(?P<punctuation>\ ?(?:(?P<mark>[^\s\p{L}\p{M}\p{Nd}])(?P=mark)*|.))",
    regex.DOTALL,
)
_ENGLISH = """
a about after all also although am an and any are as at be because been before being but by can
could did do does doing don't down each either else even ever every few for from further had has
have having he her here hers him his how i i'd i'll i'm i've if in into is isn't it it's its
itself just let's may me might more most must my myself neither no nor not now of off on once only
onto or other our ours out over own same shall she should since so some such than that that's the
their theirs them themselves then there there's these they they're this those though through to
too under until up upon us very was wasn't we were what what's when where whether which while who
whom whose why will with within without would yes yet you you'd you'll you're you've your yours
yourself
"""
_FUNCTION_WORDS = frozenset(_ENGLISH.split())


@dataclass(frozen=True)
class Piece:
    """A stretch of a text, with the blank before it, where there is one."""

    start: int
    end: int
    """In characters of the text."""
    kind: str
    """One of `CLASSES`."""
    literal: str
    """The text without the blank, in lower case."""


def pieces(text: str) -> list[Piece]:
    """Cut a text into pieces that follow one another without a gap.

    A word is a run of letters, with apostrophes and hyphens between letters, or one character of
    a script without blanks. One blank before a piece belongs to it. A mark that is repeated is one
    piece.
    """
    found: list[Piece] = []
    is_first = True
    for match in _PIECE.finditer(text):
        literal = match.group().strip().lower()
        kind = _kind(str(match.lastgroup), literal)
        if is_first and kind != "white space":
            kind, is_first = "first", False
        found.append(Piece(match.start(), match.end(), kind, literal))
    return found


def _kind(group: str, literal: str) -> str:
    if group == "word":
        word = literal.replace("’", "'")
        return "function word" if word in _FUNCTION_WORDS else "content word"
    return {"space": "white space", "mark": "punctuation"}.get(group, group)


def spread(values: Floats, ends: Sequence[int], parts: Sequence[Piece]) -> Floats:
    """Give the value of each token to the pieces that its characters lie in.

    A token in several pieces is divided by its number of characters in each, so that sums are
    kept. One without characters (the first bytes of one) belongs to the piece of the next.

    Args:
        values: [tokens].
        ends: where each token ends, in characters of the text that `parts` covers; what lies before
            the text ends at 0.
        parts: from `pieces`; not empty.

    Returns:
        [pieces], float64.
    """
    totals = np.zeros(len(parts))
    starts = [piece.start for piece in parts]
    begin = 0
    for value, end in zip(values, ends, strict=True):
        first = max(bisect.bisect_right(starts, begin) - 1, 0)
        last = max(bisect.bisect_left(starts, end) - 1, first)
        for index in range(first, last + 1):
            piece = parts[index]
            overlap = min(end, piece.end) - max(begin, piece.start)
            totals[index] += value * (overlap / (end - begin) if end > begin else 1)
        begin = max(begin, end)
    return totals
