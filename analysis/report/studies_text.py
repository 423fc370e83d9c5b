"""What `sft-probe ledger`, `sft-probe words` and `sft-probe weights` print."""

from typing import Any

import pandas as pd

from sft_probe.analysis.studies.ledger import MEASURES, WHOLE, Ledger
from sft_probe.analysis.studies.ledger_path import PathLedger
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


_MEANINGS = {
    "text": "shows without any prompt",
    "register": "with any prompt at all",
    "topic": "with a prompt on a near topic",
    "prompt": "only with its own prompt",
}


def ledger_text(found: Ledger) -> str:
    """Return the parts of the last step, a sentence for each category, and what they do not say."""
    last = found.parts["step"].max()
    blocks = [
        f"change of log p by step {last}, nats per response, by the prompt that it shows under; "
        "95 % intervals over docs; one run"
    ]
    for category, own in found.parts[found.parts["step"] == last].groupby("category", sort=False):
        table = own.pivot(index="part", columns="measure", values="change")
        table = table.loc[list(dict.fromkeys(own["part"])), list(MEASURES)]
        whole = own[own["measure"] == MEASURES[0]].set_index("part")
        table.insert(1, "95 % interval", [_interval(whole.loc[part]) for part in table.index])
        table = table.rename(columns={MEASURES[0]: "total"})
        shown: str = table.reset_index().to_string(index=False, float_format="{:+z.2f}".format)
        name = str(category)
        blocks.append(f"{name}\n{shown}\n- {_ledger_sentence(name, whole)}")
    if len(found.preference):
        row = found.preference.iloc[-1]
        blocks.append(
            f"preference: chosen gained {row['change']:+z.2f} [{row['low']:+z.2f}, "
            f"{row['high']:+z.2f}] nats more than rejected"
        )
    blocks.append(
        "This says where the gain shows, not what in the training data caused it: training under "
        "other prompts (`sft-probe transfer`) is another question with another answer."
    )
    return "\n\n".join(blocks)


def _interval(row: pd.Series) -> str:
    return f"[{row['low']:+z.2f}, {row['high']:+z.2f}]"


def _ledger_sentence(category: str, whole: pd.DataFrame) -> str:
    parts = [
        f"{row['change']:+z.1f} {' or '.join(_MEANINGS[name] for name in str(part).split(' + '))}"
        for part, row in whole.iterrows()
        if part != WHOLE
    ]
    gain: Any = whole.loc[WHOLE, "change"]
    return f"of {category}'s {gain:+z.1f} nats: {'; '.join(parts)}"


def path_text(found: PathLedger) -> str:
    """Return where each category's change lies, over all intervals, and whether it closes."""
    blocks = []
    for category, parts in found.parts.groupby("category", sort=False):
        sums = parts.groupby(["layer", "kind"], dropna=False)["change"].sum().reset_index()
        largest = sums.reindex(sums["change"].abs().sort_values(ascending=False).index).head(8)
        whole = found.closure[found.closure["category"] == category]
        name = str(category)
        blocks.append(
            f"{name}: {whole['measured'].sum():+z.3f} nats measured, {whole['path'].sum():+z.3f} "
            "along the path; the largest shares of the path:"
        )
        largest["layer"] = largest["layer"].astype(object).where(largest["layer"].notna(), "-")
        blocks.append(str(largest.to_string(index=False, float_format="{:+z.3f}".format)))
    errors = found.closure["error"]
    if found.too_long:
        blocks.append(
            f"! steps too far apart between {', '.join(found.too_long)}: the path misses up to "
            f"{errors.max():.1%} of its parts. Add snapshots there."
        )
    else:
        blocks.append(f"the path closes: at most {errors.max():.2%} of its parts are missed")
    blocks.append(
        f"{found.parts['num_docs'].max()} held-out docs, one run. These are shares of the path, "
        "not what would not have happened without a layer."
    )
    return "\n\n".join(blocks)


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
