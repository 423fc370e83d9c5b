"""Checks of written texts, by patterns and counts, so that a user can see why one was rejected;
and the optional second opinion of the writer itself."""

import hashlib
import re
import unicodedata
from dataclasses import replace
from functools import cache, lru_cache
from importlib import resources

import regex
import yaml

from sft_probe.probe_set import Doc
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.categories import Template
from sft_probe.synth.duplicates import count_words, prompt_text, split_words
from sft_probe.synth.leaks import is_leak

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.5, 2.0
SLACK_WORDS = 5
"""A difference of so many words is never a fault, since the ratio says little about short texts."""


def fault_of(request: Request, answer: Answer, doc: Doc, template: Template) -> str | None:
    """Return the first fault of an answer in one or two words; None for a good one."""
    text = (answer.text or "").strip()
    if answer.status != "ok" or not text:
        return answer.status if answer.status != "ok" else "empty"
    # a non-response may take up the words of its topic
    source_text = request.source_text if request.category != "non_response" else ""
    context = f"{source_text}\n{prompt_text(doc.messages)}"
    is_answer = request.category == "variant"
    others = {source_text, doc.responses["chosen"], doc.responses["rejected"]}
    faults = {
        "refusal": is_refusal(text, source_text),
        "leak": is_leak(text, template.text, context, is_answer=is_answer),
        "cut off": not is_finished(text),
        "near-copy": any(is_near_copy(text, other) for other in others),
        "length": not has_length(text, request.num_words),
    }
    return next((name for name, is_found in faults.items() if is_found), None)


def has_length(text: str, num_words: int) -> bool:
    """Return whether a text has between half and twice the words requested, or is off by at most
    five."""
    written = count_words(text)
    within = MIN_LENGTH_RATIO * num_words <= written <= MAX_LENGTH_RATIO * num_words
    return within or abs(written - num_words) <= SLACK_WORDS


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
    """Return whether a text ends in a sentence, emoji or address, or as a list, table, verse or
    letter does."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or text.count("```") % 2:
        return False
    last = lines[-1]
    if len(lines) > 1 and _BARE_MARKER.fullmatch(last) and not last.endswith(("```", "|")):
        return False
    is_exclamation = count_words(text) <= _MAX_EXCLAMATION_WORDS  # You're welcome
    if is_exclamation and not _DANGLING.search(last):
        return True
    return _ends_sentence(last) or _ends_block(lines)


def _ends_sentence(line: str) -> bool:
    core = _CLOSERS.sub("", line)
    if _ABBREVIATION.search(core):
        return False
    of_core = (_EMOJI, _TERMINAL, _GREEK_QUESTION, _NO_FULL_STOP, _FORMULA)
    return any(pattern.search(core) for pattern in of_core) or any(
        pattern.search(line) for pattern in (_EMOJI, _ADDRESS)
    )


def _ends_block(lines: list[str]) -> bool:
    """Return whether the last of several lines ends a list, table, verse or letter, which need no
    full stop."""
    last, others = lines[-1], lines[:-1]
    if last.endswith("|") and others:
        return last.count("|") >= others[-1].count("|")
    if last.endswith("```"):
        return True
    if not others or _DANGLING.search(_CLOSERS.sub("", last)):
        return False
    if _LIST_ITEM.match(last):
        items = [line for line in others if _LIST_ITEM.match(line)]
        num_ended = sum(map(_ends_sentence, items))
        return 2 * num_ended <= len(items) if items else others[-1].endswith(":")
    is_greeting = others[-1].endswith((",", "\uff0c", "\u060c"))
    is_name = len(last.split()) <= _MAX_NAME_WORDS and last[0].isupper()
    is_verse = len(others) > 1 and not any(map(_LIST_ITEM.match, others))
    is_short = all(len(line.split()) <= _MAX_LINE_WORDS for line in lines)
    return (is_greeting and is_name) or (is_verse and is_short)


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
_FOLDED_WORD = regex.compile(r"[\w']+")


def is_near_copy(text: str, other: str) -> bool:
    """Return whether, but for a few words, one text is the other, part of it, or its sentences in
    another order.

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
    kept = (letter for letter in decomposed if unicodedata.category(letter) not in ("Mn", "Cf"))
    parts = split_words("".join(kept).translate(_LOOK_ALIKE))
    return tuple(word for part in parts for word in _FOLDED_WORD.findall(part))


