"""The figure of a run: change of all categories in one panel, and the level of each in a panel of its own."""

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from sft_probe.analysis.tables import write_tables
from sft_probe.errors import UserError
from sft_probe.files import make_dir, read_json
from sft_probe.models import EMBEDDED_MODEL
from sft_probe.records import CATEGORIES, EMBEDDED_PROBE_SETS

# Okabe & Ito's colours (jfly.uni-koeln.de/color), told apart by colour-blind readers; each category keeps its own.
COLORS = dict(zip(CATEGORIES, ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#CC79A7"), strict=True))
_OTHER_COLORS = ("#000000", "#999999", "#7A5195", "#8C564B", "#BCBD22", "#2F4B7C")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
SUFFIXES = ("png", "svg", "pdf")


def plot(directory: Path) -> list[Path]:
    """Writes `figures/trajectory_<split>.{png,svg,pdf}` of a run that was swept, or else probed in training.

    Returns the paths.

    Raises:
        UserError: there is nothing to draw.
    """
    path = directory / "trajectory.csv"
    if (directory / "probe").is_dir():
        write_tables(directory)  # training writes no tables
    if not path.is_file():
        raise UserError(f"{path} is missing: run `sft-probe sweep {directory}` first.")
    table = pd.read_csv(path)
    is_swept = (table["source"] == "lm_eval").any()  # live and swept numbers never share a curve
    table = table[table["source"] == ("lm_eval" if is_swept else "live")]
    manifest = read_json(directory / ("sweep" if is_swept else "probe") / "manifest.json")
    folder = make_dir(directory / "figures")
    written = []
    for split in table["split"].unique():
        chart = figure(table[table["split"] == split], manifest)
        for suffix in SUFFIXES:
            target = folder / f"trajectory_{split}.{suffix}"
            temporary = folder / f".trajectory_{split}.tmp.{suffix}"
            chart.save(str(temporary), ppi=150)
            temporary.replace(target)
            written.append(target)
    return written


def figure(table: pd.DataFrame, manifest: dict[str, Any]) -> alt.VConcatChart:
    """One split of a trajectory table as a chart; `manifest` is that of the sweep."""
    present = [name for name in manifest["categories"] if name in set(table["category"])]
    colors = color_scale(present)
    panels = alt.vconcat(_change(table, colors), _levels(table, present, colors), spacing=24)
    chart = panels.resolve_scale(color="independent").properties(title=_title(table, manifest))
    configured: alt.VConcatChart = chart.configure(font="DejaVu Sans, Arial, sans-serif").configure_view(stroke="#ccc")
    return configured


def color_scale(categories: list[str]) -> alt.Scale:
    """Colours by category: the six standard ones fixed, others in their order."""
    others = iter(_OTHER_COLORS * (1 + len(categories) // len(_OTHER_COLORS)))
    return alt.Scale(domain=categories, range=[COLORS.get(name) or next(others) for name in categories])


def _title(table: pd.DataFrame, manifest: dict[str, Any]) -> alt.TitleParams:
    split = {"heldout": "held-out prompts", "train": "prompts trained on"}[str(table["split"].iloc[0])]
    trained = manifest["train_category"] or "?"
    lines = [
        f"Model {manifest['model'] or '?'}; probe set {manifest['probe_set']}, {int(table['n'].max())} {split}; "
        f"prompt format {manifest['prompt_format']}; {manifest['dtype']}",
        "Bands: 95 % bootstrap intervals over prompts of one run; they say nothing of training noise",
    ]
    if manifest["model"] == EMBEDDED_MODEL:
        lines.append("Instruction-tuned model, dequantised from 4 bits: early steps may repair that")
    if manifest["probe_set"] in EMBEDDED_PROBE_SETS:
        lines.append("Texts written for the demo: it demonstrates the tool, it is no evidence")
    return alt.TitleParams(f"log p(response | prompt) while fine-tuning on `{trained}`", subtitle=lines, anchor="start")


def _x(table: pd.DataFrame, *, title: bool = True) -> alt.X:
    steps = sorted(table["step"].unique())
    ticks = steps if len(steps) <= 8 else alt.Undefined
    text = "optimizer step (log scale above 1)" if title else None
    return alt.X(
        "step:Q", title=text, scale=alt.Scale(type="symlog", constant=1), axis=alt.Axis(values=ticks, format="d")
    )


def _change(table: pd.DataFrame, colors: alt.Scale) -> Any:
    color = alt.Color("category:N", scale=colors, title="category", sort=None, legend=alt.Legend(symbolOpacity=1))
    shapes = alt.Scale(domain=colors.domain, range=[_SHAPES[i % len(_SHAPES)] for i in range(len(colors.domain))])
    shape = alt.Shape("category:N", scale=shapes, sort=None, legend=None)
    base = alt.Chart(table)
    band = base.mark_area(opacity=0.13).encode(
        x=_x(table), y=alt.Y("delta_ci_low:Q"), y2="delta_ci_high:Q", color=color
    )
    y = alt.Y("delta:Q", title="change of log p from step 0 (nats per response)")
    line = base.mark_line(strokeWidth=1.8).encode(x=_x(table), y=y, color=color)
    point = base.mark_point(filled=True, size=45).encode(x=_x(table), y=y, color=color, shape=shape)
    zero = alt.Chart(pd.DataFrame({"y": [0.0]})).mark_rule(color="#666", strokeDash=[4, 3]).encode(y="y:Q")
    return alt.layer(zero, band, line, point).properties(width=560, height=300)


def _levels(table: pd.DataFrame, categories: list[str], colors: alt.Scale) -> Any:
    color = alt.Color("category:N", scale=colors, legend=None)
    y = alt.Y("logprob:Q", title="log p (nats per response)", scale=alt.Scale(zero=False))
    base = alt.Chart()
    band = base.mark_area(opacity=0.15).encode(
        x=_x(table), y=alt.Y("ci_low:Q", scale=alt.Scale(zero=False)), y2="ci_high:Q", color=color
    )
    line = base.mark_line(point=True).encode(x=_x(table), y=y, color=color)
    facet = alt.Facet("category:N", sort=categories, title=None, header=alt.Header(labelFontWeight="bold"))
    layered = alt.layer(band, line, data=table).properties(width=170, height=120)
    return layered.facet(facet, columns=3).resolve_scale(y="independent")
