"""What a model's distributions do beside the log-prob of a response: argmax mass, entropy, energy,
how far they lie from the tokens, and how far from those of a reference."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.changes import (
    PER_RESPONSE,
    Measure,
    chosen_categories,
    table_of_measure,
)
from sft_probe.analysis.stats.intervals import Floats, holm
from sft_probe.analysis.stats.measures import POSITIONS, Cube, at_position
from sft_probe.analysis.stats.runs import Recording
from sft_probe.analysis.stats.verdict import ALPHA
from sft_probe.text_table import Form, interval, number, text_table

_PER_TOKEN = {
    "entropy": "nats/token",
    "energy": "mean/token",
    "p_e": "mean/token",
    "kl_forward": "nats/token",
    "kl_reverse": "nats/token",
    "marginal": "share of tokens",
    "shifted": "share of tokens",
}
"""Means over tokens, ratios of sums."""
_PRINTED = (
    {"argmax": "argmax mass", "entropy": "entropy/token", "energy": "energy/token"},
    {"kl_forward": "forward KL", "kl_reverse": "reverse KL", "shifted": "shifted"},
)
_PARTS = (None, *POSITIONS)


def distribution_table(
    recording: Recording, categories: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the changes of what the distributions say, a row per split, category, step, measure
    and unit; empty for rows without these columns.

    Columns are those of `change_table` without `rest_*` and `share*`, with the same intervals and
    bands. Measures, each also by position (`entropy_tokens_2_4`): `argmax`, the summed log-prob of
    the most likely tokens (nats per response); `entropy` (nats per token), `energy` = 1 - p of the
    token and `p_e` = ||p - one-hot|| (means per token, ratios of sums); `A_o` = sqrt(V m^2 + V - 2)
    with m the response's mean ||p|| and V the size of the vocabulary, where that is known (Ren &
    Sutherland, arXiv 2407.10490). Of a sweep with `--reference`, per token: `kl_forward` =
    KL(reference || model), `kl_reverse` = KL(model || reference), and the shares `marginal` and
    `shifted` of places whose most likely token has rank 2 or 3, or above 3, under the reference.
    """
    tables = []
    if recording.means is None:
        for split in recording.splits:
            if names := chosen_categories(recording, split, categories):
                arrays = recording.cube(split, names)
                for measure in _measures(arrays, recording.vocab_size):
                    if not np.isnan(measure.values[:, :, 0]).all():
                        tables.append(table_of_measure(recording, split, arrays, measure))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _measures(arrays: Cube, vocab_size: int | None) -> Iterator[Measure]:
    found = arrays.arrays
    for part in _PARTS:
        num_tokens = arrays.num_tokens(part)
        if (column := at_position("argmax", part)) in found:
            yield Measure(column, PER_RESPONSE, found[column])
        for name, unit in _PER_TOKEN.items():
            if (column := at_position(name, part)) in found:
                yield Measure(column, unit, found[column], num_tokens)
        if vocab_size and (column := at_position("norm", part)) in found:
            values = _a_o(found[column], num_tokens, vocab_size)
            yield Measure(at_position("A_o", part), "mean/response", values)


def _a_o(norms: Floats, num_tokens: Floats, vocab_size: int) -> Floats:
    """Return the Frobenius norm of I - 1 p^T for the mean norm of p; NaN where there is no
    token."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(vocab_size * (norms / num_tokens) ** 2 + vocab_size - 2))


def squeezing_sentence(verdict: pd.DataFrame, distribution: pd.DataFrame) -> str | None:
    """Return a sentence on the categories that fell while argmax mass rose; `None` without any.

    Argmax mass rises in a category where that is certain after Holm's adjustment over categories.

    Args:
        verdict: rows of one run and split.
        distribution: from `distribution_table`.
    """
    first = verdict.iloc[0]
    argmax = last_steps(distribution, first["run"], first["split"], "argmax")
    if argmax.empty:
        return None
    certain = holm(argmax["p_value"].to_numpy(float)) < ALPHA
    rose = argmax["change"][certain & (argmax["change"] > 0).to_numpy()].to_dict()
    fell = verdict[verdict["moved"] & (verdict["change"] < 0)].set_index("category")["change"]
    both = [
        f"{name} ({change:+z.1f}, argmax mass {rose[name]:+z.1f})"
        for name, change in fell.items()
        if name in rose
    ]
    if not both:
        return None
    return (
        f"squeezing by {first['last_step']}: {', '.join(both)} fell while the most likely tokens "
        "at the same places became more likely, in nats"
    )


def last_steps(table: pd.DataFrame, run: str, split: str, measure: str) -> pd.DataFrame:
    """Return the rows of the last step of one measure, run and split, by category."""
    if table.empty:
        return table
    is_own = (table["run"] == run) & (table["split"] == split) & (table["measure"] == measure)
    own: pd.DataFrame = table[is_own]
    last: pd.DataFrame = own[own["step"] == own["step"].max()].set_index("category")
    return last


def distribution_text(table: pd.DataFrame, recording: Recording, split: str, form: Form) -> str:
    """Return what `sft-probe analyze` prints of one run and split; empty without these measures."""
    reference = recording.probe.get("reference") or "its reference"
    titles = (
        "the model's distributions at the tokens of each response, first step and change",
        f"distance from {reference} per token: forward KL(reference || model), reverse KL, and the "
        "share of places whose most likely token is not among the reference's first three",
    )
    blocks = [
        f"{title}\n\n{_table_text(table, recording.name, split, columns, form)}"
        for title, columns in zip(titles, _PRINTED, strict=True)
        if not last_steps(table, recording.name, split, next(iter(columns))).empty
    ]
    return "\n\n".join(blocks)


def _table_text(
    table: pd.DataFrame, run: str, split: str, columns: Mapping[str, str], form: Form
) -> str:
    """Return level at the first step, change and interval of some measures, by category."""
    found = {name: last_steps(table, run, split, name) for name in columns}
    heads = ["category"]
    rows = [[str(category)] for category in next(iter(found.values())).index]
    for name, title in columns.items():
        digits = ".1f" if name == "argmax" else ".3f"
        heads += [title, "change", "95 % interval"]
        for cells, (_, row) in zip(rows, found[name].iterrows(), strict=True):
            cells += [
                number(row["level"] - row["change"], digits),
                number(row["change"], f"+{digits}"),
                interval(row["low"], row["high"], f"+{digits}"),
            ]
    return text_table(heads, rows, form)
