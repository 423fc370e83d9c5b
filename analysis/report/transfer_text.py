"""What `sft-probe transfer` prints."""

import math

import pandas as pd

from sft_probe.analysis.studies.transfer import Transfer
from sft_probe.text_table import text_table


def transfer_text(found: Transfer) -> str:
    """Return what `sft-probe transfer` prints."""
    categories = list(dict.fromkeys(found.matrix["category"]))
    selective = {
        row["row"]: _range(row, "selectivity")
        if len(categories) > 1
        else "not defined (one category)"
        for _, row in found.selectivity.iterrows()
    }
    rows = [
        [
            name,
            part["seeds"].iloc[0],
            *(f"{row['transfer']:+z.3f}{_mark(row)}" for _, row in part.iterrows()),
            selective[name],
        ]
        for name, part in found.matrix.groupby("row", sort=False)
    ]
    lines = [
        f"transfer at step {found.step} on {found.num_docs} held-out prompts in {found.clusters}: "
        "change of body log-prob, nats per body token (. : the interval holds 0; ? : no interval)",
        text_table(["trained on", "seeds", *categories, "selectivity"], rows),
    ]
    lines.append("")
    for _, row in found.omega.iterrows():
        if row["is_null"]:
            lines.append(
                f"noise floor of omega, from {row['row']} and {row['other']}: {row['omega']:.3f} "
                "(sd over random "
                "halvings of the prompts, divided by 2)"
            )
            continue
        matched = "not defined (an on-target gain is not told apart from 0)"
        if not math.isnan(row["matched_gain"]):
            matched = (
                f"both at {row['matched_gain']:.3f} nats per token: "
                f"{_range(row, 'matched_omega', 'matched_')}"
            )
        lines.append(f"omega({row['row']}, {row['other']}): {_range(row, 'omega')}; {matched}")
    for _, row in found.differences.iterrows():
        interval = (
            "(no interval)"
            if math.isnan(row["low"])
            else f"[{row['low']:+z.3f}, {row['high']:+z.3f}]"
        )
        more = f"{row['difference']:+z.3f} {interval} nats per body token more"
        lines.append(
            f"training on {row['row']} gained {more} on {row['category']} than training on "
            f"{row['other']}"
        )
    for _, row in found.shares.iterrows():
        lines.append(
            f"share of chosen's held-out gain that training on {row['row']} gives: "
            f"{_range(row, 'share')}"
        )
    return "\n".join([*lines, *(f"! {note}" for note in found.notes)])


def _mark(row: pd.Series) -> str:
    if math.isnan(row["low"]):
        return "?"
    return " " if row["low"] * row["high"] > 0 else "."


def _range(row: pd.Series, value: str, prefix: str = "") -> str:
    if math.isnan(row[value]):
        return "not defined (an on-target gain is not told apart from 0)"
    return f"{row[value]:.2f} [{row[f'{prefix}low']:.2f}, {row[f'{prefix}high']:.2f}]"
