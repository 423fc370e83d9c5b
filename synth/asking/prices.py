"""What a call costs: list prices of the day they were read, or the user's own."""

from dataclasses import dataclass

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Named, Request

PRICES_DATE = "2026-10-07"
PRICES_SOURCE = "https://ai.google.dev/gemini-api/docs/pricing"
# USD per million tokens of input and of output (thinking included), for prompts up to 200k tokens
_PRICES = {
    "gemini-3.8-flash": (
        1.50,
        7.50,
    ),  # half of it through 2026-12-31; a budget should not break on the day after
    "gemini-3.7-flash": (1.50, 7.50),  # likewise
    "gemini-3.6-flash": (1.50, 7.50),  # likewise
    "gemini-3.5-flash": (1.50, 9.00),
    "gemini-3.5-flash-lite": (0.30, 2.50),
    "gemini-3.1-pro-preview": (2.00, 12.00),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
}
_BATCH_FACTOR = 0.5
LOCAL_WRITERS = ("hf", "offline")
"""They are free, and cannot be misconfigured at a distance."""
# for the expected cost alone: English text has about four bytes and three quarters of a word per
# token
_BYTES_PER_TOKEN = 4
_TOKENS_PER_WORD = 4 / 3
_TEMPLATE_TOKENS = 128
# what no count of a working server passes
_MAX_BYTES_PER_TOKEN = 128
_MAX_OUTPUT_TOKENS = 200_000


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input_usd: float
    output_usd: float

    def cost_usd(self, num_prompt_tokens: float, num_output_tokens: float) -> float:
        """Return the cost of one or many calls with this many tokens."""
        return (num_prompt_tokens * self.input_usd + num_output_tokens * self.output_usd) / 1e6

    def answer_usd(self, request: Request, answer: Answer) -> float:
        """Return the cost of one answer: its worst case where the server's count is missing or
        cannot be."""
        prompt, output = answer.num_prompt_tokens, answer.num_output_tokens
        if answer.num_prompt_tokens == 0 and not answer.is_final:
            return 0.0  # nothing was written
        if prompt is None or output is None or _is_absurd(request, answer, prompt, output):
            return self.worst_usd(request)
        return self.cost_usd(prompt, output)

    def worst_usd(self, request: Request) -> float:
        """Return the most that one call can cost: no token is shorter than a byte, no output longer
        than allowed."""
        return self.cost_usd(max_prompt_tokens(request), request.max_output_tokens)


def parse_price(text: str) -> Price:
    """Return a `Price` from `INPUT,OUTPUT` in USD per million tokens. Raises `UserError` for
    anything else."""
    parts = text.split(",")
    try:
        input_usd, output_usd = (float(part) for part in parts)
    except ValueError:
        input_usd = output_usd = -1.0
    if not (0 <= input_usd < float("inf") and 0 <= output_usd < float("inf")):
        raise UserError(
            f"{text!r} is no price. Give USD per million tokens of input and of output, such as "
            "0.30,2.50."
        )
    return Price(input_usd, output_usd)


def price_of(writer: Named) -> Price | None:
    """Return the list price of the writer's model; None where it is not in the table. Local writers
    are free."""
    if writer.name in LOCAL_WRITERS:
        return Price(0.0, 0.0)
    prices = _PRICES.get(writer.model.removeprefix("models/"))
    if prices is None or not writer.name.startswith("gemini"):
        return None
    factor = _BATCH_FACTOR if writer.name == "gemini-batch" else 1.0
    return Price(prices[0] * factor, prices[1] * factor)


def _is_absurd(request: Request, answer: Answer, prompt: int, output: int) -> bool:
    """Whether a count is far too small for what was sent and written, or far beyond what any model
    takes."""
    return (
        prompt * _MAX_BYTES_PER_TOKEN < _num_bytes(request.prompt)
        or output * _MAX_BYTES_PER_TOKEN < _num_bytes(answer.text or "")
        or prompt == 0
        or output > _MAX_OUTPUT_TOKENS
    )


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def max_prompt_tokens(request: Request) -> int:
    """Return an upper bound: its UTF-8 bytes, and some for what a chat template adds."""
    return _num_bytes(request.prompt) + _TEMPLATE_TOKENS


def expected_prompt_tokens(request: Request) -> float:
    """Return a guess without a tokenizer."""
    return _num_bytes(request.prompt) / _BYTES_PER_TOKEN


def expected_output_tokens(request: Request) -> float:
    """Return a guess without a tokenizer: the length asked for."""
    return min(request.num_words * _TOKENS_PER_WORD, request.max_output_tokens)
