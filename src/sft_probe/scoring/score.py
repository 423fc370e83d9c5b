"""The one scorer: log-probabilities of many continuations under a causal LM, each distinct prefix
computed once.

Continuations that start alike are packed into one sequence (`packing`) under a mask of their tree
(`attention`). The body of the model runs once per batch; the model's own `forward` then maps the
rows that predict something to logits, a chunk of rows at a time, so that soft-capping and scaling
are the model's and no tensor of [tokens, vocabulary] exists (`head`). Whether this is right for a
model is not assumed but tried (`choose_mode`).
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sft_probe.errors import UserError
from sft_probe.scoring.attention import (
    ALONE,
    PLAIN,
    ForwardMode,
    attention_in_blocks,
    candidates,
    make_masks,
)
from sft_probe.scoring.head import logits_in_chunks
from sft_probe.scoring.packing import Continuation, IntArray, Pack, batches, pack_alone, pack_shared
from sft_probe.scoring.targets import Distances, TargetScores, TokenColumns, read_targets
from sft_probe.scoring.trials import check_language_model, is_close, made_up_items, plain_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_MAX_PACK_TOKENS = 1024
"""Longer packs waste attention on unrelated tokens (GPU) and overflow the cache (CPU)."""
_HEAD_ROW_COST = 1 / 32
_MAX_HEAD_ROWS = 2048
_CHECK_HEAD_ROWS = 7
"""So few that the head runs in several chunks where it is checked."""


def default_max_tokens(device: str) -> int:
    """Return the token budget of one forward pass. More keeps a GPU busy, but overflows the cache
    of a CPU."""
    return 1024 if torch.device(device).type == "cpu" else 16384


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says of one continuation of R tokens; natural logarithms."""

    token_logprobs: npt.NDArray[np.float32]
    """[R]"""
    greedy_tokens: npt.NDArray[np.bool_]
    """[R], True where no token has a higher logit."""
    logprob_eos: float | None
    """Log-prob of the terminator; `None` where none was asked for."""
    columns: TokenColumns | None = None
    """More of each token; `None` where the log-probs alone were asked for."""
    distances: Distances | None = None
    """How far the model is from a reference at each token; `None` without one."""

    @classmethod
    def of(cls, found: TargetScores, start: int, item: Continuation) -> "Score":
        """Return the score of an item whose targets begin at `start`."""
        stop = start + len(item.continuation_ids)
        return cls(
            token_logprobs=found.logprobs[start:stop],
            greedy_tokens=found.greedy[start:stop],
            logprob_eos=None if item.terminator_id is None else float(found.logprobs[stop]),
            columns=found.columns and found.columns.between(start, stop),
            distances=found.distances and found.distances.between(start, stop),
        )

    @property
    def logprob(self) -> float:
        """Sum over the continuation, in float64."""
        return float(self.token_logprobs.sum(dtype=np.float64))

    @property
    def is_finite(self) -> bool:
        """False where the model gave NaN or an infinity."""
        return bool(np.isfinite([*self.token_logprobs, self.logprob_eos or 0]).all())

    @property
    def is_greedy(self) -> bool:
        """True where greedy decoding would write the continuation."""
        return bool(self.greedy_tokens.all())


