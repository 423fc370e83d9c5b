"""Whether a text refuses, in the languages that models are asked in.

A refusal says that it is sorry, that it cannot, what it cannot do (help, answer, write), or that it
is a machine or has rules. One of the first three alone is no refusal: "I can't say for certain" is
an answer, and so is "I can't recommend one without knowing your budget". The words stand in
`refusals.yaml`.
"""

import re
from functools import cache
from importlib import resources

import yaml

_START, _APOLOGY_START = 400, 120
"""Characters: who refuses does so at the start."""
_CONDITION = re.compile(
    r"\b(?:exact|definit\w+|precise|certain) "
    r"(?:answer|number|summary|figure|date|price|estimate|time)"
    r"|absolute "
    r"certainty|\b(?:without|until|unless|before|sans|ohne|sin|senza|sem|zonder|bez|без|не "
    r"зная|olmadan)\b"
    r"|如果不|不知道|分からないと|모르면",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f\u0964])\s*|\n+")
_APOLOGY = re.compile(r"\b(sorry|apolog\w+)\b", re.IGNORECASE)


def is_refusal(text: str, source_text: str) -> bool:
    """Whether a text refuses. One that is made from a refusal or an apology may."""
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
            # in English what is not done comes after: "that is a question I can't answer with
            # certainty"
            asked = sentence[found.start() :] if sentence.isascii() else sentence
            if is_sorry or task.search(asked):
                return True
    return False


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], list[tuple[re.Pattern[str], ...]]]:
    """The words of a machine and of inability in all languages; then those of apology, inability
    and task in each."""
    path = resources.files("sft_probe.synth.checks").joinpath("refusals.yaml")
    languages = list(yaml.safe_load(path.read_text("utf-8")).values())

    def compiled(*lists: list[str]) -> re.Pattern[str]:
        return re.compile("|".join(word for words in lists for word in words), re.IGNORECASE)

    return (
        compiled(*(language["machine"] for language in languages)),
        compiled(*(language["cannot"] for language in languages)),
        [
            tuple(compiled(language[name]) for name in ("sorry", "cannot", "task"))
            for language in languages
        ],
    )
