"""Words of a text, also where its script puts no blanks between them."""

import regex

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_SYLLABIC = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_CHARACTER = regex.compile(rf"{_UNSPACED}|{_SYLLABIC}")
_WORD = regex.compile(rf"{_UNSPACED}|{_SYLLABIC}|(?:(?!{_UNSPACED}|{_SYLLABIC})\S)+")
_SYLLABIC_CHARACTER = regex.compile(_SYLLABIC)
_CHARACTERS_PER_WORD = 5
"""Of a word in the scripts of mainland South-East Asia; in Chinese and Japanese a character counts
as a word."""


def words(text: str) -> list[str]:
    """What stands between blanks; single characters where most of the text is in a script without
    blanks."""
    return _WORD.findall(text) if _is_unspaced(text) else text.split()


def count_words(text: str) -> int:
    """The length of a text in words, by its characters where most of it is in a script without
    blanks."""
    if not _is_unspaced(text):
        return len(text.split())
    num_syllabic = len(_SYLLABIC_CHARACTER.findall(text))
    return max(1, len(words(text)) - num_syllabic + round(num_syllabic / _CHARACTERS_PER_WORD))


def _is_unspaced(text: str) -> bool:
    if text.isascii():
        return False
    return 2 * len(_CHARACTER.findall(text)) > len("".join(text.split()))
