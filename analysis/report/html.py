"""`sft-probe report`: one HTML file that needs nothing else, or Markdown with figures beside it."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import vl_convert

from sft_probe.analysis.figures.docs import token_levels
from sft_probe.analysis.figures.figure import Style, colors_of, ticks
from sft_probe.analysis.figures.plot import FIGURES, figures_of
from sft_probe.analysis.stats.analyze import (
    Analysis,
    analyze,
    notes_of,
    over_runs_text,
    sentences_of,
)
from sft_probe.analysis.stats.generations import generations_text
from sft_probe.analysis.stats.measures import PARTS, Cube
from sft_probe.analysis.stats.runs import SPLIT_NAMES, Recording
from sft_probe.analysis.stats.tokens import token_texts
from sft_probe.analysis.stats.verdict import share_text
from sft_probe.errors import UserError
from sft_probe.files import make_dir, write_text

MAX_BYTES = 8_000_000
_DOC_BYTES = 3_500_000
_HEADER = (
    "category",
    "docs",
    "start",
    "change",
    "95 % interval",
    "sign",
    "p (Holm)",
    "body",
    "peak",
    "at step",
    "half at",
    "first / body / EOS",
    "rank",
    "SE",
)
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
    out: Path | None = None,
) -> list[Path]:
    """Writes `report.html` or `report.md` with its figures; into the run for one run, else here.
    Returns the paths.

    Raises:
        UserError: there is nothing to report, or the file would be over 8 MB.
    """
    analysis = analyze(paths, include_eos=include_eos, categories=categories)
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
    target = out or folder / f"report.{format_name}"
    make_dir(target.parent)
    if format_name == "md":
        return _write_markdown(analysis, target)
    text = html_report(analysis)
    if (size := len(text.encode())) > MAX_BYTES:
        raise UserError(f"the report would take {size / 1e6:.1f} MB, over 8: give fewer runs.")
    write_text(target, text)
    return [target]


def html_report(analysis: Analysis) -> str:
    """The report as HTML; all text from data or models is escaped, and the page may load
    nothing."""
    style = Style(width=900, font_size=12)
    specs: dict[str, dict[str, Any]] = {}
    figures: dict[str, list[str]] = {}
    several = len(analysis.recordings) > 1
    own = set(FIGURES) - ({"trajectory", "code_length"} if several else {"trajectory"})
    parts = [
        (recording.name, f"{number}", _of_run(analysis, recording), style, own)
        for number, recording in enumerate(analysis.recordings)
    ]
    if several:
        shared = {"changes", "code_length"}
        by_run = replace(style, color="run")
        parts.append(("all runs", "all-category", analysis, style, shared))
        parts.append(("all runs", "all-run", analysis, by_run, {"changes"}))
    for heading, prefix, tables, look, wanted in parts:
        for figure in figures_of(tables, look, wanted):
            name = f"figure-{prefix}-{figure.name}"
            specs[name] = figure.spec(look)
            figures.setdefault(heading, []).append(name)
    with_docs = [recording for recording in analysis.recordings if recording.means is None]
    docs = [
        browser(recording, analysis.measure, _DOC_BYTES // len(with_docs))
        for recording in with_docs
    ]
    folder = resources.files("sft_probe.analysis.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        title="What the model learned: "
        + ", ".join(recording.name for recording in analysis.recordings),
        runs=[_run(analysis, recording) for recording in analysis.recordings],
        header=_HEADER,
        over_runs=over_runs_text(analysis.over_runs),
        sums=", ".join(
            dict.fromkeys(recording.sums(analysis.measure) for recording in analysis.recordings)
        ),
        figures=figures,
        has_docs=bool(docs),
        vega=_in_script(
            f"(() => {{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}}})();"
        ),
        data=json_in_html({"figures": specs, "docs": docs}),
        script=_in_script(folder.joinpath("report.js").read_text("utf-8")),
    )


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: ASCII, and no character that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _in_script(code: str) -> str:
    """Our own code, or the libraries', which may hold the end tag in a string."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _of_run(analysis: Analysis, recording: Recording) -> Analysis:
    """The same tables, of one run."""
    return Analysis(
        recordings=[recording],
        measure=analysis.measure,
        changes=analysis.changes[analysis.changes["run"] == recording.name],
        verdict=analysis.verdict[analysis.verdict["run"] == recording.name],
        contrasts=analysis.contrasts,
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
            "sentences": sentences_of(rows, analysis.contrasts),
        }
        for split, rows in own.groupby("split", sort=False)
    ]
    return {
        "name": recording.name,
        "model": recording.model,
        "train_category": recording.train_category or "?",
        "summary": summary(own, recording),
        "notes": notes_of(recording, own),
        "splits": splits,
        "answers": "" if recording.generations is None else generations_text(recording.generations),
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
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:+.1f}, {row['high']:+.1f}]"
    return f" ({row['change']:+.1f}{interval})"