def _trigrams(parts: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {parts[i : i + 3] for i in range(len(parts) - 2)}


def _num_shared(mine: tuple[str, ...], theirs: tuple[str, ...]) -> int:
    """Return the length of the longest common subsequence, by one bit per word (Crochemore et al.,
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


_START, _APOLOGY_START = 400, 120
"""Number of first characters that are searched for a refusal, and for an apology."""
_CONDITION = re.compile(
    r"\b(?:exact|definit\w+|precise|certain) (?:answer|number|summary|figure|date|price|estimate|"
    r"time)|absolute certainty"
    r"|\b(?:without|until|unless|before|sans|ohne|sin|senza|sem|zonder|bez|без|не зная|olmadan)\b"
    r"|如果不|不知道|分からないと|모르면",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f\u0964])\s*|\n+")
_APOLOGY = re.compile(r"\b(sorry|apolog\w+)\b", re.IGNORECASE)


def is_refusal(text: str, source_text: str) -> bool:
    """Return whether a text refuses its task in one of 25 languages.

    A refusal says that it is sorry, that it cannot, what it cannot do (help, answer, write), or
    that it is a machine or has rules. One of the first three alone is no refusal: "I can't say for
    certain" is an answer, and so is "I can't recommend one without knowing your budget". A text
    made from a refusal or an apology may refuse. The words stand in `refusals.yaml`.
    """
    return _refuses(text) and not (_APOLOGY.search(source_text) or _refuses(source_text))


def _refuses(text: str) -> bool:
    start = text.replace("\u2019", "'")[:_START]
    machine, any_cannot, languages = _patterns()
    if machine.search(start):
        return True
    if not any_cannot.search(start):
        return False
    for sorry, cannot, task in languages:
        is_sorry = bool(sorry.search(start[:_APOLOGY_START]))
        for sentence in _SENTENCE.split(start):
            found = cannot.search(sentence)
            if found is None or _CONDITION.search(sentence):
                continue
            # English names the task after the verb: "a question I can't answer with certainty"
            asked = sentence[found.start() :] if sentence.isascii() else sentence
            if is_sorry or task.search(asked):
                return True
    return False


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], list[tuple[re.Pattern[str], ...]]]:
    """Return the patterns of a machine and of inability in all languages, then those of apology,
    inability and task in each."""
    path = resources.files("sft_probe.synth").joinpath("refusals.yaml")
    languages = list(yaml.safe_load(path.read_text("utf-8")).values())

    def compiled(name: str, *languages: dict[str, list[str]]) -> re.Pattern[str]:
        words = (word for language in languages for word in language[name])
        return re.compile("|".join(words), re.IGNORECASE)

    machine, cannot = (compiled(name, *languages) for name in ("machine", "cannot"))
    names = ("sorry", "cannot", "task")
    return machine, cannot, [tuple(compiled(name, one) for name in names) for one in languages]


JUDGE = "judge"
"""Category of the requests for an opinion."""
JUDGED, NO_VERDICT = "judged", "no verdict"
_VERDICT_WORD = re.compile(r"\w+")
_TEMPLATE = "judge@1"
_PROMPT = """Below are a task and an answer to it. Is the answer good? It is not if it refuses the task, speaks of the
task or of itself, breaks off, copies the text that it was to change, or holds anything that the task forbids. Whether
it is kind, useful or true does not matter. Reply with one word, yes or no.

<task>
{task}
</task>

<answer>
{text}
</answer>"""  # noqa: E501
_OUTPUT_TOKENS = 16
_BYTES_PER_TOKEN = 4
"""Longest excerpt of a text, per token of its output limit. It bounds the cost of an opinion."""


def opinion_request(request: Request, text: str, thinking_tokens: int) -> Request:
    """Return the request for the writer's opinion on its own text."""
    most_bytes = _BYTES_PER_TOKEN * request.max_output_tokens
    shown = text.strip().encode(errors="ignore")[:most_bytes].decode(errors="ignore")
    return replace(
        request,
        category=JUDGE,
        template=_TEMPLATE,
        template_sha256=hashlib.sha256(_PROMPT.encode()).hexdigest(),
        prompt=_PROMPT.format(task=request.prompt, text=shown),
        source_text=shown,
        num_words=1,
        temperature=0.0,
        max_output_tokens=_OUTPUT_TOKENS + thinking_tokens,
    )


def expected_opinion(request: Request, thinking_tokens: int) -> Request:
    """Return a request for an opinion on a text of the expected length, for an estimate."""
    return opinion_request(request, "a word " * request.num_words, thinking_tokens)


def longest_opinion(request: Request, thinking_tokens: int) -> Request:
    """Return the longest possible request for an opinion, for an upper bound."""
    return opinion_request(
        request, "x" * (_BYTES_PER_TOKEN * request.max_output_tokens), thinking_tokens
    )


def fault_in(opinion: Answer) -> str | None:
    """Return the fault in an opinion: None for yes, `judged` for no, `no verdict` for the rest."""
    words = _VERDICT_WORD.findall((opinion.text or "").casefold()) if opinion.status == "ok" else []
    return {"yes": None, "no": JUDGED}.get(words[0], NO_VERDICT) if words else NO_VERDICT
