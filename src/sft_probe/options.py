"""Options, declared once: a command is a dataclass, and its attribute docstrings are its help.

The fields of a command's own class are its options; those of a base class form a group of their
own, titled by the first line of that class's docstring. A field without a default is required.
"""

import argparse
import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sft_probe.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """How the text of an option becomes its value."""

    read: Callable[[str], Any]
    """Raises `ValueError` or `argparse.ArgumentTypeError` for a text that does not fit."""
    metavar: str
    """The placeholder that help shows."""


@dataclass(frozen=True)
class OldName:
    """An earlier spelling of an option: it still works, with a warning."""

    name: str


class _Position:
    """Marks an argument without a flag."""


Positional = Annotated[T, _Position()]


def names(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, each once."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError("it names nothing")
    return found


def whole(text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def real(text: str) -> float:
    """Return a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive(text: str) -> int:
    """Return a whole number from 1."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def shard(text: str) -> tuple[int, int]:
    """Return the two numbers of `i/N`."""
    index, _, total = text.partition("/")
    if not (index.isdigit() and total.isdigit() and 1 <= int(index) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/N with 1 <= i <= N")
    return int(index), int(total)


def rate(text: str) -> float:
    """Return a positive number."""
    number = real(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def amount(text: str) -> float:
    """Return a sum of money, from 0."""
    number = real(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no amount of money")
    return number


def fraction(text: str) -> float:
    """Return a number between 0 and 1."""
    number = real(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def heldout(text: str) -> float:
    """Return a number of docs, or a share of all between 0 and 1."""
    return float(positive(text)) if text.isdigit() else fraction(text)


Names = Annotated[tuple[str, ...], Reader(names, "A,B")]
Positive = Annotated[int, Reader(positive, "N")]
Shard = Annotated[tuple[int, int], Reader(shard, "i/N")]
Rate = Annotated[float, Reader(rate, "X")]
Amount = Annotated[float, Reader(amount, "USD")]
Fraction = Annotated[float, Reader(fraction, "X")]
Heldout = Annotated[float, Reader(heldout, "N|X")]


class Command:
    """Base of every command: a dataclass that is checked, and that `execute` runs."""

    def check(self) -> None:
        """Raise `UserError` for what the command line, the file system and small JSON files tell.

        Nothing that takes time is imported for it.
        """

    def execute(self) -> None:
        """Do what the command is for."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Replayable(Command):
    """Replay"""

    config: Path | None = None
    """YAML file of options, such as the config.yaml that every run writes. Options on the command
    line win."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command, as its dataclass declares it."""

    name: str
    """The field's name, which is the key in a YAML file."""
    help: str
    group: str
    """The title of its group; empty for the command's own options."""
    flag: str
    """The one spelling that help shows; dashes and underscores are both read."""
    metavar: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    default: Any = MISSING
    is_list: bool = False
    is_switch: bool = False
    is_positional: bool = False
    old_names: tuple[str, ...] = ()

    def value_of(self, text: str) -> Any:
        """Return the value that a text stands for.

        Raises:
            UserError: it is none of the choices.
            argparse.ArgumentTypeError: it does not fit.
        """
        if self.choices and text not in self.choices:
            where = self.metavar if self.is_positional else self.flag
            raise unknown("choice", text, self.choices, where=where)
        return self.read(text)

    @property
    def is_required(self) -> bool:
        """Whether the command cannot run without it."""
        return self.default is MISSING

    @property
    def shown_default(self) -> str:
        """The default as one would write it; empty where there is none to show."""
        is_empty = self.default is MISSING or self.default in (None, "", (), [])
        return "" if is_empty or self.is_switch else as_text(self.default, self.metavar)

    def add_to(self, group: Any) -> Any:
        """Add it to a parser, or to a group of one, and return argparse's record of it."""
        about = self.help + (f" Default: {self.shown_default}." if self.shown_default else "")
        given: dict[str, Any] = {"help": about.replace("%", "%%"), "metavar": self.metavar}
        if self.is_switch:
            given = {"help": given["help"], "action": "store_true"}
        else:
            given |= {"type": self.value_of}
        if self.choices:
            given |= {"choices": self.choices}  # for shell completion
        if self.is_list:
            given |= {"nargs": "+", "action": "extend"}
        if self.is_positional:
            return group.add_argument(self.name, **{**given, "action": "store"})
        return group.add_argument(self.flag, dest=self.name, default=argparse.SUPPRESS, **given)


def as_text(value: Any, metavar: str = "") -> str:
    """Return the text that an option is given to have this value."""
    if isinstance(value, tuple):
        return ("/" if metavar == "i/N" else ",").join(map(str, value))
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def options_of(command: type, underscores: bool = False) -> tuple[Option, ...]:
    """Return the options of a dataclass: its own first, then those of each base class.

    Args:
        command: the dataclass.
        underscores: show `--max_steps`, as the Trainer does, and not `--max-steps`.
    """
    hints = get_type_hints(command, include_extras=True)
    defaults = {
        field.name: field.default_factory()
        if field.default_factory is not MISSING
        else field.default
        for field in fields(command)
    }
    found: list[Option] = []
    for owner in command.__mro__:
        if owner is object:
            break
        documented = _docstrings(owner.__module__).get(owner.__name__, {})
        group = "" if owner is command else _first_line(owner)
        for name, text in documented.items():
            if name in defaults and name not in [option.name for option in found]:
                flag = "--" + (name if underscores else name.replace("_", "-"))
                values = _value_of(hints[name], name.rpartition("_")[2].upper())
                found.append(
                    Option(
                        name=name,
                        help=text,
                        group=group,
                        flag=flag,
                        default=defaults[name],
                        **values,
                    )
                )
    return tuple(found)


def _value_of(hint: Any, name: str) -> dict[str, Any]:
    """Return what a type hint says of an option's values."""
    plain, extras = _unwrap(hint)
    found: dict[str, Any] = {
        "is_list": get_origin(plain) is list,
        "is_switch": plain is bool,
        "is_positional": any(isinstance(extra, _Position) for extra in extras),
        "old_names": tuple(extra.name for extra in extras if isinstance(extra, OldName)),
    }
    if found["is_list"]:
        plain, inner = _unwrap(get_args(plain)[0])
        extras = [*extras, *inner]
    if get_origin(plain) is Literal:
        found["choices"] = get_args(plain)
        name = "{" + ",".join(get_args(plain)) + "}"
    standard = {int: "N", float: "X", Path: "PATH"}.get(plain, name)
    found["read"] = {int: whole, float: real, Path: Path}.get(plain, str)
    found["metavar"] = standard
    for extra in extras:
        if isinstance(extra, Reader):
            found |= {"read": extra.read, "metavar": extra.metavar}
    for extra in extras:
        if isinstance(extra, str):
            found["metavar"] = extra
    return found


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Return a type without `Annotated` and `| None`, and what was annotated."""
    extras: list[Any] = []
    while True:
        if get_origin(hint) is Annotated:
            extras += hint.__metadata__
            hint = hint.__origin__
        elif get_origin(hint) in (Union, UnionType):
            arms = [arm for arm in get_args(hint) if arm is not NoneType]
            if len(arms) != 1:
                return str, extras
            hint = arms[0]
        else:
            return hint, extras


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return, for each class of a module, the docstring below each attribute, on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            own = found[node.name] = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    own[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def _first_line(owner: type) -> str:
    return (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")


def about(command: type) -> tuple[str, str, str]:
    """Return a command's summary (one line), its description, and its examples."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\n\nExamples:\n")
    summary, _, rest = text.partition("\n\n")
    return " ".join(summary.split()), rest.strip(), inspect.cleandoc("\n" + examples).strip()


def usage(prog: str, options: Iterable[Option]) -> str:
    """Return a line that shows positional arguments, required options, and that there are more."""
    parts = [prog]
    options = list(options)
    for option in options:
        dots = " ..." if option.is_list else ""
        if option.is_positional:
            text = f"{option.metavar}{dots}"
            parts.append(text if option.is_required else f"[{text}]")
        elif option.is_required:
            metavar = option.name.upper() if option.choices else option.metavar
            parts.append(f"{option.flag} {metavar}{dots}")
    if any(not option.is_positional and not option.is_required for option in options):
        parts.append("[options]")
    return " ".join(parts)
