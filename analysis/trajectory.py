"""The trajectory table: mean log-prob of each category at each step, its change, and intervals over docs."""

import numpy as np
import pandas as pd

from sft_probe.analysis.statistics import cluster_ids, estimate

KEY = ["run", "source", "step", "split", "category"]


def trajectory(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per run, source, step, split and category, from score rows.

    `logprob` is the mean over docs of the summed log-prob in nats, without the terminator; `delta` the mean paired
    change from the run's first step from the same source; `logprob_body` and `delta_body` are the same without the
    first token, null where the rows hold no token log-probs. The intervals are 95 % t-intervals, each of one mean,
    with conversations as clusters: they hold for prompts, not for repeated training. `sft-probe analyze` adds bands for
    all steps at once. Values are rounded to 1e-4, since the composition of batches changes sums by about 1e-6 nats.
    """
    frame = scores.assign(logprob_body=scores["logprob"] - scores["logprob_first"])
    first_step = frame.groupby(["run", "source"])["step"].transform("min")
    names = ["run", "source", "split", "category", "doc_id"]
    at_start = frame[frame["step"] == first_step].set_index(names)
    keys = pd.MultiIndex.from_frame(frame[names])
    for name in ("logprob", "logprob_body"):
        delta = name.replace("logprob", "delta")
        frame[delta] = frame[name].to_numpy() - at_start[name].reindex(keys).to_numpy()
    groups = frame.groupby(KEY, sort=False)
    table = groups[["examples_seen", "epoch"]].first()
    table["n"] = groups.size()
    table["num_tokens"] = groups["num_tokens"].mean()
    for name in ("logprob", "delta", "logprob_body", "delta_body"):
        table[name] = groups[name].mean()
    for name, prefix in (("logprob", ""), ("delta", "delta_")):
        table[[f"{prefix}ci_low", f"{prefix}ci_high"]] = _intervals(frame, name).reindex(table.index)
    columns = [
        *KEY, "examples_seen", "epoch", "n", "num_tokens", "logprob", "ci_low", "ci_high", "delta", "delta_ci_low",
        "delta_ci_high", "logprob_body", "delta_body",
    ]  # fmt: skip
    return table.reset_index()[columns].round(4)


def _intervals(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return 95 % intervals of the means of a column, by `KEY`; NaN below 2 clusters.

    A NaN, the change of a doc that the first step could not score, is left out. All means of one split are one call of
    `estimate`: a call and a table lookup for each took minutes for hundreds of steps.
    """
    tables = []
    for _, part in frame.groupby(["run", "source", "split"], sort=False):
        points = part.groupby(KEY, sort=False)
        docs, doc_ids = pd.factorize(part["doc_id"])
        values = np.full((len(doc_ids), points.ngroups), np.nan)
        values[docs, points.ngroup()] = part[name]
        conversations = part.drop_duplicates("doc_id")["conversation_id"].tolist()
        found = estimate(values, cluster_ids(conversations), band=False)
        tables.append(pd.DataFrame({"low": found.low, "high": found.high}, index=points.size().index))
    return pd.concat(tables)


def mean_interval(values: np.ndarray, conversations: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values` [n], NaN below 2 clusters; NaNs are left out."""
    found = estimate(values[:, None], cluster_ids(conversations.tolist()), band=False)
    return float(found.low[0]), float(found.high[0])
