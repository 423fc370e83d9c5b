"""What `sft-probe transfer` prints."""

import math

import pandas as pd

from sft_probe.analysis.transfer import Transfer


def transfer_text(found: Transfer) -> str:
    """What `sft-probe transfer` prints."""
    categories = list(dict.fromkeys(found.matrix["category"]))
    lines = [
        f"transfer at step {found.step} on {found.num_docs} held-out prompts in {found.num_clusters} clusters: change "
        "of body log-prob, nats per body token (. : the interval holds 0)",
        f"{'trained on':<20}{'seeds':>6}" + "".join(f"{name[:13]:>14}" for name in categories) + f"{'selectivity':>13}",
    ]
    selective = dict(zip(found.selectivity["row"], found.selectivity["selectivity"], strict=True))
    for name, part in found.matrix.groupby("row", sort=False):
        cells = [
            f"{row['transfer']:>+13.3f}{' ' if row['low'] * row['high'] > 0 else '.'}" for _, row in part.iterrows()
        ]
        lines.append(f"{str(name)[:19]:<20}{part['seeds'].iloc[0]:>6}{''.join(cells)}{selective[name]:>13.2f}")
    lines.append("")
    for _, row in found.omega.iterrows():
        if row["is_null"]:
            floor = f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"noise floor of omega, from {row['row']} and {row['other']}: {floor}")
            continue
        matched = _range(row, "matched_omega", "matched_low", "matched_high")
        lines.append(
            f"omega({row['row']}, {row['other']}): {_range(row, 'omega', 'low', 'high')}; both at "
            f"{row['matched_gain']:.3f} nats per token: {matched}"
            + (
                ""
                if math.isnan(row["seeds_low"])
                else f"; over seeds [{row['seeds_low']:.2f}, {row['seeds_high']:.2f}]"
            )
        )
    for _, row in found.differences.iterrows():
        lines.append(
            f"{row['row']} gained {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] nats per body token "
            f"more on {row['category']} than {row['other']}"
        )
    for _, row in found.shares.iterrows():
        seeds = (
            "" if math.isnan(row["seeds_low"]) else f", over seeds [{row['seeds_low']:.2f}, {row['seeds_high']:.2f}]"
        )
        lines.append(
            f"training on {row['row']} gives {_range(row, 'share', 'low', 'high')} of chosen's held-out gain{seeds}"
        )
    return "\n".join([*lines, *(f"! {note}" for note in found.notes)])


def _range(row: pd.Series, value: str, low: str, high: str) -> str:
    if math.isnan(row[value]):
        return "not defined (an on-target gain is not told apart from 0)"
    return f"{row[value]:.2f} [{row[low]:.2f}, {row[high]:.2f}]"
