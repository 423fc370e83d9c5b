"""What `sft-probe ledger`, `sft-probe words` and `sft-probe weights` print."""

import pandas as pd

from sft_probe.analysis.studies.weight_changes import by_layer
from sft_probe.analysis.studies.words import MIN_DOCS, WordChanges

_CLASS_COLUMNS = {
    "kind": "class",
    "num_pieces": "pieces",
    "change": "nats per response",
    "low": "low",
    "high": "high",
    "p_holm": "p (Holm)",
}
_LITERAL_COLUMNS = {
    "literal": "word",
    "num_docs": "docs",
    "count": "times",
    "change": "nats each",
    "low": "low",
    "high": "high",
    "p_holm": "p (Holm)",
    "total": "nats in all",
}


def words_text(found: WordChanges, top: int) -> str:
    """Return the classes, and the words and sequences that gained most, of each category."""
    head = (
        f"change of log p from step {found.first_step} to {found.last_step}; 95 % intervals over "
        "docs; one run"
    )
    blocks = [head]
    for category, classes in found.classes.groupby("category", sort=False):
        total = classes["change"].sum()
        blocks.append(f"{category}: {total:+z.2f} nats per response, terminator included")
        blocks.append(_table(classes, _CLASS_COLUMNS))
        for name, table in (("words", found.literals), ("sequences", found.sequences)):
            own = table[table["category"] == category]
            if len(own):
                blocks.append(f"{name} of {category} that gained most, in {MIN_DOCS} docs or more")
                blocks.append(_table(own.head(top), _LITERAL_COLUMNS))
    return "\n\n".join(blocks)


def weights_text(changes: pd.DataFrame) -> str:
    """Return the changes of the last step by kind, and the layers that moved most and least."""
    last = int(changes["step"].max())
    at_last = changes[changes["step"] == last]
    squares = at_last.assign(
        norm=at_last["norm"] ** 2, change_norm=at_last["change_norm"] ** 2
    ).groupby("kind")[["norm", "change_norm"]]
    kinds = squares.sum() ** 0.5
    means = at_last.groupby("kind")[["effective_rank", "angle_degrees"]].mean()
    table = pd.DataFrame(
        {
            "kind": kinds.index,
            "relative change": (kinds["change_norm"] / kinds["norm"]).map("{:.2e}".format),
            "effective rank, mean": means["effective_rank"].map("{:.1f}".format),
            "angle, mean degrees": means["angle_degrees"].map("{:.3f}".format),
        }
    ).replace("nan", "-")
    layers = by_layer(at_last).dropna(subset="layer").sort_values("relative_change")
    lines = [f"change of the weights from the first snapshot to step {last}", ""]
    lines.append(table.to_string(index=False))
    if len(layers):
        least, most = layers.iloc[0], layers.iloc[-1]
        lines.append("")
        lines += [
            f"moved {word}: {row['kind']} of layer {row['layer']}, by "
            f"{row['relative_change']:.2e} of its size"
            for word, row in (("most", most), ("least", least))
        ]
    return "\n".join(lines)


def _table(rows: pd.DataFrame, columns: dict[str, str]) -> str:
    shown = rows[list(columns)].rename(columns=columns)
    formats = {
        "p (Holm)": lambda p: "<0.0001" if p < 1e-4 else f"{p:.4f}",
        **{
            name: "{:+z.3f}".format
            for name in ("nats per response", "low", "high", "nats each", "nats in all")
            if name in shown
        },
    }
    return str(shown.to_string(index=False, formatters=formats, na_rep="-"))
