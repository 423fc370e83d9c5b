"""The trajectory table: mean log-prob of each category at each step, its change, and intervals over
docs."""

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import cluster_ids
from sft_probe.analysis.stats.intervals import estimate, weighted_mean
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import Recording

COLUMNS = [
    "run",
    "source",
    "step",
    "split",
    "category",
    "examples_seen",
    "epoch",
    "num_docs",
    "num_tokens",
    "logprob",
    "logprob_low",
    "logprob_high",
    "change",
    "low",
    "high",
    "logprob_body",
    "change_body",
]


def trajectory(recording: Recording) -> pd.DataFrame:
    """Return one row per step, split and category of one run as one source saw it.

    `logprob` is the mean over docs of the summed log-prob in nats, without the terminator; `change`
    the mean paired change from the run's first step; `logprob_body` and `change_body` are the same
    without the first token, null where the rows hold no token log-probs. The 95 % intervals are
    those of `sft-probe analyze`, each of one mean: they hold for prompts, not for repeated
    training. `analyze` adds bands for all steps at once. Values are rounded to 1e-4, since the
    composition of batches changes sums by about 1e-6 nats.
    """
    tables = [_table(recording, split, recording.cube(split)) for split in recording.splits]
    return pd.concat(tables).sort_values("step", kind="stable", ignore_index=True)[COLUMNS].round(4)


def _table(recording: Recording, split: str, arrays: Cube) -> pd.DataFrame:
    level = estimate(arrays.arrays["logprob"], arrays.clusters)
    change = estimate(arrays.change("logprob"), arrays.clusters)
    columns = {
        "num_docs": level.num_docs,
        "num_tokens": weighted_mean(arrays.arrays["num_tokens"]),
        "logprob": level.mean,
        "logprob_low": level.low,
        "logprob_high": level.high,
        "change": change.mean,
        "low": change.low,
        "high": change.high,
        "logprob_body": weighted_mean(arrays.arrays["body"]),
        "change_body": weighted_mean(arrays.change("body")),
    }
    places = pd.MultiIndex.from_product(
        [arrays.categories, arrays.steps], names=["category", "step"]
    )
    table = pd.DataFrame(
        {name: values.reshape(-1) for name, values in columns.items()}, index=places
    )
    table = table[table["num_docs"] > 0].reset_index()
    seen = recording.rows.groupby("step")[["examples_seen", "epoch"]].first()
    source = recording.rows["source"].iloc[0]
    return table.join(seen, on="step").assign(run=recording.name, source=source, split=split)


def mean_interval(values: np.ndarray, conversations: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` [n], NaN below 2 clusters.

    A NaN, the change of a doc that the first step could not score, is left out.
    """
    found = estimate(values[:, None], cluster_ids(conversations.tolist()))
    return float(found.low[0]), float(found.high[0])
