"""Tables as text, for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from tabulate import tabulate

Form = Literal["text", "md", "latex", "csv"]
FORMS: tuple[Form, ...] = get_args(Form)
_NAMES = {"text": "plain", "md": "github", "latex": "latex_booktabs"}


class Shown(NamedTuple):
    """A table as it is printed, under its title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], form: Form = "text", *, left: int = 1
) -> str:
    """Return a table, its first `left` columns aligned to the left and the others to the right.

    Args:
        columns: the head.
        rows: cells, printed as they are.
        form: `text` for a terminal, `md`, `latex` (with the rules of booktabs) or `csv`.
        left: number of columns of words.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([list(columns), *cells])
        return text.getvalue().rstrip("\n")
    align = ["left" if number < left else "right" for number in range(len(columns))]
    table = tabulate(cells, list(columns), _NAMES[form], disable_numparse=True, colalign=align)
    if form == "latex":  # a hyphen before a digit is a minus
        return re.sub(r"(?<![\w-])-(?=\d)", "$-$", str(table))
    return str(table)


def shown_text(shown: Shown, form: Form = "text", *, left: int = 1) -> str:
    """Return a table under its title; other arguments as for `text_table`."""
    return f"{shown.title}\n\n{text_table(shown.columns, shown.rows, form, left=left)}"


def number(value: float, form: str) -> str:
    """Return a number in a format such as `+.1f`, or - for NaN; what rounds to 0 has no minus."""
    form = form if "z" in form or not form.endswith("f") else form.replace(".", "z.")
    return "-" if math.isnan(value) else format(value, form)


def interval(low: float, high: float, form: str = "+z.1f") -> str:
    """Return an interval as `[+1.0, +2.0]`, or - for NaN."""
    return "-" if math.isnan(low) else f"[{number(low, form)}, {number(high, form)}]"


def p_value(value: float) -> str:
    """Return a p-value with one digit, or - for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.1g}" if value >= 1e-4 else "<0.0001"
