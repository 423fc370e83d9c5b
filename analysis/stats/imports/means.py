"""Tables of means over docs, one row per category and step."""

from pathlib import Path

import pandas as pd

from sft_probe.analysis.stats.imports.imported import EXAMPLES, Imported, numbers_of, steps_of
from sft_probe.analysis.stats.steps import STEP
from sft_probe.errors import UserError

_STEP_COLUMNS = {"step": STEP, "train_examples": EXAMPLES, "examples_seen": EXAMPLES}
_VALUE_COLUMNS = ("mean_sum_logprob", "mean_logprob", "logprob")


def is_means(table: pd.DataFrame) -> bool:
    """Return whether a table looks like one of means."""
    return "category" in table or any(name in table for name in _VALUE_COLUMNS)


def read_means(path: Path, table: pd.DataFrame) -> Imported:
    """Return the means of a CSV file.

    It has `category`, one of `step`, `train_examples`, `examples_seen`, and one of
    `mean_sum_logprob`, `mean_logprob`, `logprob` (nats); `split` is optional. Several rows of one
    category and step, as of docs, are averaged.

    Raises:
        UserError: a column is missing, or a value is no number; names it.
    """
    step = next((name for name in _STEP_COLUMNS if name in table), None)
    value = next((name for name in _VALUE_COLUMNS if name in table), None)
    if "category" not in table or step is None or value is None:
        raise UserError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; it needs category, one "
            f"of {', '.join(_STEP_COLUMNS)}, and one of {', '.join(_VALUE_COLUMNS)}."
        )
    if "source" in table and table["source"].nunique() > 1:
        raise UserError(
            f"{path} holds scores of the live probe and of the sweep; give the directory of the "
            "run."
        )
    if "split" not in table:
        table = table.assign(split="heldout")
    if unknown := set(table["split"]) - {"heldout", "train"}:
        raise UserError(
            f"{path}: the split {sorted(map(str, unknown))[0]!r} is neither heldout nor train."
        )
    plain = pd.DataFrame(
        {
            "split": table["split"],
            "category": table["category"].astype(str),
            "step": steps_of(path, table, step),
            "value": numbers_of(path, table, value),
        }
    )
    keys = ["split", "category", "step"]
    return Imported(
        name=path.stem,
        form="a table of means over docs",
        step_unit=_STEP_COLUMNS[step],
        taken=(
            f"{step}: the {_STEP_COLUMNS[step]}",
            f"{value}: mean log-prob in nats per response",
        ),
        means=plain.groupby(keys, sort=False)["value"].mean().reset_index(),
    )
