"""Logits of chosen rows alone, from a model's own forward: the hidden states are cut where the head
takes them.

The head is the module that the model itself names (`get_output_embeddings`), so that it does not
matter which of its modules a model calls its body. What stands between body and logits,
soft-capping and scaling, stays the model's.
"""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as hooks_of_all_modules

from sft_probe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadRows:
    """Cuts what the head of a model reads down to chosen rows of the flattened batch.

    A model whose head is not called with hidden states [B, L, H] runs as it is, and its logits are
    cut.

    Args:
        model: a causal LM; one hook is put on its head, which does nothing outside of `select`.

    Raises:
        UserError: the model has no head.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"{type(model).__name__} has no output head, so that it is no language model."
            )
        self._rows: torch.Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._num_cuts = 0
        self._handle = head.register_forward_pre_hook(self._cut)

    @contextmanager
    def select(self, rows: torch.Tensor, shape: tuple[int, ...]) -> Iterator[None]:
        """Let only `rows`, int64 [R], of a batch of `shape` [B, L] reach the head inside of the
        block."""
        self._rows, self._shape, self._num_cuts = rows, tuple(shape), 0
        try:
            yield
        finally:
            self._rows = None

    def remove(self) -> None:
        """Take the hook off the head."""
        self._handle.remove()

    def _cut(self, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None or not args or tuple(args[0].shape[:-1]) != self._shape:
            return None
        self._num_cuts += 1
        return (args[0].flatten(0, 1)[self._rows][None], *args[1:])

    @property
    def was_cut(self) -> bool:
        """True where the head of the last `select` was given the chosen rows alone."""
        return self._num_cuts > 0

    def of(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits [R, V] of `rows`, out of what the model gave under `select(rows, ...)`.

        Raises:
            UserError: the logits are neither those of the rows nor those of the batch.
        """
        expected = (1, len(rows)) if self.was_cut else self._shape
        if logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
            raise UserError(
                f"the logits of this architecture have the shape {list(logits.shape)}, not [batch, "
                "tokens, vocabulary]."
            )
        return logits[0] if self.was_cut else logits.flatten(0, 1)[rows]


def logits_in_chunks(
    model: "PreTrainedModel", inputs: dict[str, Any], rows: torch.Tensor, chunk_rows: int
) -> Generator[torch.Tensor, None, None]:
    """Yield the logits [chunk, V] of `rows` of the flattened batch, chunk by chunk, from the
    model's own forward.

    All modules that the model calls run in the first pass only. Later passes are given what those
    returned, so that nothing but the head is computed again.
    """
    shape = tuple(inputs["input_ids"].shape)
    inputs = inputs | no_cache(model)
    head = model.get_output_embeddings()
    head_rows = HeadRows(model)
    with ExitStack() as stack:
        stack.callback(head_rows.remove)
        for number, chunk in enumerate(torch.split(rows, chunk_rows)):
            with head_rows.select(chunk, shape):
                if number == 0:
                    with _recorded_calls(head) as calls:
                        logits = model(**inputs).logits
                    if not head_rows.was_cut:
                        yield from torch.split(head_rows.of(logits, rows), chunk_rows)
                        return
                    stack.enter_context(_replayed(calls))
                else:
                    logits = model(**inputs).logits
                logits = head_rows.of(logits, chunk)
            yield logits


def no_cache(model: "PreTrainedModel") -> dict[str, bool]:
    """Return the argument that keeps a model from building a cache of keys and values; a few models
    do not know it."""
    names = inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if {"use_cache", "kwargs"} & set(names) else {}


@contextmanager
def _recorded_calls(head: torch.nn.Module) -> Iterator[dict[torch.nn.Module, list[Any]]]:
    """Record every module that the model's own forward calls before the head, not through another
    one, with its outputs.

    Those that hold the head are left out: they see other rows each time.
    """
    calls: dict[torch.nn.Module, list[Any]] = {}
    depth, at_head = 0, False

    def enter(module: torch.nn.Module, _args: Any) -> None:
        nonlocal depth, at_head
        depth += 1
        at_head |= module is head

    def leave(module: torch.nn.Module, _args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 1 and not at_head:
            calls.setdefault(module, []).append(output)

    handles = [
        hooks_of_all_modules.register_module_forward_pre_hook(enter),
        hooks_of_all_modules.register_module_forward_hook(leave),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(calls: dict[torch.nn.Module, list[Any]]) -> Iterator[None]:
    """Have each module return what it returned before, in the same order, whatever it is called
    with."""
    originals = {
        module: vars(module).get("forward") for module in calls
    }  # accelerate's hooks stand there
    for module, outputs in calls.items():
        vars(module)["forward"] = _returning(outputs)
    try:
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = original


def _returning(outputs: list[Any]) -> Callable[..., Any]:
    turns = cycle(outputs)
    return lambda *_, **__: next(turns)
