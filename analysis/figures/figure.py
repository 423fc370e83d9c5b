"""How figures look, and how one is fitted to a page, rendered and saved with its numbers."""

import functools
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
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

# Okabe & Ito's colours (jfly.uni-koeln.de/color), told apart by colour-blind readers. The standard
# categories keep the first six in every figure.
_OKABE_ITO = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#CC79A7")
COLORS = dict(zip(CATEGORIES, _OKABE_ITO, strict=True))
_OTHER_COLORS = (
    *("#000000", "#999999", "#7A5195", "#8C564B", "#BCBD22", "#2F4B7C"),
    *("#E15759", "#76B7B2", "#B07AA1", "#5B8C00", "#FF9DA7", "#79706E"),
)
PART_COLORS = {"first token": "#222222", "body": "#8FB4DC", "terminator": "#F0A35E"}
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2], [4, 4], [10, 3])
FONTS = "DejaVu Sans, Liberation Sans, sans-serif"  # the renderer brings the second one
_SUPERSCRIPTS = str.maketrans("0123456789+-=()in", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁱⁿ")
_SUBSCRIPTS = str.maketrans("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ")
_RAISED = re.compile(r"\^(?:\{([^{}]*)\}|([0-9+*-]))|_\{([^{}]*)\}")
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_SVG_SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)" (viewBox="[^"]*")')
POINTS_PER_INCH = 72
_PNG_PPI = 200
DEFAULT_WIDTH = 620
MAX_TICKS = 8
MAX_MARKED_STEPS = 24
_FIT_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Style:
    """How figures look. Lengths are points, 1/72 inch."""

    color: str = "category"
    """`category`, or what tells runs apart: `run`, `order_seed`, `train_category`, `model`."""
    width: float = DEFAULT_WIDTH
    """Width of the page that a figure fills."""
    font_size: float = 10
    font: str = FONTS
    """Font families in order of preference, as in CSS."""
    titled: bool = True
    """Whether the title stands in the figure; the caption file holds it in any case."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Category to what is printed for it."""

    def num_ticks(self, *, panels: bool) -> int:
        """Return how many steps the axis of a figure, or of one of its panels, has room for."""
        wide = self.width >= 400
        return (6 if wide else 4) if panels else (MAX_TICKS if wide else 5)

    def label(self, category: str) -> str:
        """Return what is printed for a category."""
        return self.labels.get(category, category)


def read_labels(path: Path) -> dict[str, str]:
    """Read a YAML file that maps categories to labels, as in `chosen: y^+` or `random: y_{r}`.

    Raises:
        UserError: it is no such file, or a character has no raised or lowered form.
    """
    try:
        labels = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(labels, dict):
        raise UserError(f"{path} must map categories to labels, as in `chosen: y^+`.")
    return {str(name): _RAISED.sub(_raised, str(label)) for name, label in labels.items()}


def _raised(match: re.Match[str]) -> str:
    """Return the Unicode characters of one superscript or subscript."""
    above = match[1] if match[1] is not None else match[2]
    text = above if above is not None else match[3]
    found = text.translate(_SUBSCRIPTS if above is None else _SUPERSCRIPTS)
    if lost := sorted(set(found.replace("*", "")) & set(text)):
        where = "below" if above is None else "above"
        raise UserError(f"label {match.string!r}: Unicode has no {', '.join(lost)} {where} a line.")
    return found


