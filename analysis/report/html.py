"""`sft-probe report`: one HTML file that needs nothing else, or Markdown with figures beside it."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
import vl_convert

from sft_probe.analysis.figures.docs import token_levels
from sft_probe.analysis.figures.figure import Style, colors_of, ticks
from sft_probe.analysis.figures.ledger import written_figures
from sft_probe.analysis.figures.names import FIGURES
from sft_probe.analysis.figures.plot import figures_of, share_steps
from sft_probe.analysis.report.ledger_text import written_examples
from sft_probe.analysis.stats.analyze import (
    Analysis,
    analyze,
    benchmark_tables,
    notes_of,
    over_runs_text,
    sentences_of,
)
from sft_probe.analysis.stats.comparison import cautions
from sft_probe.analysis.stats.generations import generations_text
from sft_probe.analysis.stats.intervals import Floats
from sft_probe.analysis.stats.measures import PARTS
from sft_probe.analysis.stats.places import named_path
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tokens import token_texts
from sft_probe.analysis.stats.verdict import share_text
from sft_probe.errors import UserError, doing
from sft_probe.files import make_dir, write_text
from sft_probe.text_table import number

MAX_BYTES = 8_000_000
_DOC_BYTES = 5_000_000
_COMPACT = (",", ":")
_COLUMNS = {
    "category": True,
    "docs": True,
    "start": False,
    "change": True,
    "95 % interval": True,
    "sign": True,
    "p (Holm)": True,
    "body": False,
    "peak": False,
    "at step": False,
    "half at": True,
    "first / body / EOS": False,
    "rank": False,
    "SE": False,
}
"""Columns of the table, and whether a narrow window shows them too."""
_MANIFEST = (
    "run",
    "model",
    "train_category",
    "order_seed",
    "probe_set",
    "probe_set_sha256",
    "prompt_format",
    "terminator_id",
    "max_length",
    "dtype",
    "num_examples",
    "num_cut_prompts",
    "snapshot_steps",
    "versions",
    "git_revision",
)
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "weight_decay",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "deepspeed",
)


def report(
    paths: Sequence[Path],
    *,
    format_name: str = "html",
    include_eos: bool = False,
    categories: Sequence[str] | None = None,
    chain: bool = False,
    out: Path | None = None,
) -> list[Path]:
    """Write `report.html` or `report.md` with its figures, into the run for one run, else here;
    return the paths.

    Raises:
        UserError: there is nothing to report, or the file would be over 8 MB.
    """
    analysis = analyze(paths, include_eos=include_eos, categories=categories, chain=chain)
    path = named_path(paths[0])[1]
    folder = path if len(paths) == 1 and path.is_dir() else Path()
    target = out or folder / f"report.{format_name}"
    make_dir(target.parent)
    if format_name == "md":
        return _write_markdown(analysis, target)
    with doing("drawing the figures of the report"):
        text = html_report(analysis)
    if (size := len(text.encode())) > MAX_BYTES:
        raise UserError(f"the report would take {size / 1e6:.1f} MB, over 8: give fewer runs.")
    write_text(target, text)
    return [target]


def html_report(analysis: Analysis) -> str:
    """Return the report as HTML. All text from data or models is escaped, and the page may load
    nothing."""
    sections = _figure_sections(analysis)
    specs = {figure["id"]: figure["spec"] for section in sections for figure in section["figures"]}
    with_docs = [recording for recording in analysis.recordings if len(recording.rows)]
    docs = [
        browser(recording, analysis.measure, _DOC_BYTES // len(with_docs))
        for recording in with_docs
    ]
    names = list(dict.fromkeys(str(name) for name in analysis.verdict["category"]))
    folder = resources.files("sft_probe.analysis.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        title="What the model learned: "
        + ", ".join(recording.name for recording in analysis.recordings),
        runs=[_run(analysis, recording) for recording in analysis.recordings],
        columns=_COLUMNS,
        cautions=cautions(analysis.recordings),
        over_runs=over_runs_text(analysis.over_runs),
        sums=", ".join(
            dict.fromkeys(recording.sums(analysis.measure) for recording in analysis.recordings)
        ),
        sections=sections,
        categories=colors_of(names),
        has_docs=bool(docs),
        vega=_in_script(
            f"(() => {{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}}})();"
        ),
        data=json_in_html({"figures": specs, "docs": docs}),
        script=_in_script(folder.joinpath("report.js").read_text("utf-8")),
    )


def _figure_sections(analysis: Analysis) -> list[dict[str, Any]]:
    """Return `title figures` for each run, then for all of them; a figure is `id title spec`."""
    style = Style(width=780, font_size=12)
    several = len(analysis.recordings) > 1
    own = set(FIGURES) - (
        {"trajectory", "code_length", "forgetting"} if several else {"trajectory"}
    )
    parts = [
        (recording.name, f"{number}", _of_run(analysis, recording), style, own)
        for number, recording in enumerate(analysis.recordings)
    ]
    if several:
        by_run = replace(style, color="run")
        shared = {"changes", "comparison", "code_length", "forgetting"}
        parts.append(("all runs", "all", analysis, style, shared))
        if share_steps(analysis.recordings):
            parts.append(("all runs", "all", analysis, by_run, {"changes"}))
    sections: dict[str, list[dict[str, Any]]] = {}
    for title, prefix, tables, look, wanted in parts:
        for figure in figures_of(tables, look, wanted):
            spec = _isolating(figure.spec(look))
            shown = {"id": f"figure-{prefix}-{figure.name}", "title": figure.title, "spec": spec}
            sections.setdefault(title, []).append(shown)
    for place, recording in enumerate(analysis.recordings):
        for figure in written_figures(recording.path / "analysis"):
            spec = _isolating(figure.spec(style))
            shown = {"id": f"figure-{place}-{figure.name}", "title": figure.title, "spec": spec}
            sections.setdefault(recording.name, []).append(shown)
    return [{"title": title, "figures": figures} for title, figures in sections.items()]


def _isolating(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a figure with a parameter `only`: a category that is shown alone."""
    datasets = spec.get("datasets", {})

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                visit(item)
        elif isinstance(node, dict):
            rows = datasets.get(node.get("data", {}).get("name"), [])
            if rows and "category" in rows[0]:
                one = {"filter": "!only || datum.category === only"}
                node["transform"] = [one, *node.get("transform", [])]
            for name in ("layer", "vconcat", "hconcat", "concat", "spec"):
                visit(node.get(name))

    visit(spec)
    return {**spec, "params": [*spec.get("params", []), {"name": "only", "value": ""}]}


