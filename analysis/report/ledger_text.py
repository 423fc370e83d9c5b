"""What `sft-probe ledger` prints: the parts of a gain, by prompt, layer or training example."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sft_probe.analysis.studies.ledger import MEASURES, WHOLE, Ledger

if TYPE_CHECKING:  # these two import what trains, which the report has no need of
    from sft_probe.analysis.studies.ledger_examples import ExampleLedger
    from sft_probe.analysis.studies.ledger_path import PathLedger

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


def path_text(found: "PathLedger") -> str:
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


_MAX_SHOWN = 60
_MAX_IN_REPORT = 600
_SHOWN = {
    "train_category": "trained on",
    "doc_id": "doc",
    "times_shown": "times",
    "change": "nats",
    "share": "share",
    "response": "response",
}


def examples_text(found: "ExampleLedger") -> str:
    """Return which training examples carried each category's path, and how well it adds up."""
    blocks = []
    for category, own in found.closure.groupby("category", sort=False):
        sums = own[["measured", "path", "weight_decay"]].sum()
        blocks.append(
            f"{category}: {sums['measured']:+z.3f} nats measured, {sums['path']:+z.3f} along the "
            f"path ({sums['weight_decay']:+z.3f} of it by weight decay); shares of the path:"
        )
        groups = found.groups[found.groups["category"] == category]
        blocks.append(_plain(groups[["by", "group", "times_shown", "change", "share"]]))
        for end in ("most", "least"):
            mine = found.extremes[found.extremes["category"] == category]
            table = mine[mine["end"] == end]
            blocks.append(f"carried {end} of {category}'s path\n{_plain(_short(table))}")
    blocks.append(_check(found))
    blocks.append(
        f"{found.num_docs} held-out docs, one run. These are shares of the path: an account of how "
        "the weights moved. Training again without an example is another question."
    )
    return "\n\n".join(blocks)


def _plain(table: pd.DataFrame) -> str:
    formats = {"change": "{:+z.3f}".format, "nats": "{:+z.3f}".format, "share": "{:+z.1%}".format}
    return str(table.to_string(index=False, formatters=formats))


def _short(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that are printed, texts on one line."""
    texts = [" ".join(text.split()) for text in table["response"]]
    cut = [text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..." for text in texts]
    return table.assign(response=cut)[list(_SHOWN)].rename(columns=_SHOWN)


def _check(found: "ExampleLedger") -> str:
    """Return whether the repeated run is the run, and whether the shares are all of the path."""
    same = "the repeated run has the weights of the snapshots, bit by bit"
    if found.weights_off:
        same = (
            "! the weights of the repeated run are not those of the snapshots: off by up to "
            f"{found.weights_off:.1e} of the largest change (another version of a library, or "
            "another number of threads)"
        )
    lines = [same, f"examples and weight decay miss the path by {found.sum_error:.1e} of it"]
    if found.too_long:
        lines.append(
            f"! steps too far apart between {', '.join(found.too_long)}: there the path misses over"
            " 1 % of what was measured. Add snapshots there."
        )
    return "\n".join(lines)


def written_examples(folder: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, columns and rows of what `sft-probe ledger --examples` wrote into a directory:
    which examples carried most and least, with texts."""
    path = folder / "example_extremes.csv"
    if not path.is_file():
        return []
    table = pd.read_csv(path, keep_default_na=False)
    tables = []
    for (category, end), own in table.groupby(["category", "end"], sort=False):
        rows = [
            [
                str(row["doc_id"]),
                str(row["train_category"]),
                f"{row['change']:+z.3f}",
                f"{row['share']:+z.1%}",
                str(row["prompt"])[-_MAX_IN_REPORT:],
                str(row["response"])[:_MAX_IN_REPORT],
            ]
            for _, row in own.iterrows()
        ]
        title = f"Training examples that carried {end} of {category}'s path"
        columns = ["doc", "trained on", "nats", "share of the path", "prompt", "response"]
        tables.append((title, columns, rows))
    return tables
