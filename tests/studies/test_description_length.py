"""Excess description length in a world where it is known: `toy_coding`."""

from dataclasses import replace

import numpy as np
import pytest
from toy_coding import world

from sft_probe.analysis.studies.description_length import Excess, excess_length


def _found(seeds: range, *, planted: bool, rate: float) -> tuple[list[Excess], np.ndarray]:
    worlds = [world(seed, planted=planted, rate=rate) for seed in seeds]
    return [excess_length(*known[:3]) for known in worlds], np.stack([one[3] for one in worlds])


def _check_random_labels(seeds: range) -> None:
    found, _ = _found(seeds, planted=False, rate=0.002)
    holds = [bool(one.length.low[-1] <= 0 <= one.length.high[-1]) for one in found]
    assert np.mean(holds) >= 0.9


def _check_planted_rule(seeds: range) -> None:
    found, brute = _found(seeds, planted=True, rate=0.1)
    assert all(one.length.low[-1] > 0 for one in found)
    mean = np.mean([one.length.mean[-1] for one in found])
    assert mean == pytest.approx(brute.mean(), rel=0.05)


def test_random_labels_have_no_excess() -> None:
    _check_random_labels(range(20))


def test_a_planted_rule_has_the_excess_of_its_definition() -> None:
    _check_planted_rule(range(20))


@pytest.mark.full
@pytest.mark.parametrize("num_docs", [24, 60, 100])
@pytest.mark.parametrize("num_orders", [3, 5])
@pytest.mark.parametrize(("planted", "rate"), [(False, 0.02), (True, 0.3)])
def test_the_interval_covers(num_docs: int, num_orders: int, planted: bool, rate: float) -> None:
    known = [
        world(seed, planted=planted, rate=rate, num_orders=num_orders, num_docs=num_docs)
        for seed in range(400)
    ]
    found = [excess_length(*one[:3]).length for one in known]
    truth = np.mean([one.mean[-1] for one in found])
    holds = np.mean([one.low[-1] <= truth <= one.high[-1] for one in found])
    assert 0.91 <= holds <= 0.99


def test_a_constant_cost_of_a_text_changes_nothing() -> None:
    codings, tokens, clusters, _ = world(0, planted=True, rate=0.1)
    cost = np.random.default_rng(0).normal(100, 50, size=200)
    loss = [np.log(4) - coding.saved for coding in codings]
    dearer = [
        replace(coding, saved=(np.log(4) + cost[coding.clusters]) - (own + cost[coding.clusters]))
        for coding, own in zip(codings, loss, strict=True)
    ]
    one, two = (excess_length(own, tokens, clusters).length for own in (codings, dearer))
    assert np.abs(one.mean - two.mean).max() < 1e-9
    assert np.abs(one.high - two.high)[1:].max() < 1e-9