def font_families(name: str) -> str:
    """Return the fonts of a figure for which the font `name` was asked.

    Raises:
        UserError: the renderer does not find it; it would draw no text, without a word.
    """
    blank = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'
    text = f'<text x="2" y="15" font-family="{name}">H</text>'
    if set(name) & set("<>&\"'") or _png(blank.format(text)) == _png(blank.format("")):
        raise UserError(f"--font: {name!r} is not among the fonts of this machine (`fc-list`).")
    return f"{name}, {FONTS}"


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each category: fixed for the standard ones, for others one that follows
    from the name, as long as no two collide."""
    found = {name: COLORS[name] for name in names if name in COLORS}
    for name in sorted(set(names) - COLORS.keys()):
        start = zlib.crc32(name.encode()) % len(_OTHER_COLORS)
        turned = _OTHER_COLORS[start:] + _OTHER_COLORS[:start]
        found[name] = next((color for color in turned if color not in found.values()), turned[0])
    return {name: found[name] for name in names}


def key_colors(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each run, seed or model, which have none of their own."""
    colors = _OKABE_ITO + _OTHER_COLORS
    return {name: colors[number % len(colors)] for number, name in enumerate(names)}


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The lines of a chart: the column that tells them apart, their names and their colours.

    Each has its own marker and line style too, so that a print in grey can be read.
    """

    column: str
    colors: Mapping[str, str]
    style: Style
    title: str | None = None
    legend: bool = True
    markers: bool = True
    """Whether the legend shows the markers; else it shows the line styles."""

    @functools.cached_property
    def _legend(self) -> alt.Legend | None:
        if not self.legend:
            return None
        columns = legend_columns(list(self.colors), self.style)
        return alt.Legend(title=self.title, columns=columns, symbolOpacity=1, symbolStrokeWidth=0)

    @property
    def color(self) -> alt.Color:
        """The colour channel."""
        scale = alt.Scale(domain=list(self.colors), range=list(self.colors.values()))
        return alt.Color(f"{self.column}:N", scale=scale, sort=None, legend=self._legend)

    @property
    def shape(self) -> alt.Shape:
        """The channel of markers, in one legend with the colours."""
        scale = alt.Scale(domain=list(self.colors), range=self._repeat(_SHAPES))
        return alt.Shape(f"{self.column}:N", scale=scale, sort=None, legend=self._legend)

    @property
    def dash(self) -> alt.StrokeDash:
        """The channel of line styles."""
        scale = alt.Scale(domain=list(self.colors), range=self._repeat(_DASHES))
        return alt.StrokeDash(f"{self.column}:N", scale=scale, sort=None, legend=self._legend)

    def _repeat(self, values: Sequence[Any]) -> list[Any]:
        return [values[number % len(values)] for number in range(len(self.colors))]


def category_keys(categories: Sequence[str], style: Style, *, legend: bool = True) -> Keys:
    """Return the categories as lines of a chart, told apart by the column `label`."""
    colors = {style.label(name): color for name, color in colors_of(categories).items()}
    return Keys(column="label", colors=colors, style=style, legend=legend)


def legend_columns(names: Sequence[str], style: Style) -> int:
    """Return how many names fit beside each other below a figure, at about 0.6 em a letter."""
    longest = max((len(name) for name in names), default=1)
    most = max(1, min(6, int(style.width // ((0.6 * longest + 3.2) * style.font_size))))
    rows = math.ceil(len(names) / most)
    return math.ceil(len(names) / max(1, rows))


def step_axis(steps: Sequence[int], title: str | None, most: int = MAX_TICKS) -> alt.X:
    """Return a log axis that shows step 0: linear up to the smallest step, logarithmic above."""
    scale = alt.Scale(
        type="symlog",
        constant=max(min((step for step in steps if step > 0), default=1), 1),
        nice=False,
        domain=[min(steps), max(steps)] if len(set(steps)) > 1 else alt.Undefined,
    )
    axis = alt.Axis(
        values=ticks(steps, most),
        labelExpr="format(datum.value, datum.value < 10000 ? 'd' : '~s')",
        grid=False,
        labelFlush=False,
    )
    return alt.X("step:Q", title=title, scale=scale, axis=axis)


def ticks(steps: Sequence[int], most: int = MAX_TICKS) -> list[int]:
    """Return at most so many of the steps, about evenly spaced on the log axis, the last one
    always."""
    ordered = sorted({int(step) for step in steps})
    if len(ordered) <= most:
        return ordered
    positive = [step for step in ordered if step > 0]
    low, high = positive[0], positive[-1]
    wanted = [low * (high / low) ** (number / (most - 2)) for number in range(most - 1)]
    near = {min(positive, key=lambda step: abs(step / target - 1)) for target in wanted}
    return sorted(near | {step for step in ordered[:1] if step <= 0})


def small_multiples(
    layers: Any,
    names: Sequence[str],
    style: Style,
    width: float,
    *,
    column: str = "label",
    max_columns: int = 3,
    ratio: float = 0.75,
    height: float | None = None,
    own_scale: bool = False,
) -> Any:
    """Return one panel for each value of a column, about `width` wide together.

    Args:
        layers: the chart of one panel, with its data.
        names: values of `column`, in order.
        max_columns: most panels side by side; a figure under 400 points has two at most.
        ratio: height by width of a panel; a panel has room for its axis title in any case.
        height: height of a panel, in place of `ratio`.
        own_scale: whether each panel has a y axis of its own.
    """
    columns = max(1, min(len(names), max_columns, 3 if style.width >= 400 else 2))
    cell = panel_width(width, columns, style)
    tall = height or max(min(ratio * cell, 300.0), 8.5 * style.font_size)
    # a header of the facet would stand higher where the uppermost label of an axis overhangs
    fitting = (cell + 2 * style.font_size) / (0.65 * max(len(name) for name in names))
    title = alt.Chart().mark_text(
        align="left",
        baseline="bottom",
        dy=-0.5 * style.font_size,
        fontSize=max(0.75 * style.font_size, min(style.font_size, fitting)),
        fontWeight="bold",
        limit=cell + 2 * style.font_size,
    )
    title = title.transform_aggregate(panel=f"min({column})").encode(
        x=alt.value(0), y=alt.value(0), text="panel:N"
    )
    no_header = alt.Header(labelExpr="''", labelFontSize=0, labelPadding=0)
    channel = alt.Facet(f"{column}:N", sort=list(names), title=None, header=no_header)
    panels = alt.layer(layers, title, data=layers.data).properties(width=cell, height=tall)
    chart = panels.facet(channel, columns=columns, spacing=style.font_size * 1.4)
    return chart.resolve_scale(y="independent") if own_scale else chart


def panel_width(width: float, columns: int, style: Style) -> float:
    """Return the width of the plot area of one panel; its axis takes about five letters."""
    return max(40.0, width / columns - 5.5 * style.font_size)


def zero_rule(table: pd.DataFrame) -> Any:
    """Return a rule at no change that panels can repeat, since it has the data of the panels."""
    return alt.Chart(table).mark_rule(color="#888", strokeDash=[4, 3]).encode(y=alt.datum(0))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is drawn, and the table it is drawn from."""

    name: str
    """Name of the files, without suffix."""
    title: str
    subtitle: Sequence[str]
    table: pd.DataFrame
    build: Callable[[float], Any]
    """Returns the chart whose content is about that wide, in points."""

    @property
    def caption(self) -> str:
        """What a reader of a paper must know: title and notes, in sentences."""
        texts = [self.title, *self.subtitle]
        return " ".join(text if text[-1:] in ".?!" else f"{text}." for text in texts)

    def spec(self, style: Style, width: float | None = None) -> dict[str, Any]:
        """Return a Vega-Lite specification; its page is about as wide as the style says.

        Args:
            style: how it looks.
            width: width of the content, where it was fitted; default: that of the page.
        """
        with alt.data_transformers.disable_max_rows():
            chart = self.build(max(width or style.width, 40.0))
            titled = _styled(chart, self.title, self.subtitle, style)
            # the renderer checks the schema
            spec: dict[str, Any] = titled.to_dict(validate=False)
        shown: dict[str, Any] = printable(spec)
        return shown

    def fitted(self, style: Style) -> tuple[dict[str, Any], str]:
        """Return the specification and an SVG whose page is `style.width` points wide, exactly.

        The size of axes and legends is known after rendering only, so the content is fitted to the
        page in a few steps. What is then missing becomes margin; what cannot be fitted, as a legend
        with a long name in a narrow figure, is scaled down to the page.
        """
        width = style.width
        for _ in range(_FIT_TRIES):
            spec = self.spec(style, width)
            svg = str(vl_convert.vegalite_to_svg(spec))
            excess = _size(svg)[0] - style.width
            if -2 < excess <= 0:
                break
            width -= excess
        return spec, _on_page(svg, style.width)

    def save(self, folder: Path, formats: Sequence[str], style: Style) -> list[Path]:
        """Write NAME.csv, the caption as NAME.txt, and a file of each format; return the paths."""
        spec, svg = self.fitted(style)
        csv, caption = folder / f"{self.name}.csv", folder / f"{self.name}.txt"
        write_text(csv, self.table.to_csv(index=False))
        write_text(caption, printable(self.caption) + "\n")
        written = [csv, caption]
        for suffix in formats:
            path = folder / f"{self.name}.{suffix}"
            write_bytes(path, _rendered(spec, svg, suffix))
            written.append(path)
        return written


