"""Where in the model a gain happens: the path integral of its gradient between snapshots.

The change of f between snapshots a and b is the sum over groups of weights of the integral of
<grad f(a + u d), d> over u in [0, 1], d the change of the group's weights. Simpson's rule.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sft_probe.adapters import load_adapter
from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.intervals import Floats, estimate
from sft_probe.analysis.studies.weight_changes import layer_and_kind
from sft_probe.analysis.sweep.checkpoints import Checkpoint, snapshots_of_run
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.settings import resolve_settings
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text
from sft_probe.models import load_model, resolve_model
from sft_probe.prompts import EncodedDoc
from sft_probe.weights import ADAPTER_CONFIG, base_of

MIN_DOCS = 10
MAX_ERROR = 0.01
"""Share of the sum of |parts| that an interval may miss before it is called too long."""
Weights = dict[str, torch.Tensor]
Value = Callable[[int], torch.Tensor]
"""Returns f of one doc, a scalar with a graph."""


@dataclass(frozen=True, kw_only=True)
class PathLedger:
    """Parts of the changes of some categories, in nats per response, by layer and kind."""

    parts: pd.DataFrame
    """Rows `category first_step last_step layer kind change stderr low high num_docs`."""
    closure: pd.DataFrame
    """Rows `category first_step last_step measured path sum_abs error`; `error` is the share of
    the sum of |parts| by which the path misses what was measured."""

    @property
    def too_long(self) -> list[str]:
        """Intervals of steps whose error is above `MAX_ERROR` in some category."""
        bad = self.closure[self.closure["error"] > MAX_ERROR]
        pairs = bad[["first_step", "last_step"]].drop_duplicates().itertuples(index=False)
        return [f"{first}-{last}" for first, last in pairs]


def path_ledger(
    run: Path, categories: Sequence[str] | None = None, num_docs: int = 16
) -> PathLedger:
    """Integrate the gradient of each category's log-prob along the weights of a run.

    f is the sum of log-probs over a response without the terminator. Each node takes one forward
    and one backward pass per doc and category; nodes are the snapshots and the middles between
    them. Memory: the model, its gradient, and the changes of the weights on both sides of a
    snapshot, all float32.

    Args:
        run: a finished run with float32 snapshots, full or LoRA.
        categories: default: what was trained on, and `random` where there is one.
        num_docs: held-out docs to take, the first ones in the order of the probe set.

    Raises:
        UserError: fewer than two snapshots, snapshots of 16 bits, fewer than 10 docs, or a category
            that the set does not have.
    """
    inputs = path_inputs(run, categories, num_docs)
    checkpoints, docs, names = inputs.checkpoints, inputs.docs, inputs.categories
    model = load_snapshot(checkpoints[0])
    values = {name: value_of(model, docs, name) for name in names}
    steps = [point.step for point in checkpoints]
    thetas = (weights_of(load_snapshot(point)) for point in checkpoints)
    found = dict(
        zip(names, _integrate(model, thetas, list(values.values()), len(docs)), strict=True)
    )
    clusters = cluster_ids([doc.doc.conversation_id for doc in docs])
    tables = [_tables(name, steps, found[name], clusters) for name in names]
    return PathLedger(
        parts=pd.concat([parts for parts, _ in tables], ignore_index=True),
        closure=pd.concat([closure for _, closure in tables], ignore_index=True),
    )


@dataclass(frozen=True, kw_only=True)
class PathInputs:
    """Snapshots of a run by step, and whose log-prob is followed along them."""

    checkpoints: list[Checkpoint]
    docs: list[EncodedDoc]
    categories: list[str]
    run: str
    """Name of the run."""


def path_inputs(run: Path, categories: Sequence[str] | None, num_docs: int) -> PathInputs:
    """Return what a path of a run is integrated on; raise `UserError` as `path_ledger` does."""
    checkpoints, problems = snapshots_of_run(run)
    if len(checkpoints) < 2:
        raise UserError(
            f"{run} has {len(checkpoints)} snapshots that can be read; a path needs two. "
            f"{' '.join(problems)}".rstrip()
        )
    if bad := [point for point in checkpoints if point.weights_dtype != "float32"]:
        raise UserError(
            f"{bad[0].name} holds {bad[0].weights_dtype} weights, whose small changes are rounded "
            "away. Train with --snapshot_dtype float32."
        )
    settings = resolve_settings(SweepRequest(directory=run), checkpoints)
    _check_base(checkpoints, settings.run_columns["model"])
    docs = [doc for doc in settings.docs if doc.doc.split == "heldout"][:num_docs]
    if len(docs) < MIN_DOCS:
        raise UserError(f"{run}: {len(docs)} held-out docs can be scored; a path needs {MIN_DOCS}.")
    trained = str(settings.run_columns["train_category"]).removesuffix("_no_prompt")
    default = [name for name in (trained, "random") if name in settings.probe_set.categories]
    names = list(categories or default or settings.probe_set.categories)
    if unknown := [name for name in names if name not in settings.probe_set.categories]:
        raise UserError(f"--categories: the probe set has no {unknown[0]!r}.")
    return PathInputs(
        checkpoints=checkpoints,
        docs=docs,
        categories=names,
        run=str(settings.run_columns["run"]),
    )


def _check_base(checkpoints: Sequence[Checkpoint], model: Any) -> None:
    """Raise `UserError` where an adapter names another base than the run was trained from."""
    for point in checkpoints:
        path = Path(point.model) / ADAPTER_CONFIG
        if path.exists() and (base := base_of(path.parent, "main")[0]) != resolve_model(model):
            raise UserError(
                f"{path} names the base {base}, but the run was trained from {model}. Put the "
                "adapter of this run back."
            )


def load_snapshot(checkpoint: Checkpoint) -> Any:
    """Load the model of a snapshot in float32."""
    folder = Path(checkpoint.model)
    if (folder / ADAPTER_CONFIG).exists():
        return load_adapter(folder, "float32")
    return load_model(str(folder), "float32").eval()


def weights_of(model: Any) -> Weights:
    """Return copies of the parameters, tied ones once."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def value_of(model: Any, docs: Sequence[EncodedDoc], category: str) -> Value:
    """Return the sum of log-probs over a doc's response as a function of the doc's index."""

    def value(index: int) -> torch.Tensor:
        doc = docs[index]
        own = doc.continuation_ids[category]
        ids = torch.tensor([[*doc.prompt_ids, *own]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(doc.prompt_ids) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        total: torch.Tensor = logprobs.gather(1, torch.tensor(own)[:, None]).double().sum()
        return total

    return value


Found = tuple[list[tuple[int | None, str]], Floats, Floats]
"""Groups; parts [docs, intervals, groups]; values [docs, snapshots]."""


def _integrate(
    model: Any, thetas: Iterator[Weights], values: Sequence[Value], num_docs: int
) -> list[Found]:
    """Return parts and values of each function.

    A snapshot is the end of one interval and the start of the next, so that its gradients are
    taken once, and multiplied with the changes on both sides.
    """
    live = dict(model.named_parameters())
    groups = sorted({layer_and_kind(name) for name in live}, key=_order)
    nodes: list[dict[str, list[Floats]]] = [
        {"left": [], "middle": [], "right": [], "value": []} for _ in values
    ]
    here: Weights | None = next(thetas)
    before: Weights | None = None
    while here is not None:
        there = next(thetas, None)
        after = None if there is None else {name: there[name] - here[name] for name in here}
        set_weights(live, here)
        sides = {side: d for side, d in (("right", before), ("left", after)) if d is not None}
        for value, found in zip(values, nodes, strict=True):
            at, dots = _node(live, value, num_docs, list(sides.values()), groups)
            found["value"].append(at)
            for side, dot in zip(sides, dots, strict=True):
                found[side].append(dot)
        if after is not None:
            set_weights(live, {name: here[name] + after[name] / 2 for name in here})
            for value, found in zip(values, nodes, strict=True):
                found["middle"].append(_node(live, value, num_docs, [after], groups)[1][0])
        here, before = there, after
    return [(groups, _simpson(found), np.stack(found["value"], axis=1)) for found in nodes]


def _simpson(node: Mapping[str, list[Floats]]) -> Floats:
    """Return [docs, intervals, groups] from the products at starts, middles and ends."""
    left, middle, right = (np.stack(node[name], axis=1) for name in ("left", "middle", "right"))
    return (left + 4 * middle + right) / 6


def set_weights(live: Mapping[str, torch.nn.Parameter], weights: Weights) -> None:
    """Copy weights into the parameters of a live model."""
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(weights[name])


def _node(
    live: Mapping[str, torch.nn.Parameter],
    value: Value,
    num_docs: int,
    changes: Sequence[Weights],
    groups: Sequence[tuple[int | None, str]],
) -> tuple[Floats, list[Floats]]:
    """Return f of every doc, [docs], and <grad f, change> by group, [docs, groups] per change."""
    place = {group: index for index, group in enumerate(groups)}
    moving = [name for name in live if any(bool(change[name].any()) for change in changes)]
    for name, parameter in live.items():
        parameter.requires_grad_(name in moving)
    at = np.zeros(num_docs)
    dots = [np.zeros((num_docs, len(groups))) for _ in changes]
    for doc in range(num_docs):
        with torch.enable_grad():
            height = value(doc)
            gradients = torch.autograd.grad(
                height, [live[name] for name in moving], allow_unused=True
            )
        at[doc] = float(height.detach())
        for name, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                for dot, change in zip(dots, changes, strict=True):
                    # products of many small numbers, summed in float64
                    product = torch.sum(gradient * change[name], dtype=torch.float64)
                    dot[doc, place[layer_and_kind(name)]] += float(product)
    return at, dots


def _order(group: tuple[int | None, str]) -> tuple[int, str]:
    layer, kind = group
    return (-1 if layer is None else layer, kind)


def _tables(
    category: str, steps: Sequence[int], found: Found, clusters: Ints
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the parts of one category with intervals over docs, and how well they close."""
    groups, parts, values = found
    means = estimate(parts.reshape(len(parts), -1), clusters)
    rows = [
        {"first_step": first, "last_step": last, "layer": layer, "kind": kind}
        for first, last in pairwise(steps)
        for layer, kind in groups
    ]
    table = pd.DataFrame(rows).assign(
        category=category,
        change=means.mean,
        stderr=means.stderr,
        low=means.low,
        high=means.high,
        num_docs=len(parts),
    )
    measured = np.diff(values.mean(axis=0))
    path = parts.sum(axis=2).mean(axis=0)
    sum_abs = np.abs(parts.mean(axis=0)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.nan_to_num(np.abs(path - measured) / sum_abs)
    closure = pd.DataFrame(
        {
            "category": category,
            "first_step": steps[:-1],
            "last_step": steps[1:],
            "measured": measured,
            "path": path,
            "sum_abs": sum_abs,
            "error": error,
        }
    )
    return table.astype({"layer": "Int64"}), closure


def write_path(found: PathLedger, folder: Path) -> list[Path]:
    """Write `path.csv` and `path_closure.csv`; return the paths."""
    make_dir(folder)
    tables = {"path": found.parts, "path_closure": found.closure}
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return [folder / f"{name}.csv" for name in tables]