def json_in_html(value: Any) -> str:
    """Return JSON that can stand in a script element: ASCII, and no character that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=_COMPACT)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _in_script(code: str) -> str:
    """Return code, ours or of libraries, whose strings hold no end tag of a script."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _of_run(analysis: Analysis, recording: Recording) -> Analysis:
    """Return the tables of one of the runs."""
    return Analysis(
        recordings=[recording],
        measure=analysis.measure,
        changes=analysis.changes[analysis.changes["run"] == recording.name],
        verdict=analysis.verdict[analysis.verdict["run"] == recording.name],
        contrasts=analysis.contrasts,
        distribution=analysis.distribution,
        items=analysis.items,
        over_runs=pd.DataFrame(),
    )


def _run(analysis: Analysis, recording: Recording) -> dict[str, Any]:
    own = analysis.verdict[analysis.verdict["run"] == recording.name]
    splits = [
        {
            "title": f"{SPLIT_NAMES[str(split)]}, {recording.step_unit} "
            f"{rows['first_step'].iloc[0]} to "
            f"{rows['last_step'].iloc[0]}",
            "rows": [_cells(row) for _, row in rows.iterrows()],
            "sentences": sentences_of(rows, analysis),
        }
        for split, rows in own.groupby("split", sort=False)
    ]
    texts = []  # what else is said of a run, as (title, text)
    if recording.generations is not None:
        texts.append(("Greedy answers", generations_text(recording.generations)))
    return {
        "name": recording.name,
        "model": recording.model,
        "train_category": recording.train_category or "?",
        "summary": summary(own, recording),
        "notes": notes_of(recording, own),
        "splits": splits,
        "benchmarks": benchmark_tables(analysis, recording),
        "texts": texts,
        "examples": written_examples(recording.path / "analysis"),
        "manifest": json.dumps(_manifest(recording), indent=2, ensure_ascii=False),
    }


def _manifest(recording: Recording) -> dict[str, Any]:
    merged = {**recording.probe, **recording.manifest}
    found = {name: merged[name] for name in _MANIFEST if name in merged}
    arguments = recording.manifest.get("arguments", {})
    return found | {name: arguments[name] for name in _ARGUMENTS if name in arguments}


