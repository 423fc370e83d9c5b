"""The data set card: `README.md` with the header that the hub and `datasets.load_dataset` read, and
one figure."""

import html
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sft_probe.files import new_file, write_text
from sft_probe.probe_set import SPLITS
from sft_probe.synth.checks.words import count_words

log = logging.getLogger(__name__)
FIGURE = "lengths.png"
_FILES = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS]


def write_card(
    out: Path,
    docs: Sequence[dict[str, Any]],
    writers: dict[str, str],
    prompt_format: str,
    provenance: dict[str, Any],
) -> None:
    """Writes `README.md`, and the figure where the extra `report` is installed."""
    table = length_table(docs, list(writers))
    has_figure = _write_figure(out / FIGURE, table)
    header = {
        "license": provenance["license"],
        "task_categories": ["text-generation"],
        "tags": ["sft-probe", "preference", "synthetic"],
        "configs": [{"config_name": "default", "data_files": _FILES}],
    }
    counts = {split: sum(doc["split"] == split for doc in docs) for split in SPLITS}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(out.resolve().name)}",
        f"A probe set of sft-probe: {counts['train']} train and {counts['heldout']} held-out "
        "prompts, each with "
        f"{len(writers)} categories of response; prompt format {_text(prompt_format)}. Read it "
        "with `datasets.load_dataset` or give the directory to `sft-probe train --probe_set`. "
        f"Licence of the source: {_text(provenance['license'])}; texts of a model are under its "
        "maker's terms.",
        "## Categories and lengths in words",
        _lengths(table, writers),
        f"![lengths of the categories]({FIGURE})" if has_figure else "",
        "## Where it comes from",
        *_sections(provenance),
        "`probe_set.json` holds all of this with hashes. Words are split at white space, and are "
        "characters where a "
        "script has none. The ratio is to the chosen response of the same doc; "
        "`meta.length_ratio` has it for each text.",
    ]
    write_text(out / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def length_table(docs: Sequence[dict[str, Any]], categories: Sequence[str]) -> pd.DataFrame:
    """Words per category: mean, median, 5 % and 95 % quantiles, and the mean ratio to chosen."""
    words = pd.DataFrame({name: [count_words(doc[name]) for doc in docs] for name in categories})
    ratios = words.div(words["chosen"], axis=0)
    columns = {f"p{round(100 * q):02d}": words.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return pd.DataFrame({"mean": words.mean(), **columns, "ratio": ratios.mean()}).rename_axis(
        "category"
    )


def _lengths(table: pd.DataFrame, writers: dict[str, str]) -> str:
    lines = [
        "| category | writer | mean | median | 5 % | 95 % | ratio, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.iterrows():
        numbers = (
            f"{row['mean']:.1f} | {row['p50']:.0f} | {row['p05']:.0f} | {row['p95']:.0f} | "
            f"{row['ratio']:.2f}"
        )
        lines.append(f"| {name} | {_text(writers[str(name)])} | {numbers} |")
    return "\n".join(lines)


def _sections(provenance: dict[str, Any]) -> list[str]:
    rows, revision = provenance["rows"], provenance["source_revision"]
    revision = f" at revision {revision}" if revision else ""
    reasons = "".join(f"\n- {count}: {_text(reason)}" for reason, count in rows["reasons"].items())
    overlap = ", ".join(
        f"{name.replace('_', ' ')} {number}"
        for name, number in provenance["overlap_of_splits"].items()
    )
    templates = ", ".join(
        f"{_text(item['name'])} ({item['sha256'][:12]})"
        for item in provenance["templates"].values()
    )
    first, second = (
        ", ".join(
            f"{kind} {fault} {count}"
            for kind, faults in provenance["failed_checks"][time].items()
            for fault, count in faults.items()
        )
        or "none"
        for time in ("first", "second")
    )
    note = provenance["note"]
    return [
        *([note] if note else []),
        f"Source: {_text(provenance['source'])}{revision}, seed {provenance['seed']}. Of "
        f"{rows['read']} rows "
        f"{rows['used']} are used, {rows['not_drawn']} were not drawn, {rows['left_out']} left out"
        f"{':' if reasons else '.'}{reasons}",
        f"Overlap of the splits: {overlap}.",
        f"Prompt templates{' (not followed)' if note else ''}: {templates or 'none'}.",
        f"Texts that failed a check and were written again: {first}. Failed twice, doc left out: "
        f"{second}.",
        f"Cost of the texts: {provenance['cost_usd']:.4f} USD at list prices.",
    ]


def _text(value: object) -> str:
    """Plain text inside Markdown: no HTML, no table cells, no links, no code."""
    return (
        html.escape(str(value))
        .replace("|", "&#124;")
        .replace("[", "&#91;")
        .replace("`", "&#96;")
        .replace("\n", " ")
    )


def _write_figure(path: Path, table: pd.DataFrame) -> bool:
    try:
        import altair as alt
        import vl_convert  # noqa: F401 - what altair makes PNG files with
    except ImportError:
        log.warning("the card has no figure: pip install 'sft-probe[report]'")
        path.unlink(missing_ok=True)
        return False
    base = alt.Chart(table.reset_index()).encode(
        y=alt.Y("category:N", sort=list(table.index), title=None)
    )
    axis = alt.X("p05:Q", title="words: 5, 25, 50, 75 and 95 % quantiles")
    chart = alt.layer(
        base.mark_rule().encode(x=axis, x2="p95:Q"),
        base.mark_bar(height=14, color="#56B4E9").encode(x="p25:Q", x2="p75:Q"),
        base.mark_tick(color="black", thickness=2, height=14).encode(x="p50:Q"),
    ).properties(width=480)
    with new_file(path) as temporary:
        chart.save(str(temporary), format="png", ppi=144)
    return True
