"""Greedy answers to fixed held-out prompts at a checkpoint.

Sums over given texts do not show what a model writes by itself: when it stops, how long it goes on,
what it repeats.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sft_probe.errors import UserError
from sft_probe.models import continue_prompts
from sft_probe.prompts import EncodedDoc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
_NGRAM = 4


def generation_docs(docs: Sequence[EncodedDoc], num_docs: int, max_length: int) -> list[EncodedDoc]:
    """Return the first `num_docs` held-out docs whose prompts leave room for an answer of
    `max_new_tokens(max_length)`.

    Raises:
        UserError: there are not that many.
    """
    room = max_length - max_new_tokens(max_length)
    fitting = [doc for doc in docs if doc.doc.split == "heldout" and len(doc.prompt_ids) <= room]
    if len(fitting) < num_docs:
        raise UserError(
            f"--generate {num_docs}: only {len(fitting)} held-out prompts have at most {room} "
            "tokens, which leaves "
            f"{max_length - room} of max_length {max_length} for an answer."
        )
    return fitting[:num_docs]


def max_new_tokens(max_length: int) -> int:
    """Return the most tokens that an answer may have: 256, or half of a shorter `max_length`."""
    return min(MAX_NEW_TOKENS, max_length // 2)


def generate_answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    docs: Sequence[EncodedDoc],
    *,
    ends: Sequence[int],
    limit: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return a row per doc: `doc_id conversation_id split text num_tokens num_bytes ended
    repetition max_new_tokens`.

    `num_tokens` does not count the terminator; `ended` says whether one of `ends` came within
    `limit` tokens. The text stands as it was decoded, special tokens included.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    rows = []
    with _greedy(model, ends, limit):
        for start in range(0, len(docs), batch_size):
            batch = docs[start : start + batch_size]
            prompts = [doc.prompt_ids for doc in batch]
            answers = continue_prompts(
                model, prompts, pad=int(ends[0]), logits_processor=[_check_finite]
            )
            rows += [
                _row(doc, tokenizer, answer, ends, limit)
                for doc, answer in zip(batch, answers, strict=True)
            ]
    return rows


@contextmanager
def _greedy(model: Any, ends: Sequence[int], limit: int) -> Iterator[None]:
    """Lend the model a generation config of ours: its own may ask for sampling or penalties, and
    fills what calls leave open."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        eos_token_id=list(ends),
        pad_token_id=int(ends[0]),
    )
    try:
        yield
    finally:
        model.generation_config = own


def _check_finite(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(scores).all():
        raise FloatingPointError("the logits are NaN or infinite")
    return scores


def _row(
    doc: EncodedDoc,
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    ends: Sequence[int],
    limit: int,
) -> dict[str, Any]:
    end = next((place for place, token_id in enumerate(ids) if token_id in ends), None)
    answer = ids[:end]
    text = str(tokenizer.decode(answer))
    return {
        "doc_id": doc.doc.doc_id,
        "conversation_id": doc.doc.conversation_id,
        "split": doc.doc.split,
        "text": text,
        "num_tokens": len(answer),
        "num_bytes": len(text.encode()),
        "ended": end is not None,
        "repetition": repetition(answer),
        "max_new_tokens": limit,
    }


def repetition(ids: Sequence[int]) -> float | None:
    """Return the share of 4-grams of tokens that stood there before: seq-rep-4 of Welleck et al.
    2020 (arXiv 1908.04319).

    `None` for fewer than 4 tokens.
    """
    grams = [tuple(ids[place : place + _NGRAM]) for place in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