def summary(verdict: pd.DataFrame, recording: Recording) -> str:
    """What rose, what fell and what did not, in one sentence, from the verdict on held-out prompts
    if there are any."""
    split = str(verdict["split"].iloc[0])
    rows = verdict[verdict["split"] == split]
    parts = []
    for verb, chosen in (
        ("rose", rows[rows["moved"] & (rows["change"] > 0)]),
        ("fell", rows[rows["moved"] & (rows["change"] < 0)]),
        ("did not move for certain", rows[~rows["moved"] & rows["change"].notna()]),
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
    def number(name: str, form: str) -> str:
        return "-" if math.isnan(row[name]) else format(row[name], form)

    shares = [share_text(row, part) for part in PARTS]
    interval = "-" if math.isnan(row["low"]) else f"{row['low']:+.1f} to {row['high']:+.1f}"
    return [
        str(row["category"]),
        str(row["num_docs"] or "?"),
        number("start", ".1f"),
        number("change", "+.1f"),
        interval,
        row["sign"],
        number("p_holm", ".2g"),
        number("body", "+.1f"),
        number("peak", "+.1f"),
        str(row["peak_step"]),
        number("half_step", ".1f"),
        "-" if "-" in shares else " / ".join(shares) + " %",
        number("rank", ".0f"),
        number("stderr", ".2f"),
    ]


def _write_markdown(analysis: Analysis, target: Path) -> list[Path]:
    figures = make_dir(target.parent / "report_figures")
    style = Style()
    lines = [
        f"# What the model learned: {_md(', '.join(item.name for item in analysis.recordings))}",
        "",
    ]
    written = []
    for recording in analysis.recordings:
        run = _run(analysis, recording)
        lines += [_md(run["summary"]), "", f"## {_md(recording.name)}", ""]
        lines += [f"- {_md(note)}" for note in run["notes"]]
        for part in run["splits"]:
            lines += [
                "",
                f"### {_md(part['title'])}",
                "",
                "| " + " | ".join(_HEADER) + " |",
                "|---" * len(_HEADER) + "|",
            ]
            lines += ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in part["rows"]]
            lines += ["", *(f"- {_md(sentence)}" for sentence in part["sentences"])]
        lines += ["", _md(run["answers"]), ""]
    for figure in figures_of(analysis, style):
        written += figure.save(figures, ["png"], style)
        lines += [f"![{_md(figure.title)}](report_figures/{figure.name}.png)", ""]
    write_text(target, "\n".join(lines) + "\n")
    return [*written, target]


def _md(text: str) -> str:
    """Text that Markdown and HTML read as text."""
    escaped = html.escape(" ".join(str(text).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in escaped)


MAX_CHARACTERS = 4000


def browser(recording: Recording, measure: str, max_bytes: int) -> dict[str, Any]:
    """One run's docs for the browser, as many as fit into `max_bytes` of JSON; `omitted` counts the
    others.

    `curves` are levels of `measure` in nats; texts are cut at 4,000 characters.
    """
    split = recording.splits[0]
    arrays = recording.cube(split)
    categories = arrays.categories
    docs: list[dict[str, Any]] = []
    for number in range(len(arrays.doc_ids)):
        doc = _doc(recording, split, arrays, number, measure)
        max_bytes -= len(json.dumps(doc))
        if max_bytes < 0 and docs:
            break
        docs.append(doc)
    return {
        "name": recording.name,
        "steps": arrays.steps,
        "ticks": ticks(arrays.steps),
        "categories": categories,
        "colors": colors_of(categories),
        "docs": docs,
        "omitted": len(arrays.doc_ids) - len(docs),
    }


def _doc(
    recording: Recording, split: str, arrays: Cube, number: int, measure: str
) -> dict[str, Any]:
    doc_id = arrays.doc_ids[number]
    texts = recording.texts.get(doc_id, {})
    values = arrays.arrays[measure if not np.isnan(arrays.arrays[measure]).all() else "logprob"][
        number
    ]
    rows = recording.rows[recording.rows["doc_id"] == doc_id]
    levels = token_levels(recording, rows[rows["split"] == split])
    tokens = {}
    for category, own in levels.items():
        ends = [own.get(arrays.steps[point], []) for point in (0, -1)]
        words = token_texts(recording, doc_id, category)
        if words and len(words) == len(ends[0]) == len(ends[1]):
            moved = [round(last - first, 3) for first, last in zip(*ends, strict=True)]
            tokens[category] = {"texts": words, "changes": moved}
    return {
        "id": doc_id,
        "prompt": cut(recording.prompts.get(doc_id, "(the prompt is not here)")),
        "responses": {name: cut(text) for name, text in texts.items() if name in arrays.categories},
        "curves": {
            name: [None if math.isnan(value) else round(float(value), 3) for value in values[place]]
            for place, name in enumerate(arrays.categories)
        },
        "tokens": tokens,
        "answers": _answers(recording, doc_id),
    }


def _answers(recording: Recording, doc_id: str) -> list[dict[str, Any]]:
    """Greedy answers to this prompt by step, where the sweep made some."""
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
    """The text, or its start and how much is missing."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} [cut: {len(text)} characters]"
