"""Whether a text shows the task it was written for: thoughts, wrappers, labels, and remarks on
itself.

Three kinds of signal, in any language: tokens and tags that no reader should see; the words for
rewriting where a writer announces or labels a text; a remark after the text on what it keeps of the
original, how long it is or whether it will do. What stands in the source or in the user's own turn
is not a leak. The words stand in `leaks.yaml`.
"""

import json
from functools import cache
from importlib import resources

import regex
import yaml

_OPENING = 250
"""Number of characters."""
_LEAKED_WORDS, _LONG_LETTERS = 6, 4
_WRAPPED = regex.compile(r"\s*<([A-Za-z_][\w-]*)>[\s\S]*</\1>\s*")
_FENCED = regex.compile(
    r"\s*```(?:text|txt|markdown|md|plaintext|plain)?\s*\n[\s\S]*```\s*", regex.IGNORECASE
)
_ANNOUNCEMENT = regex.compile(
    r"[^\n]{1,120}[:\uff1a][*_ ]*\n\s*\n(?!\s*(?:[-*+\u2022\u2013|>]|\(?\w{1,3}[.)]\s|```))"
)
"""A short paragraph that ends in a colon before prose, which announces it in any language."""
_OWN_LABEL = regex.compile(
    r"\W*(?:here(?:'s| is) )?([^\n:\uff1a]{1,80})[:\uff1a]", regex.IGNORECASE
)
_HEADING = regex.compile(
    r"[^\n.!?\u3002\uff01\uff1f\u2026,:;]{1,60}\w\n\s*\n"
    r"|\W*(?:(?<=\*\*|__)[^\n*_]+(?:\*\*|__)|(?<=#)[^\n]+)\W*\n"
)
_REMARK = regex.compile(
    r"(?<=[.!?\u3002\uff01\uff1f\"*])\s*\W{0,3}[(\[\uff08\u3010]([^()\n]+)[)\]\uff09\u3011]\W{0,3}$"
)
_ASIDE = regex.compile(r"\n\s*\n\W{0,3}[(\[\uff08\u3010][^\n]+[)\]\uff09\u3011]\W{0,3}$")
"""A last paragraph in brackets."""
_SENTENCE = regex.compile(r"(?<=[.!?\u3002\uff01\uff1f])[\s\"')]+|\n+")
_PARAGRAPH = regex.compile(r"\n\s*\n|\n(?=[-*_]{3,}\s*\n)")


@cache
def _lists() -> dict[str, list[str]]:
    path = resources.files("sft_probe.synth").joinpath("leaks.yaml")
    lists: dict[str, list[str]] = yaml.safe_load(path.read_text("utf-8"))
    return lists


@cache
def _pattern(name: str) -> "regex.Pattern[str]":
    """Return the pattern for a list of `leaks.yaml`."""
    return regex.compile(_expand(name), 0 if name == "token" else regex.IGNORECASE)


def _expand(name: str) -> str:
    alternatives = "|".join(_lists()[name])
    names = r"<(yes|here|rewrite)>"
    return str(regex.sub(names, lambda match: f"(?:{_expand(match[1])})", alternatives))


def _find(name: str, text: str) -> "regex.Match[str] | None":
    return _pattern(name).search(text)


def _starts(name: str, text: str) -> bool:
    return _pattern(name).match(text) is not None