class FittingScorer:
    """`score` for one model after another: the mode is chosen once, the budget halved where memory
    runs out.

    Args:
        max_tokens: the budget at first, as for `score`.
        longest: as for `choose_mode`.
        may_shrink: False where other processes take part in each forward pass and would still go by
            the old budget.
        with_columns: as for `score`.
    """

    def __init__(
        self,
        max_tokens: int,
        longest: int,
        *,
        may_shrink: bool = True,
        with_columns: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        self.longest = longest
        self.may_shrink = may_shrink
        self.with_columns = with_columns
        self.mode: ForwardMode | None = None
        self.reference: Reference | None = None
        """As for `score`."""

    def score(
        self, model: "PreTrainedModel", items: Sequence[Continuation]
    ) -> Iterator[tuple[int, Score]]:
        """Score like `score`, but halve the token budget and start over when memory runs out. An
        index may be yielded twice; keep the last value.

        Raises:
            UserError: one item alone does not fit.
        """
        while True:
            try:
                if self.mode is None:
                    self.mode = choose_mode(model, self.longest)
                yield from score(
                    model,
                    items,
                    max_tokens=self.max_tokens,
                    mode=self.mode,
                    with_columns=self.with_columns,
                    reference=self.reference,
                )
                return
            except torch.OutOfMemoryError as error:
                if not self.may_shrink:
                    raise UserError(
                        f"{self.max_tokens} tokens at a time do not fit the memory."
                    ) from error
                if self.max_tokens < max(len(item.input_ids) for item in items):
                    raise UserError(
                        "one response alone does not fit the memory; try bfloat16 or a GPU."
                    ) from error
            self.max_tokens //= 2
            torch.cuda.empty_cache()
            log.warning(
                "out of memory: from the start again, with %d tokens at a time", self.max_tokens
            )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A second model, from which the distance of the first is taken at every token."""

    model: "PreTrainedModel"
    """Of the same token ids and number of logits."""
    mode: ForwardMode
    """What `choose_mode` returned for it."""


def _common_modes(mode: ForwardMode, other: ForwardMode) -> tuple[ForwardMode, ForwardMode]:
    """Return modes of two models that read the same packs, which only two of a kind do."""
    if mode.shared and other.shared:
        return mode, other
    weakest = ALONE if mode.alone or other.alone else PLAIN
    return weakest, weakest


def choose_mode(model: "PreTrainedModel", longest: int) -> ForwardMode:
    """Return the fastest mode whose log-probs agree with the model's own plain forward.

    It is tried on a few made-up docs.

    ALiBi, recurrent and hybrid models and FlashAttention do not pass with shared prefixes, and are
    scored without; the log says so.

    Args:
        model: as for `score`.
        longest: the most tokens that an item will have: docs are longer than the model's sliding
            window, and whatever else its config gives a length to, where items can be.

    Raises:
        UserError: the model is no causal LM, or no mode gives what its plain forward gives.
    """
    check_language_model(model, model.dtype)
    items = made_up_items(model, longest)
    expected = np.concatenate([plain_logprobs(model, item) for item in items])
    if not np.isfinite(
        expected
    ).all():  # nothing can be compared; whoever scores counts and names them
        return PLAIN
    attention = model.config._attn_implementation
    reason = f"its attention, {attention!r}, takes no mask of ours"
    for mode in (*candidates(model), PLAIN, ALONE):
        try:
            is_right, difference = is_close(
                _token_logprobs(model, items, mode), expected, model.dtype
            )
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # whatever a model's own code raises on a mask that it does not know
            found = f"{type(error).__name__}: {error}"
        else:
            if is_right:
                _log_mode(model, mode, reason)
                return mode
            found = f"log-probs are off by {difference:.2g} nats"
        reason = f"with shared prefixes {found}" if mode.shared else found
    raise UserError(
        f"{type(model).__name__} cannot be scored: beside the model's own plain forward pass, "
        f"{reason}."
    )


def _log_mode(model: "PreTrainedModel", mode: ForwardMode, reason: str) -> None:
    if mode.shared:
        log.info("%s: shared prefixes are computed once", type(model).__name__)
    elif mode.alone:
        log.info(
            "%s: each continuation is computed alone (batched, %s)", type(model).__name__, reason
        )
    else:
        log.info(
            "%s: each continuation is computed with its whole prefix (%s)",
            type(model).__name__,
            reason,
        )


def _token_logprobs(
    model: "PreTrainedModel", items: list[Continuation], mode: ForwardMode
) -> npt.NDArray[np.float32]:
    scores = dict(
        score(model, items, max_tokens=_MAX_PACK_TOKENS, mode=mode, head_rows=_CHECK_HEAD_ROWS)
    )
    return np.concatenate([scores[i].token_logprobs for i in range(len(items))])


def score(
    model: "PreTrainedModel",
    items: Sequence[Continuation],
    *,
    max_tokens: int,
    mode: ForwardMode,
    head_rows: int | None = None,
    with_columns: bool = False,
    reference: Reference | None = None,
) -> Iterator[tuple[int, Score]]:
    """Yield the index of each item and its score, batch by batch.

    Args:
        model: a causal LM in eval mode, on the device where it is to run.
        items: token ids; ids that start alike are computed once.
        max_tokens: the budget of one forward pass. It counts tokens read by the body; beside them
            as many rows go through the head at a time as weigh the same, V / (32 x hidden) tokens
            each.
        mode: what `choose_mode` returned for this model, or `PLAIN`.
        head_rows: rows that go through the head at a time, instead of that.
        with_columns: also give `Score.columns`.
        reference: also give `Score.distances` from it, at the cost of a second forward pass; both
            models' logits are held a chunk at a time.
    """
    if reference is not None:
        mode, other = _common_modes(mode, reference.mode)
        reference = Reference(model=reference.model, mode=other)
    head_rows = head_rows or _head_rows(model, max_tokens)
    packs = (
        pack_shared(items, min(max_tokens, _MAX_PACK_TOKENS)) if mode.shared else pack_alone(items)
    )
    with torch.no_grad():
        suspects = []
        for batch in batches(list(packs), 0 if mode.alone else max_tokens):
            for index, result in _score_batch(
                model,
                items,
                batch,
                head_rows,
                mode=mode,
                with_columns=with_columns,
                reference=reference,
            ):
                if result.is_finite or not mode.shared:
                    yield index, result
                else:  # NaN times an attention of 0 is NaN: one item spoils its whole pack
                    suspects.append(index)
        if suspects:
            for number, result in score(
                model,
                [items[i] for i in suspects],
                max_tokens=max_tokens,
                mode=PLAIN,
                with_columns=with_columns,
                reference=reference,
            ):
                yield suspects[number], result


def _score_batch(
    model: "PreTrainedModel",
    items: Sequence[Continuation],
    batch: list[Pack],
    head_rows: int,
    *,
    mode: ForwardMode,
    with_columns: bool,
    reference: Reference | None,
) -> Iterator[tuple[int, Score]]:
    length = max(len(pack.token_ids) for pack in batch)
    indices = [i for pack in batch for i in pack.items]
    nodes = np.concatenate(
        [row * length + rows for row, pack in enumerate(batch) for rows in pack.rows]
    )
    targets = np.concatenate([items[i].target_ids for i in indices])
    rows, row_of_target = np.unique(nodes, return_inverse=True)
    with ExitStack() as stack:
        chunks, *others = [
            stack.enter_context(
                closing(_logits(one, _inputs(one, batch, length, own), rows, head_rows, own))
            )
            for one, own in [
                (model, mode),
                *([(reference.model, reference.mode)] if reference else []),
            ]
        ]
        found = read_targets(
            chunks,
            row_of_target,
            targets,
            with_columns=with_columns,
            reference=others[0] if others else None,
        )
    start = 0
    for i in indices:
        yield i, Score.of(found, start, items[i])
        start += len(items[i].target_ids)


def _inputs(
    model: "PreTrainedModel", batch: list[Pack], length: int, mode: ForwardMode
) -> dict[str, Any]:
    """Return the model's inputs, padded on the right, where no token sees it; padding sees itself,
    so that no softmax is empty."""
    token_ids = np.zeros((len(batch), length), np.int64)
    position_ids = np.zeros((len(batch), length), np.int64)
    mask = (
        np.zeros((len(batch), 1, length, length), dtype=bool)
        if mode.shared
        else np.empty(0, dtype=bool)
    )
    if mode.shared:
        mask[:, 0] = np.eye(length, dtype=bool)
    for row, pack in enumerate(batch):
        token_ids[row, : len(pack.token_ids)] = pack.token_ids
        position_ids[row, : len(pack.token_ids)] = pack.position_ids
        if pack.mask is not None:
            mask[row, 0, : len(pack.mask), : len(pack.mask)] = pack.mask
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(token_ids).to(model.device)}
    if not mode.shared:
        return inputs
    positions = torch.from_numpy(position_ids).to(model.device)
    masks = make_masks(model, torch.from_numpy(mask).to(model.device), positions, mode)
    return inputs | {"position_ids": positions, "attention_mask": masks}


def _logits(
    model: "PreTrainedModel",
    inputs: dict[str, Any],
    rows: IntArray,
    head_rows: int,
    mode: ForwardMode,
) -> Generator[torch.Tensor, None, None]:
    """Yield the logits [chunk, V] of `rows` of the flattened batch, chunk by chunk."""
    with attention_in_blocks(model, inputs["attention_mask"]) if mode.blocks else nullcontext():
        yield from logits_in_chunks(
            model, inputs, torch.from_numpy(rows).to(model.device), head_rows
        )


def _head_rows(model: "PreTrainedModel", max_tokens: int) -> int:
    config = model.config.get_text_config()
    return min(
        _MAX_HEAD_ROWS,
        max(16, int(max_tokens * config.hidden_size / config.vocab_size / _HEAD_ROW_COST)),
    )
