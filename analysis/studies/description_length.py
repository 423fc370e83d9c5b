"""Excess description length: what a model needs of the training set beyond what it knows at the end.

EDL = sum_i loss_i(theta_{i-1}) - n L(theta_n) (Donoway, Joren, Roger & Leike, arXiv 2601.04728),
paired with the losses before training, since texts differ far more than the model moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sft_probe.analysis.stats.clusters import Ints, membership, renumber
from sft_probe.analysis.stats.intervals import Estimate, Floats, add_runs, add_variance, estimate

MIN_ORDERS = 3


@dataclass(frozen=True, kw_only=True)
class Coding:
    """The first epoch of one data order; every log-prob includes the terminator, in nats."""

    seen: Ints
    """[points], examples seen at each probed step; the first is 0"""
    heldout: Floats
    """[docs, points], change of the held-out log-prob from the first step"""
    saved: Floats
    """[examples], loss at the start less loss before its update, in the order of training"""
    tokens: Floats
    """[examples], response and terminator"""
    clusters: Ints
    """[examples]"""


@dataclass(frozen=True, kw_only=True)
class Excess:
    """EDL at each probed step of the first epoch, in nats."""

    seen: Ints
    """[points], examples coded"""
    length: Estimate
    """[points], EDL over data orders, held-out and training texts"""
    gain: Estimate
    """[points], the held-out gain in nats per token, over data orders and held-out texts"""


def excess_length(codings: Sequence[Coding], tokens: Floats, clusters: Ints) -> Excess:
    """Estimate the excess description length of the first k examples, at each probed step.

    EDL(k) = tokens of the k examples x held-out gain per token - sum of what they saved. Three
    errors add up: that of the held-out gain, a ratio over clustered docs; that of the training
    texts; and the variance between orders. What an example saved, less the gain of the model that
    coded it, has mean 0 whatever came before (its texts were not seen yet, those of its batch
    neither), so that the squares of these residuals add up to the variance of their sum. They are
    squared in each order and then averaged: pairs of examples that speak for each other do so in
    every order, and an average of residuals over orders would halve this part.

    Args:
        codings: one for each data order, at least `MIN_ORDERS`, with the same `seen`.
        tokens: [docs], of the held-out responses, terminator included.
        clusters: [docs], of the held-out responses.
    """
    per_order, residual, weighted = [], [], []
    for coding in codings:
        gain = coding.heldout.sum(axis=0) / tokens.sum()
        coded = np.concatenate([[0.0], np.cumsum(coding.tokens)])[coding.seen]
        saved = np.concatenate([[0.0], np.cumsum(coding.saved)])[coding.seen]
        per_order.append(coded * gain - saved)
        weighted.append(coded * coding.heldout)
        residual.append(_training_variance(coding, gain))
    sizes = np.broadcast_to(tokens[:, None], weighted[0].shape)
    found = estimate(np.mean(weighted, axis=0), clusters, denominators=sizes)
    found = add_variance(
        found, np.mean(residual, axis=0), max(len(np.unique(codings[0].clusters)) - 1, 1)
    )
    lengths = np.stack(per_order)
    found = add_runs(found, lengths)
    changes = np.stack([coding.heldout for coding in codings])
    gain = add_runs(
        estimate(changes.mean(axis=0), clusters, denominators=sizes),
        changes.sum(axis=1) / tokens.sum(),
    )
    return Excess(seen=codings[0].seen, length=replace(found, mean=lengths.mean(axis=0)), gain=gain)




def _training_variance(coding: Coding, gain: Floats) -> Floats:
    """Return [points], the sum of squared residuals of what the examples saved, by cluster.

    The gain of the model that coded an example is read from the held-out curve, linear between the
    probed steps.
    """
    places = np.arange(len(coding.saved))
    residual = coding.saved - coding.tokens * np.interp(places, coding.seen, gain)
    variance = []
    for number in coding.seen:
        if number == 0:
            variance.append(0.0)
            continue
        sums = membership(renumber(coding.clusters[:number])) @ residual[:number]
        variance.append(float((sums**2).sum()) * len(sums) / max(len(sums) - 1, 1))
    return np.asarray(variance)