def is_leak(text: str, template_text: str, context: str, *, is_answer: bool) -> bool:
    """Return whether a text speaks of its task, is wrapped in marks, or repeats six words in a row
    of its template.

    Args:
        text: the written text.
        template_text: the prompt template.
        context: the user's turns and the text that this one is made from, whose words it may use.
        is_answer: whether the text answers the user, as `variant` does, and so may offer more help.
    """
    text = text.replace("\u2019", "'")
    if any(match[0] not in context for match in _pattern("token").finditer(text)):
        return True
    if not word_runs(text).isdisjoint(word_runs(template_text)):
        return True
    return (
        _is_wrapped(text, context)
        or _is_labelled(text, template_text, context)
        or _is_announced(text, context, is_answer)
        or _has_remark(text, context, is_answer)
    )


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Return every run of six words."""
    parts = regex.findall(r"\w+", text.lower())
    return {tuple(parts[i : i + _LEAKED_WORDS]) for i in range(len(parts) - _LEAKED_WORDS + 1)}


def _is_wrapped(text: str, context: str) -> bool:
    """Return whether the whole text is a tag, code fence or JSON object, unlike the context."""
    if "<" not in context and _WRAPPED.fullmatch(text):
        return True
    if "```" not in context and text.count("```") == 2 and _FENCED.fullmatch(text):
        return True
    if "{" in context or not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_labelled(text: str, template_text: str, context: str) -> bool:
    """Return whether the text starts with a label in the words of its template."""
    found = _OWN_LABEL.match(text)
    if found is None or found[0] in context:
        return False
    parts = [part for part in regex.findall(r"\w+", found[1].lower()) if len(part) >= _LONG_LETTERS]
    known = set(regex.findall(r"\w+", template_text.lower()))
    return len(parts) > 1 and known.issuperset(parts)


def _is_announced(text: str, context: str, is_answer: bool) -> bool:
    """Return whether the text starts with a label, a thought, or a line that says what follows."""
    asks_to_rewrite = _find("rewrite", context) is not None
    if (
        _starts("thought", text)
        or _starts("as_asked", text)
        or (_starts("label", text) and not _starts("label", context))
        or (_find("inner_label", text) and not asks_to_rewrite)
        or (not is_answer and _is_headed(text, context))
    ):
        return True
    about, said = "about_task" if is_answer else "about_text", ""
    sentences = _SENTENCE.split(text[:_OPENING].lstrip())
    for sentence in sentences[:3]:
        said += sentence + " "
        found = _find(about, said)
        if found and found[0].lower() not in context.lower() and _starts("preamble", sentence):
            return True
    plans = _find("rewrite", said) and _find("first_person", said)
    if plans and not is_answer and not asks_to_rewrite:
        return True
    opening = said if len(said.split()) <= 3 else sentences[0]
    found = _find("rewrite", opening)
    if found is None or found[0].lower() in context.lower():
        return False
    line = text.lstrip().split("\n", 1)[0].rstrip("*_ ")
    return line.endswith((":", "\uff1a")) or _find("first_person", opening) is not None


def _is_headed(text: str, context: str) -> bool:
    """Return whether the text starts with a heading or an announcement, or speaks of a given
    text."""
    opening = text[:_OPENING]
    if _find("given_text", opening) or (_HEADING.match(text) and not _HEADING.match(context)):
        return True
    if _find("rewritten_text", opening) and _find("rewrite", context) is None:
        return True
    return bool(_ANNOUNCEMENT.match(text)) and not regex.search(r"[:\uff1a]\s*(?:\n|$)", context)


def _has_remark(text: str, context: str, is_answer: bool) -> bool:
    """Return whether the text ends with a remark on itself: a note, an account of changes, its
    length, an offer to try again."""
    remark = _REMARK.search(text)
    is_aside = bool(_ASIDE.search(text) and not _ASIDE.search(context)) or bool(
        remark and _find("on_text", remark[1])
    )
    if (
        _find("count", text)
        or (is_aside and not is_answer)
        or (_starts("account", text) and not _starts("account", context))
    ):
        return True
    paragraphs = [part for part in _PARAGRAPH.split(text) if part.strip("-*_ \n")]
    asks_to_rewrite = _find("rewrite", context) is not None
    for paragraph in paragraphs[1:]:
        if (
            (_starts("rewriting", paragraph) and not asks_to_rewrite)
            or _starts("account", paragraph)
            or (_starts("note", paragraph) and _find("on_text", paragraph))
        ):
            return True
    sentences = [part for part in _SENTENCE.split(text) if part.strip()]
    tail = " ".join([*sentences[1:][-2:], *paragraphs[1:][-1:]]) if len(sentences) > 1 else ""
    if _find("did", tail) and _find("on_text", tail):
        return True
    if _find("offer", tail) is None or _find("offer", context):
        return False
    return bool(_find("revision", tail) or (not is_answer and _find("to_reader", tail)))
