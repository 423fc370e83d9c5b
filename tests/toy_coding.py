"""A world of which the excess description length is known: one-token responses, four labels, a
linear softmax model, trained by plain SGD."""

import numpy as np

from sft_probe.analysis.studies.description_length import Coding

NUM_LABELS, NUM_FEATURES, BATCH = 4, 12, 4


def world(
    seed: int, *, planted: bool, rate: float, num_orders: int = 3, num_docs: int = 200
) -> tuple[list[Coding], np.ndarray, np.ndarray, np.ndarray]:
    """Return codings of `num_docs` training texts, then tokens and clusters of as many held-out
    ones, and, for each order, the excess by the definition with 4,000 held-out texts."""
    generator = np.random.default_rng(seed)
    rule = generator.normal(size=(NUM_LABELS, NUM_FEATURES)) if planted else None
    x, y = _texts(generator, num_docs, rule)
    held = _texts(generator, num_docs, rule)
    many = _texts(generator, 4000, rule)
    seen = np.asarray([0, *(2**i * BATCH for i in range(6)), num_docs])
    seen = np.unique(seen[seen <= num_docs])
    codings, brute = [], []
    for _ in range(num_orders):
        order = generator.permutation(num_docs)
        weights = np.zeros((NUM_LABELS, NUM_FEATURES))
        losses, heldout = np.empty(num_docs), [np.zeros(num_docs)]
        for start in range(0, num_docs, BATCH):
            own = order[start : start + BATCH]
            losses[start : start + len(own)], errors = _loss(weights, x[own], y[own])
            weights = weights - rate * errors.T @ x[own] / len(own)
            if start + len(own) in seen:
                heldout.append(np.log(NUM_LABELS) - _loss(weights, *held)[0])
        brute.append(losses.sum() - num_docs * _loss(weights, *many)[0].mean())
        codings.append(
            Coding(
                seen=seen,
                heldout=np.stack(heldout, axis=1),
                saved=np.log(NUM_LABELS) - losses,
                tokens=np.ones(num_docs),
                clusters=order,
            )
        )
    return codings, np.ones(num_docs), np.arange(num_docs), np.asarray(brute)


def _texts(
    generator: np.random.Generator, number: int, rule: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    x = generator.normal(size=(number, NUM_FEATURES))
    y = generator.integers(NUM_LABELS, size=number) if rule is None else (x @ rule.T).argmax(1)
    return x, y


def _loss(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each text, and its derivative by the logits."""
    logits = x @ weights.T
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(len(y))
    errors = np.exp(logprobs)
    errors[rows, y] -= 1
    return -logprobs[rows, y], errors
