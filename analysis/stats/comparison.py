"""Two runs side by side: what one moved more than the other, on the same prompts at the same
steps."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.clusters import count_text, renumber
from sft_probe.analysis.stats.intervals import estimate, holm, weighted_mean
from sft_probe.analysis.stats.measures import Cube, cube
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.verdict import cluster_warnings
from sft_probe.text_table import Form, interval, number, p_value, text_table

_NO_SETTING = {
    *("output_dir", "run_name", "run", "logging_dir", "resume_from_checkpoint", "local_rank"),
    *("probe_set", "snapshot_steps", "probe_steps", "max_wall_time_s", "num_docs", "sources"),
}
"""Entries of a manifest that say where a run lies or what was kept of it, not how it was made."""
_NORMAL = 1.96


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What run `a` moved more than run `b`."""

    a: Recording
    b: Recording
    measure: str
    """The log-prob that is compared: `logprob` or `logprob_with_eos`."""
    table: pd.DataFrame
    """`run_a run_b split category step step_unit quantity a b difference stderr low high band_low
    band_high num_docs num_clusters effective_clusters largest_cluster p_value`. `quantity` is
    `level` (log-prob at that step) or `change` (from the first common step); `difference` is the
    mean of a - b over the docs that both runs scored there, in nats per response, with its 95 %
    interval over prompts and a 95 % band over all categories and steps."""
    benchmarks: pd.DataFrame
    """`run_a run_b step task metric filter a b difference stderr low high`. The runs count as
    independent here, since answers to single items are not kept: intervals are too wide rather than
    too narrow."""
    settings: pd.DataFrame
    """`setting a b`: the settings that differ."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return what `sft-probe analyze A B` prints of the two runs."""
        return comparison_text(self)


def compare_recordings(
    a: Recording, b: Recording, measure: str = "logprob", categories: Sequence[str] | None = None
) -> Comparison:
    """Compare two runs doc by doc. Tables are empty where the runs have nothing in common.

    Args:
        a: a run.
        b: the run that is subtracted from it.
        measure: `logprob`, or `logprob_with_eos`.
        categories: default: all that both have.
    """
    tables: list[pd.DataFrame] = []
    if a.means is None and b.means is None:
        for split in [name for name in a.splits if name in b.splits]:
            names = [name for name in a.categories(split) if name in b.categories(split)]
            names = [name for name in names if categories is None or name in categories]
            if names:
                tables += _tables_of_split(a, b, split, names, measure)
    own = {"run_a": a.name, "run_b": b.name}
    table = pd.concat([part.assign(**own) for part in tables]) if tables else pd.DataFrame()
    first = [*own, "split", "category", "step", "step_unit"]
    if len(table):
        table = table[[*first, *(name for name in table if name not in first)]]
    return Comparison(
        a=a,
        b=b,
        measure=measure,
        table=table.reset_index(drop=True),
        benchmarks=_benchmarks(a, b).assign(**own),
        settings=settings_that_differ(a, b),
        notes=tuple(_notes(a, b, table)),
    )


def cautions(recordings: Sequence[Recording]) -> list[str]:
    """Return what of several runs must not be read off one figure: steps that count different
    things, other prompts, cuts at other lengths, other docs."""
    found = []
    units = _by_value(recordings, lambda run: run.step_unit)
    if len(units) > 1:
        found.append(f"steps count different things, so no axis is shared: {_each(units)}")
    splits = _by_value(recordings, lambda run: ", ".join(SPLIT_NAMES[name] for name in run.splits))
    if len(splits) > 1:
        found.append(f"scored on {_each(splits)}: compare splits of one kind")
    lengths = _by_value(recordings, lambda run: run.probe.get("max_length"))
    if len(lengths) > 1:
        found.append(f"texts were cut or left out at other lengths: {_each(lengths, ' tokens')}")
    docs = [set(run.rows["doc_id"]) for run in recordings if len(run.rows)]
    if len(docs) > 1 and not set.intersection(*docs):
        found.append("no doc is common to all runs: compare changes, not levels")
    return found


