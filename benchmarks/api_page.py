"""Prints docs/api.md: the Python interface, from its docstrings.

Run: python benchmarks/api_page.py [--write]
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import sft_probe
from sft_probe import api
from sft_probe.analysis.stats.comparison import Comparison

ROOT = Path(__file__).resolve().parents[1]
_HEAD = """# Python

Written by `python benchmarks/api_page.py --write` from the docstrings; a test compares.

    import sft_probe

For notebooks and scripts: [examples/runs.ipynb](../examples/runs.ipynb) is run in the tests. Paths
are texts or `Path`s, tables are pandas DataFrames whose columns [data.md](data.md) lists, figures
are Altair charts. A mistake of the caller raises `sft_probe.errors.UserError`.
"""


def page() -> str:
    """Return the whole page."""
    sections = [_HEAD, _section("load", sft_probe.load), _section("Runs", sft_probe.Runs)]
    for name, member in vars(sft_probe.Runs).items():
        if not name.startswith("_"):
            sections.append(_section(name, member, level=3))
    for name in ("compare", "probe_set", "score", "record", "ProbeCallback"):
        sections.append(_section(name, getattr(api if name in vars(api) else sft_probe, name)))
        if name == "compare":
            sections.append(_section("Comparison", Comparison))
    return "\n".join(sections)


def _section(name: str, thing: Any, *, level: int = 2) -> str:
    """Return heading, signature and docstring of one name."""
    text = inspect.getdoc(thing) or ""
    for head, write in (("Args", _list), ("Raises", _list), ("Example", _code)):
        text = re.sub(rf"^{head}:\n((?:    .*\n?|\n)+)", write, text, flags=re.MULTILINE)
    if inspect.isfunction(thing) or name in ("Comparison", "ProbeCallback"):
        return f"{'#' * level} {name}\n\n```python\n{_signature(name, thing)}\n```\n\n{text}\n"
    return f"{'#' * level} {name}\n\n{text}\n"


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    result = signature.return_annotation
    arrow = "" if result in (None, inspect.Signature.empty) else f" -> {_type(result)}"
    parameters = signature.parameters.values()
    shown = [str(one).replace("'", "") for one in parameters if one.name != "self"]
    return f"{name}({_type(', '.join(shown))}){arrow}"


def _type(annotation: Any) -> str:
    """Return an annotation as it is written in the source."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    modules = r"(pathlib|collections\.abc|typing|sft_probe\.[\w.]+|pandas(\.core\.frame)?)\."
    return re.sub(modules, "", text.replace("'", ""))


def _list(match: re.Match[str]) -> str:
    lines = inspect.cleandoc(match[1]).splitlines()
    joined = re.sub(r"\n +", " ", "\n".join(lines))
    return re.sub(r"^(\w+): ", r"- `\1`: ", joined, flags=re.MULTILINE) + "\n\n"


def _code(match: re.Match[str]) -> str:
    return f"```python\n{inspect.cleandoc(match[1])}\n```"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        (ROOT / "docs/api.md").write_text(page(), "utf-8")
    else:
        print(page(), end="")
