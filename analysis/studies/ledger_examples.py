"""Which training examples carried a gain: the path of a run, divided among its examples.

With a_t the gradient of a category's mean log-prob over step t, the change along the path is the
sum of <a_t, theta_t - theta_(t-1)>. Adam's update is linear in the gradients g of the examples once
its denominators are known, so that example i at step k carries <U_k, clip_k g_(k,i)> with
U_k = sum over t >= k of -eta_t (1 - b1) b1^(t-k) / (1 - b1^t) a_t / (sqrt(v_t / (1 - b2^t)) + eps).
Weight decay carries the rest. This is accounting: it does not say what would have happened without
an example.

U_k looks ahead, and gradients cannot be kept. So the run is repeated twice: the first pass adds up
U at the start of each chunk of steps, the second starts from it and goes on by U_(k+1) = (U_k -
w_k) / b1, in float64. Each such step multiplies rounding by 1 / b1, which bounds the chunk. No term
is left out, as cutting the sum off would do.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sft_probe.analysis.stats.intervals import Floats
from sft_probe.analysis.studies.ledger_path import (
    MAX_ERROR,
    PathInputs,
    Value,
    Weights,
    load_snapshot,
    path_inputs,
    set_weights,
    value_of,
    weights_of,
)
from sft_probe.files import make_dir, write_text
from sft_probe.train.examples import IGNORED_LABEL
from sft_probe.train.replay import Plan, Update, plan_replay, replay

NUM_SHOWN = 10
_MAX_GROWTH = 1e8
"""How much rounding of float64 may grow within a chunk of steps."""
_LENGTHS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class ExampleLedger:
    """What each training example carried of the change of some categories, in nats per response."""

    examples: pd.DataFrame
    """Rows `run category step train_category doc_id num_tokens change share`, one for each time
    that an example was trained on; `share` is of the path of the category."""
    groups: pd.DataFrame
    """Rows `run category by group times_shown change share`."""
    extremes: pd.DataFrame
    """Rows `run category end train_category doc_id times_shown change share prompt response`: the
    examples that carried most and least."""
    closure: pd.DataFrame
    """Rows `run category first_step last_step measured path examples weight_decay`."""
    weights_off: float
    """Largest difference of a weight from that of the run's snapshots, as a share of the largest
    change of a weight; 0 where all bits are equal."""
    num_docs: int

    @property
    def sum_error(self) -> float:
        """Share of all movement by which examples and weight decay miss the path, at worst."""
        table = self.closure.assign(moved=self.closure["path"].abs())
        sums = table.groupby("category")[["path", "examples", "weight_decay", "moved"]].sum()
        missed = (sums["examples"] + sums["weight_decay"] - sums["path"]).abs()
        return float((missed / sums["moved"]).max())

    @property
    def too_long(self) -> list[str]:
        """Intervals of steps whose path misses what was measured by over 1 % of all movement."""
        table = self.closure
        moved = table.groupby("category")["path"].transform(lambda path: path.abs().sum())
        bad = table[(table["path"] - table["measured"]).abs() > MAX_ERROR * moved]
        pairs = bad[["first_step", "last_step"]].drop_duplicates().itertuples(index=False)
        return [f"{first}-{last}" for first, last in pairs]


def example_ledger(
    run: Path, categories: Sequence[str] | None = None, num_docs: int = 16
) -> ExampleLedger:
    """Divide the path of a run among its training examples.

    a_t is interpolated between gradients at the snapshots and in the middle between them, by a
    parabola in how far the weights have come along the straight line, and averaged over the step.
    Memory: training, a copy of the weights and a gradient. Disk, until it is done: the weights
    twice, and for each category twice for each snapshot (gradients) and for each chunk of steps.

    Args:
        run: a finished run of one process with float32 snapshots, full or LoRA.
        categories: default: what was trained on, and `random` where there is one.
        num_docs: held-out docs over which the log-prob of a category is averaged.

    Raises:
        UserError: as `path_ledger` and `plan_replay` do.
    """
    inputs, plan = path_inputs(run, categories, num_docs), plan_replay(run)
    with tempfile.TemporaryDirectory(dir=run, prefix=".examples-") as folder:
        nodes = _Nodes(inputs, Path(folder))
        steps = [point.step for point in inputs.checkpoints]
        ahead = _Ahead(steps, inputs, nodes, plan.momentum, Path(folder))
        replay(plan, ahead)
        ahead.finish()
        carried = _Carried(ahead)
        replay(plan, carried)
    return _tables(inputs, plan, nodes, ahead, carried)


class _Flat:
    """Tensors by name in one file, `[rows, *shape]` each, which the system may page out."""

    def __init__(
        self, path: Path, shapes: Mapping[str, torch.Size], rows: int, dtype: torch.dtype
    ) -> None:
        total = sum(shape.numel() for shape in shapes.values())
        flat = torch.from_file(str(path), shared=True, size=rows * total, dtype=dtype)
        parts = torch.split(flat.view(rows, total), [s.numel() for s in shapes.values()], dim=1)
        self.parts = {
            name: torch.unflatten(part, 1, shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }


class _Nodes:
    """Gradients of the mean log-prob of each category, at snapshots and in the middles between.

    Args:
        inputs: snapshots, docs and categories.
        folder: where the gradients are kept.
    """

    def __init__(self, inputs: PathInputs, folder: Path) -> None:
        model = load_snapshot(inputs.checkpoints[0])
        ends = [weights_of(load_snapshot(inputs.checkpoints[place])) for place in (0, -1)]
        self.live = {
            name: weight
            for name, weight in model.named_parameters()
            if not torch.equal(ends[0][name], ends[1][name])
        }
        del ends
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in self.live)
        self.folder = folder
        self.shapes = {name: weight.shape for name, weight in self.live.items()}
        self.values = [value_of(model, inputs.docs, name) for name in inputs.categories]
        self.num_docs = len(inputs.docs)
        heights = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        before: Weights | None = None
        for point in inputs.checkpoints:
            here = self._own(load_snapshot(point))
            if before is not None:
                self._add({name: (here[name] + before[name]) / 2 for name in here})
            heights.append(self._add(here))
            before = here
        self.heights: Floats = np.array(heights)
        """Mean log-prob, [snapshots, categories]."""
        del self.values, self.live

    def _own(self, model: Any) -> Weights:
        return {name: w for name, w in weights_of(model).items() if name in self.shapes}

    def _add(self, weights: Weights) -> list[float]:
        """Keep the gradients at some weights; return the mean of each category there."""
        set_weights(self.live, weights)
        path = self.folder / f"node_{len(self.gradients):05d}"
        kept = _Flat(path, self.shapes, len(self.values), torch.float32).parts
        means = []
        for place, value in enumerate(self.values):
            means.append(self._mean_gradient(value))
            for name, weight in self.live.items():
                if weight.grad is not None:
                    kept[name][place] = weight.grad
                    weight.grad = None
        self.gradients.append(kept)
        return means

    def _mean_gradient(self, value: Value) -> float:
        total = 0.0
        for doc in range(self.num_docs):
            with torch.enable_grad():
                height = value(doc) / self.num_docs
                height.backward()  # type: ignore[no-untyped-call]
            total += float(height.detach())
        return total

    def mix(self, interval: int, shares: Sequence[float], name: str) -> torch.Tensor:
        """Return the mean of three neighbouring gradients with these shares, [categories, *]."""
        nodes = self.gradients[2 * interval : 2 * interval + 3]
        total = shares[0] * nodes[0][name]
        for share, node in zip(shares[1:], nodes[1:], strict=True):
            total += share * node[name]
        return total


def _parabola(start: float, end: float) -> list[float]:
    """Return how much the nodes at 0, 1/2 and 1 count in the mean over [start, end] of the parabola
    through them: Simpson's rule, which is exact here."""

    def basis(u: float) -> Floats:
        return np.array([(2 * u - 1) * (u - 1), 4 * u * (1 - u), u * (2 * u - 1)])

    return list((basis(start) + 4 * basis((start + end) / 2) + basis(end)) / 6)