def _by_value(
    recordings: Sequence[Recording], value_of: Callable[[Recording], object]
) -> dict[str, list[str]]:
    """Return the names of the runs with scores by one of their properties, where it is known."""
    found: dict[str, list[str]] = {}
    for run in recordings:
        value = value_of(run)
        if run.splits and value is not None:
            found.setdefault(str(value), []).append(run.name)
    return found


def _each(names: dict[str, list[str]], unit: str = "") -> str:
    return "; ".join(f"{value}{unit} ({', '.join(runs)})" for value, runs in names.items())


def _tables_of_split(
    a: Recording, b: Recording, split: str, categories: list[str], measure: str
) -> list[pd.DataFrame]:
    """Return the table of levels and that of changes; none without two common steps and a doc."""
    rows = [item.rows[item.rows["split"] == split] for item in (a, b)]
    rows = [part[part["category"].isin(categories)] for part in rows]
    docs = set(rows[0]["doc_id"]) & set(rows[1]["doc_id"])
    steps = set(rows[0]["step"]) & set(rows[1]["step"])
    if not docs or len(steps) < 2 or a.step_unit != b.step_unit:
        return []
    one, two = (
        cube(part[part["doc_id"].isin(docs) & part["step"].isin(steps)], categories, item.texts)
        for part, item in zip(rows, (a, b), strict=True)
    )
    clusters = renumber(one.clusters)
    tables = []
    for quantity in ("level", "change"):
        values = [_values(item, measure, quantity) for item in (one, two)]
        difference = values[0] - values[1]
        found = estimate(difference, clusters, band=True)
        present = [np.where(np.isnan(difference), np.nan, own) for own in values]
        columns = {
            "a": weighted_mean(present[0]),
            "b": weighted_mean(present[1]),
            "difference": found.mean,
            **{
                name: getattr(found, name)
                for name in ("stderr", "low", "high", "band_low", "band_high", "num_docs")
            },
            **{
                name: getattr(found, name)
                for name in ("num_clusters", "effective_clusters", "largest_cluster")
            },
            "p_value": found.p_values,
        }
        places = pd.MultiIndex.from_product([one.categories, one.steps], names=["category", "step"])
        flat = {name: column.reshape(-1) for name, column in columns.items()}
        table = pd.DataFrame(flat, index=places).reset_index()
        table.insert(2, "quantity", quantity)
        tables.append(table.assign(split=split, step_unit=a.step_unit))
    return tables


def _values(arrays: Cube, measure: str, quantity: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return arrays.arrays[measure] if quantity == "level" else arrays.change(measure)


def _benchmarks(a: Recording, b: Recording) -> pd.DataFrame:
    if a.benchmarks is None or b.benchmarks is None:
        return pd.DataFrame()
    keys = ["step", "task", "metric", "filter"]
    both = a.benchmarks.merge(b.benchmarks, on=keys, suffixes=("_a", "_b"))
    one, two = (pd.to_numeric(both[f"stderr_{end}"], errors="coerce") for end in "ab")
    stderr = np.sqrt(one**2 + two**2)
    difference = both["value_a"] - both["value_b"]
    return both[keys].assign(
        a=both["value_a"],
        b=both["value_b"],
        difference=difference,
        stderr=stderr,
        low=difference - _NORMAL * stderr,
        high=difference + _NORMAL * stderr,
    )


def settings_that_differ(a: Recording, b: Recording) -> pd.DataFrame:
    """Return `setting a b` of all settings of training and scoring that are not the same."""
    ours, theirs = (_settings(item) for item in (a, b))
    rows = [
        {"setting": name, "a": ours.get(name, "-"), "b": theirs.get(name, "-")}
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name, "-") != theirs.get(name, "-")
    ]
    return pd.DataFrame(rows, columns=["setting", "a", "b"])


