"""How figures look, and how one is fitted to a page, rendered and saved with its numbers."""

import re
import textwrap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
import yaml

from sft_probe.errors import UserError
from sft_probe.files import write_bytes, write_text
from sft_probe.probe_set import CATEGORIES

# Okabe & Ito's colours (jfly.uni-koeln.de/color), told apart by colour-blind readers; each category
# keeps its own.
_OKABE_ITO = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#CC79A7")
COLORS = dict(zip(CATEGORIES, _OKABE_ITO, strict=True))
_OTHER_COLORS = (
    "#000000",
    "#999999",
    "#7A5195",
    "#8C564B",
    "#BCBD22",
    "#2F4B7C",
    "#E15759",
    "#76B7B2",
    "#B07AA1",
    "#5B8C00",
    "#FF9DA7",
    "#79706E",
)
PART_COLORS = {"first token": "#222222", "body": "#8FB4DC", "terminator": "#F0A35E"}
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
POINTS_PER_INCH = 72
DEFAULT_WIDTH = 620
MAX_TICKS = 8


@dataclass(frozen=True, kw_only=True)
class Style:
    """How figures look. Lengths are points, 1/72 inch."""

    color: str = "category"
    """`category`, or what tells runs apart: `run`, `order_seed`, `train_category`, `model`."""
    width: float = DEFAULT_WIDTH
    """Of the whole figure."""
    font_size: float = 10
    labels: dict[str, str] = field(default_factory=dict)
    """Category to what is printed for it."""

    def label(self, category: str) -> str:
        """What is printed for a category."""
        return self.labels.get(category, category)


def read_labels(path: Path) -> dict[str, str]:
    """A YAML file that maps categories to labels. Raises `UserError` where it is none."""
    try:
        labels = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(labels, dict):
        raise UserError(f"{path} must map categories to labels, as in `chosen: trained on`.")
    return {str(name): str(label) for name, label in labels.items()}


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Colours by name: the six standard categories fixed; others by their name, as far as no two
    fall together."""
    found = {name: COLORS[name] for name in names if name in COLORS}
    for name in sorted(set(names) - COLORS.keys()):
        start = zlib.crc32(name.encode()) % len(_OTHER_COLORS)
        turned = _OTHER_COLORS[start:] + _OTHER_COLORS[:start]
        found[name] = next((color for color in turned if color not in found.values()), turned[0])
    return {name: found[name] for name in names}


def key_colors(names: Sequence[str]) -> list[str]:
    """Colours for runs, seeds and models, which have none of their own."""
    return [(_OKABE_ITO + _OTHER_COLORS)[number % 18] for number in range(len(names))]


def category_color(categories: Sequence[str], style: Style, *, legend: bool = True) -> alt.Color:
    """The colour channel of `label`."""
    colors = colors_of(categories)
    scale = alt.Scale(
        domain=[style.label(name) for name in categories], range=list(colors.values())
    )
    shown = category_legend(categories, style) if legend else None
    return alt.Color("label:N", scale=scale, sort=None, legend=shown)


def legend_columns(names: Sequence[str], style: Style) -> int:
    """How many names fit beside each other below a figure, at about 0.6 em a letter."""
    longest = max((len(name) for name in names), default=1)
    return max(1, min(6, int(style.width // ((0.6 * longest + 3.2) * style.font_size))))


def category_shape(categories: Sequence[str], style: Style) -> alt.Shape:
    """The shape channel of `label`, so that print in grey is readable."""
    shapes = [_SHAPES[number % len(_SHAPES)] for number in range(len(categories))]
    scale = alt.Scale(domain=[style.label(name) for name in categories], range=shapes)
    return alt.Shape("label:N", scale=scale, sort=None, legend=category_legend(categories, style))


def category_legend(categories: Sequence[str], style: Style) -> alt.Legend:
    """One legend for colour and shape."""
    columns = legend_columns([style.label(name) for name in categories], style)
    return alt.Legend(symbolOpacity=1, title=None, columns=columns)


def step_axis(steps: Sequence[int], title: str | None) -> alt.X:
    """A log axis that shows step 0: linear up to the smallest step, logarithmic above."""
    scale = alt.Scale(
        type="symlog",
        constant=max(min((step for step in steps if step > 0), default=1), 1),
        nice=False,
    )
    axis = alt.Axis(values=ticks(steps), format="~s" if max(steps) >= 10_000 else "d", grid=False)
    return alt.X("step:Q", title=title, scale=scale, axis=axis)


def ticks(steps: Sequence[int]) -> list[int]:
    """At most 8 of the steps, about evenly spaced on the log axis, the last one always."""
    ordered = sorted({int(step) for step in steps})
    if len(ordered) <= MAX_TICKS:
        return ordered
    positive = [step for step in ordered if step > 0]
    low, high = positive[0], positive[-1]
    wanted = [low * (high / low) ** (number / (MAX_TICKS - 2)) for number in range(MAX_TICKS - 1)]
    near = {min(positive, key=lambda step: abs(step / target - 1)) for target in wanted}
    return sorted(near | {step for step in ordered[:1] if step <= 0})


def facet(
    layers: Any,
    names: Sequence[str],
    style: Style,
    columns: int,
    *,
    column: str = "label",
    own_scale: bool = True,
) -> Any:
    """Small multiples by a column, in the order of `names`."""
    header = alt.Header(labelFontWeight="bold", labelFontSize=style.font_size, labelPadding=4)
    channel = alt.Facet(f"{column}:N", sort=list(names), title=None, header=header)
    chart = layers.facet(channel, columns=columns, spacing=style.font_size * 1.4)
    return chart.resolve_scale(y="independent") if own_scale else chart


def columns_for(count: int, style: Style) -> int:
    """Panels side by side: three in a wide figure, two in one of a column's width."""
    return max(1, min(count, 3 if style.width >= 400 else 2))


