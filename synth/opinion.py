"""A second opinion on the texts that pass the checks: the writer itself is asked whether each does
what was asked."""

import hashlib
import re
from dataclasses import replace

from sft_probe.synth.asking.protocol import Answer, Request

CATEGORY = "judge"
FAULT, NO_VERDICT = "judged", "no verdict"
_WORD = re.compile(r"\w+")
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
"""So many bytes of a text are shown for each token that it may have, which bounds what an opinion
costs."""


def opinion_request(request: Request, text: str, thinking_tokens: int) -> Request:
    """Return what the writer is asked about a text that it wrote."""
    most_bytes = _BYTES_PER_TOKEN * request.max_output_tokens
    shown = text.strip().encode(errors="ignore")[:most_bytes].decode(errors="ignore")
    return replace(
        request,
        category=CATEGORY,
        template=_TEMPLATE,
        template_sha256=hashlib.sha256(_PROMPT.encode()).hexdigest(),
        prompt=_PROMPT.format(task=request.prompt, text=shown),
        source_text=shown,
        num_words=1,
        temperature=0.0,
        max_output_tokens=_OUTPUT_TOKENS + thinking_tokens,
    )


def expected_opinion(request: Request, thinking_tokens: int) -> Request:
    """Return what will be asked about a text of the length that is asked for, for an estimate."""
    return opinion_request(request, "a word " * request.num_words, thinking_tokens)


def longest_opinion(request: Request, thinking_tokens: int) -> Request:
    """Return the longest that can be asked about a text, for an upper bound."""
    return opinion_request(
        request, "x" * (_BYTES_PER_TOKEN * request.max_output_tokens), thinking_tokens
    )


def fault_in(opinion: Answer) -> str | None:
    """Return None for a yes, `judged` for a no, `no verdict` for anything else."""
    words = _WORD.findall((opinion.text or "").casefold()) if opinion.status == "ok" else []
    return {"yes": None, "no": FAULT}.get(words[0], NO_VERDICT) if words else NO_VERDICT
