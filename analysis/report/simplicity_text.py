"""What `sft-probe simplicity` prints."""

import math

from sft_probe.analysis.studies.matched_kl import kl_text
from sft_probe.analysis.studies.simplicity import Simplicity
from sft_probe.text_table import number, text_table

_COLUMNS = (
    *("run", "trained on", "order", "examples", "bits/byte: start", "prequential", "nats"),
    *("learned bits", "half gain in"),
)


def simplicity_text(found: Simplicity) -> str:
    """Return what `sft-probe simplicity` prints."""
    rows = [
        [
            row["run"],
            row["train_category"],
            row["order_seed"],
            row["num_examples"],
            number(row["start_bits_per_byte"], ".3f"),
            f"{row['bits_per_byte']:.3f}",
            f"{row['code_length']:.0f}",
            number(row["learned_bits"], ".0f"),
            _bracket(row["half_gain_after_examples"], row["half_gain_by_examples"]),
        ]
        for _, row in found.runs.iterrows()
    ]
    lines = [text_table(_COLUMNS, rows, left=2)]
    lines.append("")
    for _, row in found.runs.iterrows():
        if row["num_at_start"] < row["num_examples"] and not str(row["train_category"]).endswith(
            "_no_prompt"
        ):
            lines.append(
                f"! {row['run']}: step-0 scores of {row['num_at_start']} of {row['num_examples']} "
                "training texts; "
                f"`sft-probe sweep RUN --splits heldout,train` gives the rest"
            )
    if "kl_at" in found.runs:
        lines += kl_text(found.runs)
    lines += _excess_lines(found)
    for _, row in found.contrasts.iterrows():
        scope = (
            "for other texts; one order" if row["num_runs"] == 1 else "for other orders and texts"
        )
        interval = (
            f"[{row['low']:+z.0f}, {row['high']:+z.0f}] {scope}"
            if not math.isnan(row["low"])
            else "no interval"
        )
        lines.append(
            f"{row['train_category']} costs {row['difference_bits']:+z.0f} bits "
            f"({row['bits_per_byte']:+z.4f} per byte) "
            f"more than {row['than']} on the same {row['num_texts']} texts, {row['num_runs']} "
            f"order(s), {interval}"
        )
    return "\n".join([*lines, *(f"! {note}" for note in found.notes)])


def _excess_lines(found: Simplicity) -> list[str]:
    """Return a line for each category with a description length: that of the last probed step of
    its first epoch."""
    if not len(found.excess):
        return []
    lines = []
    for category, table in found.excess.groupby("train_category", sort=False):
        row = table.iloc[-1]
        if row["gain_high"] < 0:
            lines.append(f"{category}: held-out loss rose: no description length")
            continue
        lines.append(
            f"{category}: excess description length {row['excess_bits']:+z.0f} bits "
            f"[{row['low']:+z.0f}, {row['high']:+z.0f}] for other orders and texts, "
            f"{row['bits_per_token']:+z.3f} per token, after {row['examples_seen']} of "
            f"{row['num_texts']} examples, {row['num_orders']} orders"
        )
    return lines


def _bracket(after: float, by: float) -> str:
    """Return "16-64", the probed numbers of examples between which half of the gain was reached."""
    return "-" if math.isnan(by) else f"{after:.0f}-{by:.0f}"
