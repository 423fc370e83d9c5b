"""Whether a text is another one with a few words changed."""

import unicodedata
from functools import lru_cache

import regex

from sft_probe.synth.checks.words import words

MIN_SHARED = 0.75
"""Share of words, in order, that make a copy: 5 changed words of 20 are one, 6 are none."""
_MIN_SHARED_OF_SHORT, _SHORT_WORDS = 0.9, 10
_MIN_CONTAINED = 0.85
_MIN_SHARED_TRIGRAMS = 0.7
# letters of other alphabets that look like a Latin one; full-width and mathematical letters are
# folded by NFKC
_LOOK_ALIKE = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"
    "\u03b1\u03b2\u03b5\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u03bc\u0131\u0261\u04cf\u0585\u057d\u0578",
    "abekmhopctyxijshdqwabeikvoptyxmigloun",
)
_WORD = regex.compile(r"[\w']+")


def is_near_copy(text: str, other: str) -> bool:
    """Whether one text is the other, a part of it, or its sentences in another order, but for a few
    words.

    Look-alike letters, invisible characters, accents, case and punctuation make no difference.
    """
    mine, theirs = _folded_words(text), _folded_words(other)
    if not mine or not theirs:
        return False
    shorter, longer = sorted((len(mine), len(theirs)))
    shared = _num_shared(mine, theirs)
    if shorter < _SHORT_WORDS:
        return shared >= _MIN_SHARED_OF_SHORT * longer
    trigrams = _trigrams(mine), _trigrams(theirs)
    is_reordered = len(trigrams[0] & trigrams[1]) >= _MIN_SHARED_TRIGRAMS * min(map(len, trigrams))
    return shared >= MIN_SHARED * longer or shared >= _MIN_CONTAINED * shorter or is_reordered


@lru_cache(maxsize=8)
def _folded_words(text: str) -> tuple[str, ...]:
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    letters = "".join(
        letter for letter in decomposed if unicodedata.category(letter) not in ("Mn", "Cf")
    )
    return tuple(
        word for part in words(letters.translate(_LOOK_ALIKE)) for word in _WORD.findall(part)
    )


def _trigrams(parts: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {parts[i : i + 3] for i in range(len(parts) - 2)}


def _num_shared(mine: tuple[str, ...], theirs: tuple[str, ...]) -> int:
    """Length of the longest common subsequence, with one bit for each word (Crochemore et al.,
    2001)."""
    places: dict[str, int] = {}
    for i, word in enumerate(mine):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(mine)) - 1
    row = full
    for word in theirs:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(mine) - row.bit_count()