def printable(value: Any) -> Any:
    """Return the same with U+FFFD for characters that XML 1.0 forbids: one of them in a text aborts
    the process that draws an SVG."""
    if isinstance(value, str):
        return _NOT_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def _rendered(spec: dict[str, Any], svg: str, suffix: str) -> bytes:
    """Return the bytes of a file. A point is 1/72 inch in all of them but HTML."""
    if suffix == "png":
        return _png(svg, scale=_PNG_PPI / POINTS_PER_INCH)
    if suffix == "pdf":
        return bytes(vl_convert.svg_to_pdf(svg))
    if suffix == "html":
        return str(vl_convert.vegalite_to_html(spec, bundle=True)).encode()
    inches = r'width="\1pt" height="\2pt" viewBox="0 0 '
    return re.sub(
        r'width="([\d.]+)" height="([\d.]+)" viewBox="0 0 ', inches, svg, count=1
    ).encode()


def _png(svg: str, scale: float = 1) -> bytes:
    return bytes(vl_convert.svg_to_png(svg, scale=scale, ppi=POINTS_PER_INCH))


def _size(svg: str) -> tuple[float, float]:
    match = _SVG_SIZE.search(svg)
    return (float(match[1]), float(match[2])) if match else (0.0, 0.0)


def _on_page(svg: str, width: float) -> str:
    """Return the SVG on a page of exactly that width: with a wider margin, or scaled down."""
    drawn, height = _size(svg)
    box = max(drawn, width)
    page = f'width="{width:g}" height="{height * width / box:g}" viewBox="0 0 {box:g} {height:g}"'
    paper = rf'\g<0><rect width="{box:g}" height="{height:g}" fill="white"/>'
    return re.sub(r"^<svg[^>]*>", paper, _SVG_SIZE.sub(page, svg, count=1), count=1)