def cell_height(cell: float, style: Style) -> float:
    """Of one panel; room for its axis title."""
    return max(min(0.75 * cell, 300.0), 8.5 * style.font_size)


def cell_width(width: float, columns: int, style: Style) -> float:
    """Of the plot area of one panel; axes take about five letters."""
    return max(40.0, width / columns - 5.5 * style.font_size)


def finish(chart: Any, title: str, subtitle: Sequence[str], style: Style) -> Any:
    """Title, fonts and frame; the legend stands below, so that any width can be met."""
    size = style.font_size
    lines = [line for text in subtitle for line in wrap(text, style.width, size * 0.9)]
    text = alt.TitleParams(
        wrap(title, style.width, size * 1.3),
        subtitle=lines,
        anchor="start",
        fontSize=size * 1.15,
        subtitleFontSize=size * 0.9,
        subtitleColor="#555",
        offset=size,
    )
    return (
        chart.properties(title=text)
        .configure(font="DejaVu Sans, Arial, sans-serif", padding=4)
        .configure_view(stroke="#ccc")
        .configure_axis(
            labelFontSize=size * 0.9,
            titleFontSize=size * 0.95,
            labelOverlap=True,
            titleFontWeight="normal",
        )
        .configure_legend(
            orient="bottom",
            labelFontSize=size,
            titleFontSize=size,
            symbolSize=size * 8,
            labelLimit=0,
        )
    )


def wrap(text: str, width: float, size: float) -> list[str]:
    """Lines that fit a width in points, at about 0.56 em a letter."""
    return textwrap.wrap(text, max(20, int(width / (0.56 * size)))) or [""]


def zero_line() -> Any:
    """A rule at no change."""
    return (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(color="#666", strokeDash=[4, 3])
        .encode(y="zero:Q")
    )


_PNG_PPI = 200
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_SVG_SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)"')


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is drawn, and the table it is drawn from."""

    name: str
    """Of the files, without suffix."""
    title: str
    subtitle: Sequence[str]
    table: pd.DataFrame
    build: Callable[[float], Any]
    """The chart whose content is about that wide, in points."""

    def spec(self, style: Style, *, fit: bool = True) -> dict[str, Any]:
        """A Vega-Lite specification whose whole width is `style.width`: axes and legends are
        measured, then fitted.

        Without `fit` the width is roughly that, which is enough for a screen and saves two of three
        renderings.
        """
        spec = self._spec(style.width, style)
        if not fit:
            return spec
        excess = _size(vl_convert.vegalite_to_svg(spec))[0] - style.width
        return spec if abs(excess) < 1 else self._spec(style.width - excess, style)

    def _spec(self, width: float, style: Style) -> dict[str, Any]:
        with alt.data_transformers.disable_max_rows():
            chart = finish(self.build(max(width, 40.0)), self.title, self.subtitle, style)
            spec: dict[str, Any] = chart.to_dict(
                validate=False
            )  # the schema is checked by what renders it
        shown: dict[str, Any] = printable(spec)
        return shown

    def save(self, folder: Path, formats: Sequence[str], style: Style) -> list[Path]:
        """Writes NAME.csv and a file of each format; returns the paths."""
        spec = self.spec(style)
        csv = folder / f"{self.name}.csv"
        write_text(csv, self.table.to_csv(index=False))
        written = [csv]
        for suffix in formats:
            path = folder / f"{self.name}.{suffix}"
            write_bytes(path, render(spec, suffix))
            written.append(path)
        return written


def printable(value: Any) -> Any:
    """The same with U+FFFD for characters that XML 1.0 forbids: one in a text aborts the process
    that draws an SVG."""
    if isinstance(value, str):
        return _NOT_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def render(spec: dict[str, Any], suffix: str) -> bytes:
    """The bytes of a file. A point is 1/72 inch in all of them."""
    if suffix == "png":
        return bytes(
            vl_convert.vegalite_to_png(spec, scale=_PNG_PPI / POINTS_PER_INCH, ppi=POINTS_PER_INCH)
        )
    if suffix == "pdf":
        return bytes(vl_convert.vegalite_to_pdf(spec))
    if suffix == "html":
        return str(vl_convert.vegalite_to_html(spec, bundle=True)).encode()
    svg = str(vl_convert.vegalite_to_svg(spec))
    return _SVG_SIZE.sub(r'width="\1pt" height="\2pt"', svg, count=1).encode()


def _size(svg: str) -> tuple[float, float]:
    match = _SVG_SIZE.search(svg)
    return (float(match[1]), float(match[2])) if match else (0.0, 0.0)