def _change_text(row: "pd.Series[Any]") -> str:
    """Return the change with its interval in parentheses, as far as they are known."""
    if math.isnan(row["change"]):
        return ""
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:+z.1f}, {row['high']:+z.1f}]"
    return f" ({row['change']:+z.1f}{interval})"


def summary(verdict: pd.DataFrame, recording: Recording) -> str:
    """Return what rose, fell and did not move in one sentence, from held-out prompts if there are
    any."""
    if verdict.empty:
        return f"{recording.name}: benchmarks alone."
    split = str(verdict["split"].iloc[0])
    rows = verdict[verdict["split"] == split]
    parts = []
    for verb, chosen in (
        ("rose", rows[rows["moved"] & (rows["change"] > 0)]),
        ("fell", rows[rows["moved"] & (rows["change"] < 0)]),
        ("did not change clearly", rows[~rows["moved"] & rows["change"].notna()]),
        ("lacks a score at an end", rows[rows["change"].isna()]),
    ):
        if len(chosen):
            ordered = chosen.sort_values("change", ascending=False, key=abs)
            names = [f"{row['category']}{_change_text(row)}" for _, row in ordered.iterrows()]
            parts.append(f"{', '.join(names)} {verb}")
    docs = f"{rows['num_docs'].max()} {SPLIT_NAMES[split]}"
    if not rows["num_docs"].max():
        docs = f"published means, {SPLIT_NAMES[split]}"
    return (
        f"{recording.name}: by {recording.step_unit} {rows['last_step'].iloc[0]} "
        f"{'; '.join(parts)} (nats per response "
        f"{recording.sums(str(verdict['measure'].iloc[0]))}; {docs}, one run)."
    )


def _cells(row: "pd.Series[Any]") -> list[str]:
    shares = [share_text(row, part) for part in PARTS]
    interval = "-" if math.isnan(row["low"]) else f"{row['low']:+z.1f} to {row['high']:+z.1f}"
    return [
        str(row["category"]),
        str(row["num_docs"] or "?"),
        number(row["start"], ".1f"),
        number(row["change"], "+z.1f"),
        interval,
        row["sign"],
        number(row["p_holm"], ".2g"),
        number(row["body"], "+z.1f"),
        number(row["peak"], "+z.1f"),
        str(row["peak_step"]),
        number(row["half_step"], ".1f"),
        "-" if "-" in shares else " / ".join(shares) + " %",
        number(row["rank"], ".0f"),
        number(row["stderr"], ".2f"),
    ]


def _write_markdown(analysis: Analysis, target: Path) -> list[Path]:
    """Write the report as Markdown, its figures into NAME_figures beside it; return the paths."""
    figures = make_dir(target.parent / f"{target.stem}_figures")
    style = Style()
    names = ", ".join(recording.name for recording in analysis.recordings)
    lines = [f"# What the model learned: {_md(names)}", ""]
    lines += [f"- {_md(caution)}" for caution in cautions(analysis.recordings)]
    written = []
    for recording in analysis.recordings:
        run = _run(analysis, recording)
        lines += [_md(run["summary"]), "", f"## {_md(recording.name)}", ""]
        lines += [f"- {_md(note)}" for note in run["notes"]]
        for part in run["splits"]:
            lines += ["", f"### {_md(part['title'])}", "", _md_row(_COLUMNS)]
            lines += ["|---" * len(_COLUMNS) + "|", *map(_md_row, part["rows"])]
            lines += ["", *(f"- {_md(sentence)}" for sentence in part["sentences"])]
        for shown in run["benchmarks"]:
            lines += [
                "",
                f"### {_md(shown.title[0].upper() + shown.title[1:])}",
                "",
                _md_row(shown.columns),
            ]
            lines += ["|---" * len(shown.columns) + "|", *map(_md_row, shown.rows)]
        for title, columns, rows in run["examples"]:
            lines += ["", f"### {_md(title)}", "", _md_row(columns), "|---" * len(columns) + "|"]
            lines += [_md_row(row) for row in rows]
        for title, text in run["texts"]:
            lines += ["", f"### {_md(title)}", "", _md(text)]
        lines.append("")
    ledgers = [
        figure
        for recording in analysis.recordings[:1]
        for figure in written_figures(recording.path / "analysis")
    ]
    for figure in [*figures_of(analysis, style), *ledgers]:
        written += figure.save(figures, ["png"], style)
        lines += [f"![{_md(figure.title)}]({quote(figures.name)}/{figure.name}.png)", ""]
    write_text(target, "\n".join(lines) + "\n")
    return [*written, target]


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_md(cell) for cell in cells) + " |"


