"""Score rows, the one table that everything else is made from: one per run, step, split, category,
doc and source."""

from typing import Any

COLUMNS = {
    "run": "string",
    "model": "string",
    "train_category": "string",
    "order_seed": "int64",
    "step": "int64",
    "examples_seen": "int64",
    "tokens_seen": "int64",
    "epoch": "float64",
    "category": "string",
    "split": "string",
    "doc_id": "string",
    "conversation_id": "string",
    "prompt_format": "string",
    "num_tokens": "int64",
    "num_bytes": "int64",
    "logprob": "float64",
    "logprob_first": "float64",
    "logprob_eos": "float64",
    "token_logprobs": "list<float32>",
    "is_greedy": "bool",
    "weights_dtype": "string",
    "compute_dtype": "string",
    "source": "string",
}
"""Name to type, in order."""
DOC_COLUMNS = ("category", "split", "doc_id", "conversation_id", "prompt_format", "num_bytes")


def score_row(
    columns: dict[str, Any],
    doc: dict[str, Any],
    *,
    logprob: float,
    token_logprobs: list[float],
    first: int,
    logprob_eos: float | None,
    is_greedy: bool,
) -> dict[str, Any]:
    """One row; log-probs in nats.

    Args:
        columns: those of the run, the step and the source.
        doc: has at least `DOC_COLUMNS`.
        logprob: sum over the response without the terminator.
        token_logprobs: [num_tokens]
        first: index of the first token that holds more than white space.
        logprob_eos: of the terminator after the response.
        is_greedy: greedy decoding would write the response.
    """
    row = {
        **columns,
        **{name: doc[name] for name in DOC_COLUMNS},
        "num_tokens": len(token_logprobs),
        "logprob": logprob,
        "logprob_first": token_logprobs[first],
        "logprob_eos": logprob_eos,
        "token_logprobs": token_logprobs,
        "is_greedy": is_greedy,
    }
    return {name: row[name] for name in COLUMNS}
