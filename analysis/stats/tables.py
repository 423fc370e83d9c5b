"""The tables of a run, built from the rows of all its complete steps, live and swept."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute
from filelock import FileLock

from sft_probe.analysis.stats.generations import read_generations
from sft_probe.analysis.stats.runs import recording_of_rows
from sft_probe.analysis.stats.trajectory import trajectory
from sft_probe.files import find, read_jsonl, write_text
from sft_probe.scores import read_scores, write_parquet


def tables_lock(directory: Path) -> FileLock:
    """Return the lock of the tables. While it is held, no part of a sweep disappears."""
    return FileLock(directory / ".tables.lock")


def write_tables(directory: Path) -> list[Path]:
    """Write `scores.parquet`, `trajectory.csv`, and `benchmarks.csv` and `generations.parquet`
    where there are any.

    Returns what was written.

    Under a lock, so that of several shards the one that ends last sees the steps of all.
    """
    written = []
    with tables_lock(directory):
        paths = find(directory, "probe/step_*.jsonl") + find(directory, "sweep/step_*/*/rows.jsonl")
        if paths:
            scores = read_scores(paths)
            write_parquet(directory / "scores.parquet", scores)
            write_text(
                directory / "trajectory.csv", _trajectories(directory, scores).to_csv(index=False)
            )
            written += [directory / "scores.parquet", directory / "trajectory.csv"]
        benchmarks = [
            row
            for path in find(directory, "sweep/step_*/*/benchmarks.jsonl")
            for row in read_jsonl(path)
        ]
        if len(answers := read_generations(directory)):
            write_parquet(
                directory / "generations.parquet",
                pa.Table.from_pandas(answers, preserve_index=False),
            )
            written.append(directory / "generations.parquet")
        if benchmarks:
            write_text(directory / "benchmarks.csv", pd.DataFrame(benchmarks).to_csv(index=False))
            written.append(directory / "benchmarks.csv")
    return written


def _trajectories(directory: Path, scores: pa.Table) -> pd.DataFrame:
    """Return the trajectory of each source, live before swept: the two never share a curve."""
    tables = []
    for source in ("live", "lm_eval"):
        rows = scores.filter(pyarrow.compute.equal(scores["source"], source))
        if rows.num_rows:
            tables.append(trajectory(recording_of_rows(directory, rows)))
    return pd.concat(tables, ignore_index=True)
