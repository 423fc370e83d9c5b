"""Excess description length: what the training set cost a model beyond what it knows at the end.

EDL = sum_i loss_i(theta_{i-1}) - n L(theta_n) (Donoway, Joren, Roger & Leike, arXiv 2601.04728),
paired with the losses before training, since texts differ far more than the model moves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import Ints, cluster_ids, membership, renumber
from sft_probe.analysis.stats.intervals import Estimate, Floats, add_runs, add_variance, estimate
from sft_probe.analysis.stats.runs import Recording

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


@dataclass(frozen=True, kw_only=True)
class CodedRun:
    """A run with the losses of its first epoch, and those of the same texts before training."""

    recording: Recording
    losses: pd.DataFrame
    """From `first_epoch`"""
    start: Mapping[str, float]
    """Doc id to loss at step 0, in nats"""


def excess_table(runs: Sequence[CodedRun]) -> tuple[pd.DataFrame, list[str]]:
    """Return the excess description length of each training category at each probed step of the
    first epoch, and why a category has none.

    Columns: `train_category num_orders num_texts examples_seen heldout_gain gain_low gain_high
    excess_bits low high bits_per_token effective_clusters largest_cluster`.
    """
    groups: dict[tuple[str, str], list[CodedRun]] = {}
    for run in runs:
        key = (str(run.recording.train_category), run.recording.setting)
        groups.setdefault(key, []).append(run)
    tables, notes = [], []
    for (category, _), group in groups.items():
        reason = _missing(group)
        table = pd.DataFrame() if reason else _rows(category, group)
        if not reason and not len(table):
            reason = "no held-out scores of it at a step of the first epoch after the start"
        if reason:
            notes.append(f"{category}: no excess description length: {reason}")
        else:
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), notes


def _missing(group: Sequence[CodedRun]) -> str | None:
    """Say what runs of one category lack for a description length."""
    if (number := len({run.recording.order_seed for run in group})) < MIN_ORDERS:
        return f"{number} data order(s), and it takes {MIN_ORDERS}"
    for run in group:
        if not set(run.losses["doc_id"]) <= run.start.keys():
            if str(run.recording.train_category).endswith("_no_prompt"):
                return "no sweep scores its texts at step 0 without their prompts"
            return (
                f"not all texts of {run.recording.name} were scored at step 0; `sft-probe sweep "
                f"{run.recording.path} --splits heldout,train` does it"
            )
        target = run.recording.target(run.recording.categories("heldout"))
        if target is None or not run.recording.has("logprob_with_eos"):
            return "held-out responses of it were not scored"
    return None


def _rows(category: str, group: Sequence[CodedRun]) -> pd.DataFrame:
    """Return the rows of `excess_table` of one category."""
    target = group[0].recording.target(group[0].recording.categories("heldout")) or category
    cubes = [run.recording.cube("heldout", [target]) for run in group]
    shown = [_examples_seen(run) for run in group]
    seen = sorted(set.intersection(*(set(own) for own in shown)))
    docs = sorted(set.intersection(*(set(cube.doc_ids) for cube in cubes)))
    rows = [[cube.doc_ids.index(doc) for doc in docs] for cube in cubes]
    changes = np.stack(
        [
            cube.change("logprob_with_eos")[own, 0][
                :, [cube.steps.index(steps[number]) for number in seen]
            ]
            for cube, own, steps in zip(cubes, rows, shown, strict=True)
        ]
    )
    complete = ~np.isnan(changes).any(axis=(0, 2))
    if len(seen) < 2 or not complete.any():
        return pd.DataFrame()
    tokens = cubes[0].at_start("num_tokens")[rows[0], 0, 0][complete] + 1
    codings = [
        _coding(run, target, np.asarray(seen), change)
        for run, change in zip(group, changes[:, complete], strict=True)
    ]
    found = excess_length(codings, tokens, renumber(cubes[0].clusters[rows[0], 0][complete]))
    coded = np.concatenate([[0.0], np.cumsum(codings[0].tokens)])[found.seen]
    bits = found.length.mean / math.log(2)
    table = pd.DataFrame(
        {
            "train_category": category,
            "num_orders": len(group),
            "num_texts": len(group[0].losses),
            "examples_seen": found.seen,
            "heldout_gain": found.gain.mean,
            "gain_low": found.gain.low,
            "gain_high": found.gain.high,
            "excess_bits": bits,
            "low": found.length.low / math.log(2),
            "high": found.length.high / math.log(2),
            "bits_per_token": np.divide(bits, coded, out=np.zeros_like(bits), where=coded > 0),
            "effective_clusters": found.length.effective_clusters,
            "largest_cluster": found.length.largest_cluster,
        }
    )
    return table.iloc[1:]


def _examples_seen(run: CodedRun) -> dict[int, int]:
    """Return examples seen to step, of the probed steps up to the end of the first epoch."""
    rows = run.recording.rows
    steps = rows[rows["split"] == "heldout"].groupby("step")["examples_seen"].first().dropna()
    return {
        int(number): int(str(step)) for step, number in steps.items() if number <= len(run.losses)
    }


def _coding(run: CodedRun, target: str, seen: Ints, change: Floats) -> Coding:
    names = run.losses["doc_id"].astype(str).tolist()
    texts, probe_set = run.recording.texts, run.recording.probe_set
    owners = {doc.doc_id: doc.conversation_id for doc in probe_set.docs} if probe_set else {}
    return Coding(
        seen=seen,
        heldout=change,
        saved=np.asarray([run.start[name] for name in names])
        - run.losses["loss_sum"].to_numpy(dtype=float),
        tokens=run.losses["num_tokens"].to_numpy(dtype=float),
        clusters=cluster_ids(
            [owners.get(name, name) for name in names],
            [texts.get(name, {}).get(target) for name in names],
        ),
    )
