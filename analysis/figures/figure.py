"""A figure: one specification, fitted to a width, saved in any format with its numbers beside
it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from sft_probe.analysis.figures.style import POINTS_PER_INCH, Style, finish
from sft_probe.files import write_bytes, write_text

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
