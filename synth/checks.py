"""Faults of written texts. Plain patterns, so that a user can see why a text was refused; English first."""

import re

from sft_probe.synth.categories import Template
from sft_probe.synth.report import NEAR_DUPLICATE_JACCARD, shingles
from sft_probe.synth.requests import Answer, Request
from sft_probe.synth.sources import SourcePair

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.5, 2.0
SLACK_WORDS = 5
"""So many words off are never a fault: for answers of a few words the ratio says little."""

_APOSTROPHE = "['\u2019]"
_REFUSAL = re.compile(
    r"\bas an? (AI|artificial intelligence|large language model|language model)\b"
    rf"|\bI(( |{_APOSTROPHE})(a?m) (just |really |very )*(unable|not able|not programmed|not allowed) to"
    rf"|,? (cannot|can not|can{_APOSTROPHE}t|won{_APOSTROPHE}t|will not|could not)( be able to)?) "
    r"(help|assist|provide|fulfill?|comply|answer|create|write|generate|produce|paraphrase|rewrite|rephrase|do that)\b"
    rf"|\A\W*(I( a|{_APOSTROPHE})m( so| very)? sorry|I apologi[sz]e|my apologies),? but\b",
    re.IGNORECASE,
)
_APOLOGY = re.compile(r"\b(sorry|apolog\w+)\b", re.IGNORECASE)
_TASK_WORDS = (
    r"(paraphras|rephras|reword|rewrit|rewrote|random|unrelated|alternative|requested|passage|sentence|version|variant"
    r"|short text|new text|\d+[- ]words?)"
)
_LEAK = re.compile(
    rf"\s*\W*((sure|certainly|of course|okay|ok|absolutely|no problem)\b\W+)?"
    rf"(here({_APOSTROPHE}s| is| are)|this is|below is|the following is)\b[^.!?\n]{{0,80}}?\b{_TASK_WORDS}"
    rf"|\s*\W*(paraphrase|paraphrased|rewritten|reworded|rephrased|revised|new|alternative)"
    r"(\s+(text|version|answer|response|sentence|passage))?\W*:"
    r"|\s*\W*(human|assistant|user|text|passage|rewritten text)\W*:\s"
    r"|[\s\S]*</?(text|conversation|passage)>"
    rf"|[\s\S]*\b(let me know if you (need|want|would like) (any )?(more|further|other) (change|revision|version))"
    rf"|[\s\S]*\(?\b(word count|\d+ words)\)?\W*$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?:\u2026\u3002\uff01\uff1f\u061f\u0964][\"'\u2019\u201d\u00bb)\]*_`]*$|```$")
_LIST_ITEM = re.compile(r"\s*([-*+\u2022]|\(?\w{1,3}[.)])\s+\S")
_LEAKED_WORDS = 6


def fault_of(request: Request, answer: Answer, pair: SourcePair, template: Template) -> str | None:
    """The first thing wrong with an answer, in one word or two; `None` for a good one.

    A near-copy is a Jaccard similarity of word trigrams of 0.7 or more with a response of the same prompt.
    """
    text = (answer.text or "").strip()
    if answer.status != "ok" or not text:
        return answer.status if answer.status != "ok" else "empty"
    # a non-response speaks of its topic, in the words of it where the writer likes
    others = {pair.chosen, pair.rejected} | ({request.source_text} if request.category != "non_response" else set())
    faults = {
        "leak": _is_leak(text, template),
        "refusal": _is_refusal(text, request.source_text),
        "cut off": not _is_finished(text),
        "near-copy": any(_is_near_copy(text, other) for other in others),
        "length": not has_length(text, request.num_words),
    }
    return next((name for name, is_found in faults.items() if is_found), None)


def has_length(text: str, num_words: int) -> bool:
    """Whether a text is within half and twice the words aimed at, or within 5 words of them."""
    written = len(text.split())
    within = MIN_LENGTH_RATIO * num_words <= written <= MAX_LENGTH_RATIO * num_words
    return within or abs(written - num_words) <= SLACK_WORDS


def _is_leak(text: str, template: Template) -> bool:
    """The text speaks of its task, or repeats six words in a row of the template."""
    return bool(_LEAK.match(text)) or not _word_runs(text).isdisjoint(_word_runs(template.text))


def _is_refusal(text: str, source_text: str) -> bool:
    """A text made from a refusal or an apology may be one."""
    is_allowed = _REFUSAL.search(source_text) or _APOLOGY.search(source_text)
    return bool(_REFUSAL.search(text)) and not is_allowed


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _LEAKED_WORDS]) for i in range(len(words) - _LEAKED_WORDS + 1)}


def _is_finished(text: str) -> bool:
    """Ends as a sentence does, or in the item of a list, which often has no full stop."""
    lines = text.splitlines()
    is_list = len(lines) > 1 and bool(_LIST_ITEM.match(lines[-1])) and any(map(_LIST_ITEM.match, lines[:-1]))
    return bool(_SENTENCE_END.search(text)) or is_list


def _is_near_copy(text: str, other: str) -> bool:
    mine, theirs = shingles(text), shingles(other)
    return len(mine & theirs) >= NEAR_DUPLICATE_JACCARD * len(mine | theirs)