def _md(text: str) -> str:
    """Return text that Markdown and HTML read as text."""
    escaped = html.escape(" ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in escaped)


MAX_CHARACTERS = 4000
_OF_TOKENS = {
    "ranks": ("token_ranks", 1),
    "entropies": ("token_entropies", 100),
    "kl": ("token_kl_forward", 1000),
}
"""What the browser says of a token beside its change: column, and how many units make 1."""


def browser(recording: Recording, measure: str, max_bytes: int) -> dict[str, Any]:
    """Return one run's docs for the browser, as many as fit into `max_bytes` of JSON; `omitted`
    counts the others.

    `curves` are levels of `measure` in nats, at `steps`; `tokens` hold the change of each token in
    hundredths of a nat, at each of `ticks`, and what is in `_OF_TOKENS` at the first and the last
    of them. Texts are cut at 4,000 characters.
    """
    split = recording.splits[0]
    arrays = recording.cube(split)
    if np.isnan(arrays.arrays[measure]).all():
        measure = "logprob"
    by_doc = dict(list(recording.rows[recording.rows["split"] == split].groupby("doc_id")))
    docs: list[dict[str, Any]] = []
    for index, doc_id in enumerate(arrays.doc_ids):
        tokens = _tokens(recording, by_doc[doc_id], doc_id, ticks(arrays.steps))
        doc = _doc(recording, doc_id, arrays.categories, arrays.arrays[measure][index])
        doc["tokens"] = {name: tokens[name] for name in arrays.categories if name in tokens}
        max_bytes -= len(json.dumps(doc, separators=_COMPACT))
        if max_bytes < 0 and docs:
            break
        docs.append(doc)
    return {
        "name": recording.name,
        "steps": arrays.steps,
        "ticks": ticks(arrays.steps),
        "unit": recording.step_unit,
        "categories": arrays.categories,
        "colors": colors_of(arrays.categories),
        "docs": docs,
        "omitted": len(arrays.doc_ids) - len(docs),
    }


def _doc(
    recording: Recording, doc_id: str, categories: Sequence[str], values: Floats
) -> dict[str, Any]:
    texts = recording.texts.get(doc_id, {})
    return {
        "id": doc_id,
        "prompt": cut(recording.prompts.get(doc_id, "(the prompt is not here)")),
        "responses": {name: cut(text) for name, text in texts.items() if name in categories},
        "curves": {
            name: [None if math.isnan(value) else round(float(value), 3) for value in values[place]]
            for place, name in enumerate(categories)
        },
        "answers": _answers(recording, doc_id),
    }


def _tokens(
    recording: Recording, rows: pd.DataFrame, doc_id: str, steps: Sequence[int]
) -> dict[str, Any]:
    """Return the tokens of each category of a doc, with their changes from the first step."""
    found = {}
    for category, levels in token_levels(recording, rows).items():
        start = levels.get(steps[0], [])
        words = token_texts(recording, doc_id, category)
        if not words or len(words) != len(start) or sum(map(len, words)) > MAX_CHARACTERS:
            continue
        changes = [
            [round(100 * (after - before)) for before, after in zip(start, own, strict=True)]
            if len(own := levels.get(step, [])) == len(start)
            else []
            for step in steps
        ]
        found[category] = {"texts": words, "changes": changes}
    for name, (column, unit) in _OF_TOKENS.items():
        for category, levels in token_levels(recording, rows, column).items():
            ends = [levels.get(step) for step in (steps[0], steps[-1])]
            if category in found and all(ends):
                found[category][name] = [[round(unit * x) for x in end or ()] for end in ends]
    return found


def _answers(recording: Recording, doc_id: str) -> list[dict[str, Any]]:
    """Return the greedy answers to this prompt by step, where the sweep made some."""
    if recording.generations is None:
        return []
    own = recording.generations[recording.generations["doc_id"] == doc_id].sort_values("step")
    return [
        {
            "step": int(row["step"]),
            "text": cut(row["text"]),
            "tokens": int(row["num_tokens"]),
            "ended": bool(row["ended"]),
        }
        for _, row in own.iterrows()
    ]


def cut(text: str) -> str:
    """Return the text, or its start and how long it is."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} [cut: {len(text)} characters]"
