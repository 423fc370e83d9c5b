"""Single items of benchmarks over the steps of a sweep: which were forgotten, which were gained,
and how likely the right answer is."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.benchmarks import text_of
from sft_probe.analysis.stats.clusters import Ints, cluster_ids
from sft_probe.analysis.stats.intervals import Floats, estimate, weighted_mean
from sft_probe.analysis.stats.runs import Recording
from sft_probe.files import find, jsonl_lines
from sft_probe.text_table import Shown, interval, number

_STEP = re.compile(r"step_(\d+)")
_KEY = ["part", "task", "filter", "metric"]
_MAX_ROWS = 20
_COLUMNS = (
    *("task", "metric", "items", "options", "accuracy", "change", "95 % interval", "1 -> 0"),
    *("0 -> 1", "1 -> 0 adjusted", "95 % interval", "bits/byte", "change", "95 % interval"),
)


def read_items(directory: Path) -> pd.DataFrame:
    """Return the answers to all items of a sweep's benchmarks, from lm-eval's `samples_*.jsonl`.

    Columns: `part task filter metric step item text correct num_options nats num_bytes`, a row for
    each metric that is 0 or 1. `text` is what items of one cluster share (`text_of`). `num_options`
    is that of a choice between continuations, 0 for another kind of task; `nats` and `num_bytes`
    are those of the right answer, NaN where the samples do not tell which one that is.
    """
    rows = []
    for path in find(directory, "sweep/step_*/benchmark_*/samples_*.jsonl"):
        match = _STEP.fullmatch(path.parent.parent.name)
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        place = {"part": path.parent.name, "task": task, "step": int(match[1]) if match else 0}
        for line in jsonl_lines(path.read_text("utf-8")):
            rows += [{**place, **row} for row in _rows_of(json.loads(line))]
    return pd.DataFrame(rows)


def _rows_of(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of a sample that says right or wrong."""
    answers = [response for response in sample["filtered_resps"] if isinstance(response, list)]
    texts = [arguments["arg_1"] for arguments in sample["arguments"].values()]
    num_options = len(texts) if len(answers) == len(texts) > 1 else 0
    gold = _gold(str(sample["target"]), texts) if len(answers) == len(texts) else None
    nats, num_bytes = math.nan, math.nan
    if pair := sample.get("bits_per_byte"):  # of a task that `sft-probe benchmarks add` made
        nats, num_bytes = pair
    elif gold is not None:
        nats, num_bytes = float(answers[gold][0]), len(texts[gold].strip().encode("utf-8"))
    for metric in sample["metrics"]:
        if sample.get(metric) in (0, 1):
            yield {
                "filter": sample.get("filter", "none"),
                "metric": metric,
                "item": sample["doc_id"],
                "text": text_of(sample.get("doc")),
                "correct": float(sample[metric]),
                # a whole answer that is decoded greedily is no guess among options
                "num_options": num_options if metric.startswith("acc") else 0,
                "nats": nats,
                "num_bytes": num_bytes,
            }


def _gold(target: str, texts: list[str]) -> int | None:
    """Return which continuation is right: lm-eval writes its number, or its text."""
    if target.isdecimal() and int(target) < len(texts):
        return int(target)
    places = [place for place, text in enumerate(texts) if text.strip() == target.strip()]
    return places[0] if len(places) == 1 else None


def item_table(recording: Recording) -> pd.DataFrame:
    """Return how the items of each benchmark changed from the first step; empty without samples.

    Columns: `run part task filter metric step first_step num_items num_options measure level change
    stderr low high kl`. Measures: `accuracy`; `lost` and `gained`, shares of items that went from
    right to wrong and back (1 -> 0, 0 -> 1); `lost_adjusted` and `gained_adjusted`, less what
    guessing explains (`chance_share`); `bits_per_byte` of the right answer. Changes are paired by
    item, with 95 % intervals over items, of which those about one text are one cluster. `kl` is the
    forward KL from the reference per token of the held-out responses trained on, where the sweep
    has one.
    """
    items = read_items(recording.path) if recording.path.is_dir() else pd.DataFrame()
    if items.empty:
        return items
    tables = [
        _of_benchmark(part)
        for _, part in items.groupby(_KEY, sort=False)
        if part["step"].nunique() > 1
    ]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True).assign(run=recording.name)
    table = table.merge(_kl(recording), on="step", how="left")
    first = ["run", *_KEY]
    return table[[*first, *(name for name in table if name not in first)]]


def chance_share(wrong_at_both: Floats, num_options: Floats) -> Floats:
    """Return for each item what a guesser adds to the expected share of 1 -> 0, or of 0 -> 1.

    A guess among k options is right with probability 1/k at either step. So of guessed items
    (1 - 1/k)^2 are wrong at both steps, and (1/k)(1 - 1/k) go from right to wrong: 1 / (k - 1) of
    the former, which are counted. What is left of `lost` is (1 - 1/k) times the share of items that
    were known and are guessed now. It adjusts by item what Harmon et al. (arXiv 2510.17776) adjust
    by accuracy. Guesses of neighbouring steps agree more often than that, so that the adjusted
    share may fall below 0.

    Args:
        wrong_at_both: [items, steps], 1 where an item is wrong at the first step and at this one.
        num_options: [items], k; 0 where nothing is guessed.
    """
    odds = np.where(num_options > 1, 1 / np.maximum(num_options - 1, 1), 0.0)
    return np.asarray(wrong_at_both * odds[:, None])


