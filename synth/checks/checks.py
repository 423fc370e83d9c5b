"""Faults of written texts. Plain patterns and counts, so that a user can see why a text was
refused."""

from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.categories import Template
from sft_probe.synth.checks.copies import is_near_copy
from sft_probe.synth.checks.endings import is_finished
from sft_probe.synth.checks.leaks import is_leak
from sft_probe.synth.checks.refusals import is_refusal
from sft_probe.synth.checks.words import count_words
from sft_probe.synth.report import prompt_text
from sft_probe.synth.sources import SourcePair

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.5, 2.0
SLACK_WORDS = 5
"""So many words off are never a fault: for answers of a few words the ratio says little."""


def fault_of(request: Request, answer: Answer, pair: SourcePair, template: Template) -> str | None:
    """The first thing wrong with an answer, in one word or two; `None` for a good one."""
    text = (answer.text or "").strip()
    if answer.status != "ok" or not text:
        return answer.status if answer.status != "ok" else "empty"
    # a non-response speaks of its topic, in the words of it where the writer likes
    source_text = request.source_text if request.category != "non_response" else ""
    context = f"{source_text}\n{prompt_text(pair.messages)}"
    is_answer = request.category == "variant"
    faults = {
        "refusal": is_refusal(text, source_text),
        "leak": is_leak(text, template.text, context, is_answer=is_answer),
        "cut off": not is_finished(text),
        "near-copy": any(
            is_near_copy(text, other) for other in {source_text, pair.chosen, pair.rejected}
        ),
        "length": not has_length(text, request.num_words),
    }
    return next((name for name, is_found in faults.items() if is_found), None)


def has_length(text: str, num_words: int) -> bool:
    """Whether a text is within half and twice the words aimed at, or within 5 words of them."""
    written = count_words(text)
    within = MIN_LENGTH_RATIO * num_words <= written <= MAX_LENGTH_RATIO * num_words
    return within or abs(written - num_words) <= SLACK_WORDS