def _settings(recording: Recording) -> dict[str, str]:
    probed = ("prompt_format", "dtype", "max_length", "probe_set_sha256")
    own = {
        "model": recording.model,
        "train_category": recording.train_category,
        "order_seed": recording.order_seed,
        **{f"scored with {name}": recording.probe.get(name) for name in probed},
        **recording.manifest.get("arguments", {}),
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in own.items()
        if name not in _NO_SETTING
    }


def _notes(a: Recording, b: Recording, table: pd.DataFrame) -> list[str]:
    notes = []
    if table.empty:
        return ["the two runs have no prompts scored at two common steps: nothing can be paired"]
    if a.probe.get("probe_set_sha256") != b.probe.get("probe_set_sha256"):
        notes.append("the runs were scored on different probe sets: docs are paired by their ids")
    if a.probe.get("prompt_format") != b.probe.get("prompt_format"):
        notes.append("the prompt formats differ: levels are not those of the same text")
    return [*notes, "intervals hold for other prompts; two runs say nothing of training noise"]


def comparison_text(found: Comparison, form: Form = "text") -> str:
    """Return what `sft-probe analyze A B` prints of the two runs: a table for each split, the
    benchmarks, and the settings that differ."""
    head = f"{found.a.name} less {found.b.name}"
    blocks = []
    changes = found.table[found.table["quantity"] == "change"] if len(found.table) else found.table
    for split, part in changes.groupby("split", sort=False) if len(changes) else ():
        last = part[part["step"] == part["step"].max()]
        adjusted = holm(last["p_value"].tolist())
        rows = [
            [
                row["category"],
                number(row["a"], "+z.1f"),
                number(row["b"], "+z.1f"),
                number(row["difference"], "+z.1f"),
                interval(row["low"], row["high"]),
                p_value(p),
            ]
            for (_, row), p in zip(last.iterrows(), adjusted, strict=True)
        ]
        where = f"{SPLIT_NAMES[str(split)]} in {count_text(last['num_clusters'].to_numpy())}"
        title = (
            f"{head}: change of log p(response | prompt) from {part['step_unit'].iloc[0]} "
            f"{part['step'].min()} to {part['step'].max()}, nats per response; "
            f"{count_text(last['num_docs'].to_numpy(), where)} that both runs scored"
        )
        columns = ["category", found.a.name, found.b.name, "A - B", "95 % interval", "p (Holm)"]
        warnings = [f"! {note}" for note in cluster_warnings(last)]
        blocks.append("\n".join([title, *warnings, "", text_table(columns, rows, form)]))
    return "\n\n".join([*blocks, *_benchmark_text(found, form), *_settings_text(found, form)])


def _benchmark_text(found: Comparison, form: Form) -> list[str]:
    if found.benchmarks.empty:
        return []
    table = found.benchmarks[found.benchmarks["step"] == found.benchmarks["step"].max()]
    rows = [
        [
            row["task"],
            row["metric"],
            *(number(row[name], ".3f") for name in ("a", "b")),
            number(row["difference"], "+z.3f"),
            interval(row["low"], row["high"], "+z.3f"),
        ]
        for _, row in table.iterrows()
    ]
    columns = ["benchmark", "metric", found.a.name, found.b.name, "A - B", "95 % interval"]
    title = f"benchmarks at step {table['step'].iloc[0]}, the runs taken as independent"
    return [f"{title}\n\n{text_table(columns, rows, form, left=2)}"]


def _settings_text(found: Comparison, form: Form) -> list[str]:
    notes = "\n".join(f"! {note}" for note in found.notes)
    if found.settings.empty:
        return ["no setting differs", notes]
    rows = found.settings.to_numpy().tolist()
    table = text_table(["setting", found.a.name, found.b.name], rows, form, left=3)
    return [f"settings that differ\n\n{table}", notes]
