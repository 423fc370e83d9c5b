"""Whether a text ends where it was to end. By the Unicode properties of its last characters, in any
script."""

import regex

from sft_probe.synth.checks.words import count_words

_TERMINAL = regex.compile(
    r"[\p{Sentence_Terminal}\u2026\u2025\u22ef~\uff5e\u301c\u266a\u266b\u037e]$"
)
_CLOSERS = regex.compile(r"[\p{Pe}\p{Pf}\p{Pi}\s\"'*_`$]+$")
_EMOJI = regex.compile(
    r"[\p{Extended_Pictographic}\p{Emoji_Modifier}\p{Regional_Indicator}\ufe0f\u200d]+$|[:;]-?[)D(P]$|[(\uff08]\u7b11[)\uff09]$"
)
_ADDRESS = regex.compile(r"(?:https?://|www\.)\S+$|\S+@\S+\.\w+$|#\w+$", regex.IGNORECASE)
_FORMULA = regex.compile(r"[=\u2248]\s*\p{Sc}?[\d.,]*\d\s?\S{0,5}$")
_NO_FULL_STOP = regex.compile(r"[\p{Thai}\p{Lao}]\p{M}*$")
_ABBREVIATION = regex.compile(r"\b(?:e\.g|i\.e|z\.\s?B|d\.\s?h|p\.\s?ex|vs|Mrs?|Dr|Prof|Nr|No)\.$")
_MARKER = r"(?:[-*+\u2022\u2013]|\(?\w{1,3}[.)])"
_LIST_ITEM = regex.compile(rf"\s*{_MARKER}\s+\S")
_BARE_MARKER = regex.compile(rf"\W*{_MARKER}\W*|\W+")
_DANGLING = regex.compile(
    r"(?:[,;:\-\u2013\u2014(]|\b(?:the|an?|and|or|but|nor|of|to|with|for|in|on|at|by|as|from|into|is|are|was|were|be|"
    r"its|their|your|my|his|her|our|that|which|who|whose|because|if|than|when|while|very|such|about|not|et|ou|de|la|le|"
    r"les|des|du|un|une|und|oder|der|die|das|den|dem|ein|eine|mit|zu|y|o|el|los|las|del|con|por|para|e|il|di|da|che))$",
    regex.IGNORECASE,
)
_GREEK_QUESTION = regex.compile(r"\p{Greek}\s*;$")
_MAX_LINE_WORDS, _MAX_NAME_WORDS, _MAX_EXCLAMATION_WORDS = 12, 4, 3


def is_finished(text: str) -> bool:
    """Whether a text ends in a sentence, an emoji, an address, or as a list, a table, a verse or a
    letter does."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or text.count("```") % 2:
        return False
    last = lines[-1]
    if len(lines) > 1 and _BARE_MARKER.fullmatch(last) and not last.endswith(("```", "|")):
        return False
    is_exclamation = count_words(text) <= _MAX_EXCLAMATION_WORDS and not _DANGLING.search(
        last
    )  # You're welcome
    return is_exclamation or _ends_sentence(last) or _ends_block(lines)


def _ends_sentence(line: str) -> bool:
    core = _CLOSERS.sub("", line)
    if _ABBREVIATION.search(core):
        return False
    return any(
        (
            _EMOJI.search(line),
            _EMOJI.search(core),
            _TERMINAL.search(core),
            _GREEK_QUESTION.search(core),
            _ADDRESS.search(line),
            _NO_FULL_STOP.search(core),
            _FORMULA.search(core),
        )
    )


def _ends_block(lines: list[str]) -> bool:
    """The last of several lines that have no full stop by their nature, and does not break off
    inside a phrase."""
    last, others = lines[-1], lines[:-1]
    if last.endswith("|") and others:
        return last.count("|") >= others[-1].count("|")
    if last.endswith("```"):
        return True
    if not others or _DANGLING.search(_CLOSERS.sub("", last)):
        return False
    if _LIST_ITEM.match(last):
        items = [line for line in others if _LIST_ITEM.match(line)]
        return (
            2 * sum(map(_ends_sentence, items)) <= len(items) if items else others[-1].endswith(":")
        )
    if (
        others[-1].endswith((",", "\uff0c", "\u060c"))
        and len(last.split()) <= _MAX_NAME_WORDS
        and last[0].isupper()
    ):
        return True  # who signs a letter
    is_verse = len(others) > 1 and not any(map(_LIST_ITEM.match, others))
    return is_verse and all(len(line.split()) <= _MAX_LINE_WORDS for line in lines)