def _of_benchmark(items: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one benchmark and metric, over the items that all steps have."""
    wide = items.pivot_table(index="item", columns="step", values=["correct", "nats"])
    wide = wide.dropna(subset=[("correct", step) for step in wide["correct"]])
    facts = items.groupby("item")[["num_options", "num_bytes", "text"]].first().loc[wide.index]
    clusters = cluster_ids([text if isinstance(text, str) else None for text in facts["text"]])
    correct = wide["correct"].to_numpy(dtype=float)
    start, options = correct[:, :1], facts["num_options"].to_numpy(dtype=float)
    chance = chance_share((1 - start) * (1 - correct), options)
    chance[:, 0] = 0.0  # the first step is compared with itself
    lost, gained = start * (1 - correct), (1 - start) * correct
    measures = {"accuracy": correct, "lost": lost, "gained": gained}
    if (options > 1).all():
        measures |= {"lost_adjusted": lost - chance, "gained_adjusted": gained - chance}
    steps = [int(step) for step in wide["correct"]]
    tables = [_rows(name, values, clusters, steps) for name, values in measures.items()]
    if "nats" in wide:
        num_bytes = facts["num_bytes"].to_numpy(dtype=float)[:, None] * math.log(2)
        known = pd.DataFrame(wide["nats"]).reindex(columns=steps)
        nats = -known.to_numpy(dtype=float)
        sizes = np.broadcast_to(num_bytes, nats.shape)
        tables.append(_rows("bits_per_byte", nats, clusters, steps, sizes))
    place = {name: str(items[name].iloc[0]) for name in _KEY}
    return pd.concat(tables).assign(
        **place, first_step=steps[0], num_items=len(wide), num_options=options.mean() or math.nan
    )


def _rows(
    measure: str,
    values: Floats,
    clusters: Ints,
    steps: list[int],
    denominators: Floats | None = None,
) -> pd.DataFrame:
    found = estimate(values - values[:, :1], clusters, denominators=denominators)
    columns = {"level": weighted_mean(values, denominators), "change": found.mean}
    columns |= {"stderr": found.stderr, "low": found.low, "high": found.high}
    return pd.DataFrame({"step": steps, "measure": measure, **columns})


def _kl(recording: Recording) -> pd.DataFrame:
    """Return `step kl`, nats per token of the held-out responses of the target, else of all."""
    rows = recording.rows
    if "kl_forward" not in rows:
        return pd.DataFrame({"step": rows["step"].unique(), "kl": math.nan})
    own = rows[(rows["split"] == "heldout") & rows["kl_forward"].notna()]
    if target := recording.target(recording.categories("heldout")):
        own = own[own["category"] == target]
    sums = own.groupby("step")[["kl_forward", "num_tokens"]].sum()
    return (sums["kl_forward"] / sums["num_tokens"]).rename("kl").reset_index()


def shown_items(table: pd.DataFrame) -> Shown | None:
    """Return what is printed of the items of one run: the last step, those first that lost most;
    none without items."""
    if table.empty:
        return None
    last = table[table["step"] == table.groupby(_KEY)["step"].transform("max")]
    rows = []
    for place, part in last.groupby(_KEY, sort=False):
        own = {str(row["measure"]): row for row in part.to_dict("records")}
        rows.append((own["lost"]["change"], _cells(str(place[1]), str(place[3]), own)))
    rows.sort(key=lambda row: -row[0])
    steps = f"{last['first_step'].iloc[0]} to {last['step'].iloc[0]}"
    title = (
        f"items of benchmarks, step {steps}; intervals over items. Adjusted: less what independent "
        "guesses would lose; below 0 where both steps answer alike"
    )
    if rows[_MAX_ROWS:]:
        title += f"; {len(rows) - _MAX_ROWS} more are in the table `items`"
    return Shown(title, _COLUMNS, [cells for _, cells in rows[:_MAX_ROWS]])


def _cells(task: str, metric: str, own: dict[str, dict[Any, Any]]) -> list[str]:
    def cells(measure: str) -> list[str]:
        if measure not in own:
            return ["-", "-", "-"]
        row = own[measure]
        change, ends = number(row["change"], "+.3f"), interval(row["low"], row["high"], "+.3f")
        return [number(row["level"] - row["change"], ".3f"), change, ends]

    lost, gained = own["lost"], own["gained"]
    return [
        task,
        metric,
        str(lost["num_items"]),
        number(lost["num_options"], ".3g"),
        *cells("accuracy"),
        number(lost["change"], ".3f"),
        number(gained["change"], ".3f"),
        *cells("lost_adjusted")[1:],
        *cells("bits_per_byte"),
    ]