def _styled(chart: Any, title: str, subtitle: Sequence[str], style: Style) -> Any:
    """Return the chart with title, fonts and frame; the legend stands below, so that any width can
    be met."""
    size = style.font_size
    if style.titled:
        lines = [line for text in subtitle for line in _wrap(text, style.width, size * 0.9)]
        text = alt.TitleParams(
            _wrap(title, style.width, size * 1.3),
            subtitle=lines,
            anchor="start",
            fontSize=size * 1.15,
            subtitleFontSize=size * 0.9,
            subtitleColor="#555",
            offset=size,
        )
        chart = chart.properties(title=text)
    return (
        chart.configure(font=style.font, padding=4)
        .configure_view(stroke="#ccc")
        .configure_axis(
            labelFontSize=size * 0.9,
            titleFontSize=size * 0.95,
            labelOverlap=True,
            labelLimit=min(180.0, 0.3 * style.width),
            titleFontWeight="normal",
        )
        .configure_axisYQuantitative(tickCount=5)
        .configure_legend(
            orient="bottom",
            labelFontSize=size,
            titleFontSize=size,
            symbolSize=size * 8,
            labelLimit=style.width - 4 * size,
        )
    )


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Return lines that fit a width in points, at about 0.56 em a letter."""
    return textwrap.wrap(text, max(20, int(width / (0.56 * size)))) or [""]