@dataclass
class _Ahead:
    """The first pass: how far each step came, the path, and U at the start of each chunk."""

    steps: Sequence[int]
    inputs: PathInputs
    nodes: _Nodes
    momentum: float
    folder: Path
    with_examples: bool = False
    shares: dict[int, tuple[int, list[float]]] = field(default_factory=dict)
    """By step: the interval, and how much each of its nodes counts."""
    path: dict[int, Floats] = field(default_factory=dict)
    decay: dict[int, Floats] = field(default_factory=dict)
    """By step, [categories]."""
    chunks: list[dict[str, torch.Tensor]] = field(default_factory=list)
    off: float = 0.0
    largest: float = 0.0

    def __post_init__(self) -> None:
        """Start at the first snapshot."""
        growth = math.log(1 / self.momentum) if self.momentum else math.inf
        self.chunk = max(1, math.floor(math.log(_MAX_GROWTH) / growth))
        self.interval = 0
        self.before = self._snapshot(0)
        line = _Flat(self.folder / "line", self.nodes.shapes, 2, torch.float32).parts
        self.start, self.end = ({name: ends[row] for name, ends in line.items()} for row in (0, 1))
        self._enter()

    def _snapshot(self, place: int) -> Weights:
        weights = weights_of(load_snapshot(self.inputs.checkpoints[place]))
        return {name: weights[name] for name in self.nodes.shapes}

    def _enter(self) -> None:
        """Note where an interval between snapshots starts, and where it leads."""
        after = self._snapshot(self.interval + 1)
        for name, weight in self.before.items():
            self.start[name].copy_(weight)
            self.end[name].copy_(after[name])
        self.progress = 0.0

    def example(self, index: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Leave examples to the second pass."""

    def update(self, update: Update, weights: Mapping[str, torch.Tensor]) -> None:
        """Add the step to the path and to the sum of its chunk."""
        shares = self._shares(weights)
        self.shares[update.step] = (self.interval, shares)
        place = (update.step - 1) % self.chunk
        if place == 0:
            path = self.folder / f"chunk_{len(self.chunks):05d}"
            rows = len(self.inputs.categories)
            self.chunks.append(_Flat(path, self.nodes.shapes, rows, torch.float64).parts)
        path_of, decay_of = (np.zeros(len(self.inputs.categories)) for _ in range(2))
        for name, before in self.before.items():
            gradient = self.nodes.mix(self.interval, shares, name)
            path_of += _dots(gradient, weights[name] - before)
            decay_of -= update.lr * update.decay[name] * _dots(gradient, before)
            self.chunks[-1][name] += self.momentum**place * _ahead(gradient, update, name)
            before.copy_(weights[name])
        self.path[update.step], self.decay[update.step] = path_of, decay_of
        if update.step == self.steps[self.interval + 1]:
            self._leave()

    def _shares(self, weights: Mapping[str, torch.Tensor]) -> list[float]:
        """Return how much the nodes count at this step, by how far along the line it led."""
        length = come = 0.0
        for name, start in self.start.items():
            line = self.end[name] - start
            length += float(torch.sum(line * line, dtype=torch.float64))
            come += float(torch.sum(line * (weights[name] - start), dtype=torch.float64))
        earlier, self.progress = self.progress, come / length if length else 0.0
        return _parabola(earlier, self.progress)

    def _leave(self) -> None:
        """Compare with the snapshot, and go on to the next one."""
        for name, weight in self.before.items():
            self.off = max(self.off, float((weight - self.end[name]).abs().max()))
            self.largest = max(self.largest, float((self.end[name] - self.start[name]).abs().max()))
        self.interval += 1
        if self.interval + 1 < len(self.steps):
            self._enter()

    def finish(self) -> None:
        """Add to each chunk what later ones give, and let go of the weights."""
        for here, after in reversed(list(pairwise(self.chunks))):
            for name in here:
                here[name] += self.momentum**self.chunk * after[name]
        del self.before, self.start, self.end


def _dots(gradients: torch.Tensor, move: torch.Tensor) -> Floats:
    """Return <gradient, move> of each category, in float64."""
    found: Floats = (gradients.double().flatten(1) @ move.double().flatten()).numpy()
    return found


def _ahead(gradient: torch.Tensor, update: Update, name: str) -> torch.Tensor:
    """Return w_t, by which a unit of momentum at step t moves the log-prob."""
    return (-update.rate * gradient / update.denominator(name)).double()


class _Carried:
    """The second pass: what each example carried, whenever it was trained on."""

    with_examples = True

    def __init__(self, ahead: _Ahead) -> None:
        self.first = ahead
        self.waiting: list[tuple[int, Floats]] = []
        self.rows: list[tuple[int, int, Floats]] = []
        """Step, index of the example, and nats of each category."""
        self.ahead = ahead.chunks[0]

    def example(self, index: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Multiply the gradient with U; clipping is known after the step."""
        total = np.zeros(len(self.first.inputs.categories))
        for name, gradient in gradients.items():
            if name in self.ahead:
                total += _dots(self.ahead[name], gradient)
        self.waiting.append((index, total))

    def update(self, update: Update, weights: Mapping[str, torch.Tensor]) -> None:  # noqa: ARG002
        """Clip what the examples of the step carried, and go on to the next U."""
        self.rows += [(update.step, index, update.clip * dots) for index, dots in self.waiting]
        self.waiting = []
        first = self.first
        if update.step % first.chunk == 0:
            number = update.step // first.chunk
            self.ahead = first.chunks[number] if number < len(first.chunks) else {}
            return
        interval, shares = first.shares[update.step]
        for name, ahead in self.ahead.items():
            ahead.sub_(_ahead(first.nodes.mix(interval, shares, name), update, name))
            ahead.div_(first.momentum)


def _tables(
    inputs: PathInputs, plan: Plan, nodes: _Nodes, ahead: _Ahead, carried: _Carried
) -> ExampleLedger:
    own = plan.examples.examples
    rows = [
        {
            "run": inputs.run,
            "category": category,
            "step": step,
            "train_category": own[index].category,
            "doc_id": own[index].doc_id,
            "num_tokens": own[index].num_tokens,
            "change": nats[place],
            "index": index,
        }
        for place, category in enumerate(inputs.categories)
        for step, index, nats in carried.rows
    ]
    closure = _closure(inputs, nodes, ahead, carried)
    whole = closure.groupby("category")["path"].sum()
    examples = pd.DataFrame(rows)
    examples["share"] = examples["change"] / examples["category"].map(whole)
    return ExampleLedger(
        examples=examples.drop(columns="index"),
        groups=_groups(examples),
        extremes=_extremes(examples, plan),
        closure=closure,
        weights_off=ahead.off / ahead.largest if ahead.largest else ahead.off,
        num_docs=len(inputs.docs),
    )


def _closure(inputs: PathInputs, nodes: _Nodes, ahead: _Ahead, carried: _Carried) -> pd.DataFrame:
    """Return what was measured between snapshots, beside the path and what carried it."""
    measured = np.diff(nodes.heights, axis=0)
    rows = []
    for place, category in enumerate(inputs.categories):
        for number, (first, last) in enumerate(pairwise(ahead.steps)):
            own = range(first + 1, last + 1)
            rows.append(
                {
                    "run": inputs.run,
                    "category": category,
                    "first_step": first,
                    "last_step": last,
                    "measured": measured[number, place],
                    "path": sum(ahead.path[step][place] for step in own),
                    # momentum hands on: these are of the examples shown in the interval
                    "examples": sum(n[place] for step, _, n in carried.rows if step in own),
                    "weight_decay": sum(ahead.decay[step][place] for step in own),
                }
            )
    return pd.DataFrame(rows)


def _groups(examples: pd.DataFrame) -> pd.DataFrame:
    """Return what examples carried together, by what they are and by how long they are."""
    edges = [0, *_LENGTHS, math.inf]
    names = [f"{low + 1:.0f}-{high:.0f} tokens" for low, high in pairwise(edges[:-1])]
    lengths = pd.cut(examples["num_tokens"], edges, labels=[*names, f"over {_LENGTHS[-1]} tokens"])
    tables = []
    for by, group in (("train_category", examples["train_category"]), ("length", lengths)):
        keys = ["run", "category", "by", "group"]
        table = examples.assign(by=by, group=group)
        found = table.groupby(keys, sort=False, observed=True)
        sums = found[["change", "share"]].sum()
        sums.insert(0, "times_shown", found.size())
        tables.append(sums.reset_index().sort_values(["category", "group"], kind="stable"))
    return pd.concat(tables, ignore_index=True)


def _extremes(examples: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Return the examples that carried most and least over all steps, with their texts."""
    keys = ["run", "category", "train_category", "doc_id", "index"]
    found = examples.groupby(keys, sort=False)
    sums = found[["change", "share"]].sum()
    sums.insert(0, "times_shown", found.size())
    tables = []
    for _, own in sums.reset_index().groupby("category", sort=False):
        ordered = own.sort_values("change", ascending=False, kind="stable")
        num = min(NUM_SHOWN, len(ordered) // 2)
        tables += [
            ordered.head(num).assign(end="most"),
            ordered.tail(num)[::-1].assign(end="least"),
        ]
    table = pd.concat(tables, ignore_index=True)
    texts = [_texts(plan, index) for index in table["index"]]
    table = table.assign(prompt=[a for a, _ in texts], response=[b for _, b in texts])
    return table.drop(columns="index")


def _texts(plan: Plan, index: int) -> tuple[str, str]:
    """Return prompt and response of a training example, as the model read them."""
    tokenizer, example = plan.inputs[0], plan.examples.examples[index]
    start = example.labels.count(IGNORED_LABEL)
    parts = example.input_ids[:start], example.input_ids[start:-1]
    prompt, response = (str(tokenizer.decode(ids)) for ids in parts)
    return prompt, response


def write_examples(found: ExampleLedger, folder: Path) -> list[Path]:
    """Write `examples.csv`, `example_groups.csv`, `example_extremes.csv` and
    `example_closure.csv`; return the paths."""
    make_dir(folder)
    tables = {
        "examples": found.examples,
        "example_groups": found.groups,
        "example_extremes": found.extremes,
        "example_closure": found.closure,
    }
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return [folder / f"{name}.csv" for name in tables]
