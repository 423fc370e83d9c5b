"""What is tried on a model before its numbers are believed: made-up docs through its own forward
pass."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sft_probe.errors import UserError
from sft_probe.scoring.head import no_cache
from sft_probe.scoring.packing import Continuation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH_WORDS = ("window", "chunk", "local", "original_max_position", "topk", "top_k", "block_size")
"""In the names of what a config gives a number of tokens to, from which on a model computes in
another way."""
_SHORT = 24
_CAUSAL_LENGTH = 32
_NO_LANGUAGE_MODEL = "sft-probe scores and trains decoder-only (causal) language models"


def check_language_model(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Raise `UserError` where a model is no causal LM: encoder-decoder, without a head, or one that
    reads ahead.

    The last is tried, as `is_decoder` and its like are not to be trusted: the later half of a
    made-up text is replaced and left out, and the logits of the earlier half must stay, but for the
    rounding of `dtype`.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model. {_NO_LANGUAGE_MODEL}.")
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no language-model head. {_NO_LANGUAGE_MODEL}.")
    random = np.random.default_rng(1)
    half = _CAUSAL_LENGTH // 2
    start, *ends = (_token_ids(model, half, random) for _ in range(3))
    before, *others = (
        plain_logits(model, start + end)[:half].log_softmax(dim=-1) for end in (*ends, [])
    )
    leak = max(float((before - other).abs().mean()) for other in others)
    if leak > (0.05 if is_coarse(dtype) else 1e-4) * float(before.std(dim=0).mean()) + 1e-6:
        raise UserError(
            f"{name} reads ahead: what follows a token changes its logits (by {leak:.2g} nats). "
            f'{_NO_LANGUAGE_MODEL}. BERT and its like need "is_decoder": true in config.json, and '
            "to be trained so."
        )


def made_up_items(model: "PreTrainedModel", longest: int) -> list[Continuation]:
    """Return prefixes with continuations that start alike; one of them is longer than every length
    that the config names, if `longest` is."""
    random = np.random.default_rng(0)
    room = max(longest - 16, 1)
    lengths = {_SHORT, *(length + 8 for length in _named_lengths(model) if length < longest)}
    items = []
    for length in sorted({min(max(_SHORT, length), room) for length in lengths}):
        prefix, stem = (_token_ids(model, n, random) for n in (length, 3))
        items += [Continuation(prefix, stem + _token_ids(model, n, random), 0) for n in (2, 9)]
    return items


def plain_logprobs(model: "PreTrainedModel", item: Continuation) -> npt.NDArray[np.float32]:
    """Return the log-probs of the continuation, from the model's own forward of one text alone."""
    logits = plain_logits(model, [*item.prefix_ids, *item.continuation_ids])
    start = len(item.prefix_ids)
    rows = logits[start - 1 : -1].log_softmax(dim=-1)
    targets = torch.tensor(item.continuation_ids, device=rows.device)
    found: npt.NDArray[np.float32] = rows.gather(1, targets[:, None])[:, 0].cpu().numpy()
    return found


def plain_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Return the float32 logits [L, V] of one text, from the model's own forward.

    Raises:
        UserError: the model cannot read a text.
    """
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device), **no_cache(model)}
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot read a text of {len(token_ids)} tokens: "
            f"{type(error).__name__}: {error}"
        ) from error
    if logits.dim() != 3 or tuple(logits.shape[:2]) != (1, len(token_ids)):
        raise UserError(
            f"{type(model).__name__} gives logits {list(logits.shape)}, not one row per token."
        )
    return logits[0].float()


def is_close(
    found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], dtype: torch.dtype
) -> tuple[bool, float]:
    """Return whether two ways to compute the same log-probs agree, and how far they are apart, in
    nats.

    In 16 bits, or where float32 products are rounded to them, two ways round differently, but a
    wrong mask is off by far more in the mean. In 32 bits no token may differ by a thousandth of
    what tokens differ from each other.
    """
    if is_coarse(dtype):
        difference = float(np.abs(found - expected).mean())
        return difference <= 0.05, difference
    difference = float(np.abs(found - expected).max())
    return bool(difference <= np.clip(3e-4 * expected.std(), 2e-5, 1e-3)), difference


def is_coarse(dtype: torch.dtype) -> bool:
    """Return whether products are rounded to less than float32."""
    return dtype.itemsize < 4 or (
        torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    )


def _token_ids(model: "PreTrainedModel", num_tokens: int, random: np.random.Generator) -> list[int]:
    """Return ids of text, without those that the config gives a meaning to, images for one."""
    special = set(_numbers(model.config.to_dict(), ("token_id", "token_index")))
    ids = np.setdiff1d(np.arange(model.config.get_text_config().vocab_size), list(special))
    chosen: list[int] = random.choice(ids, size=num_tokens).tolist()
    return chosen


def _named_lengths(model: "PreTrainedModel") -> set[int]:
    return set(_numbers(model.config.get_text_config().to_dict(), _LENGTH_WORDS))


def _numbers(config: dict[str, Any], words: tuple[str, ...]) -> Iterator[int]:
    """Yield positive integers, alone or in a list, under a name that has one of `words` in it, at
    any depth."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, words)
        elif any(word in str(name) for word in words):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                    yield number
