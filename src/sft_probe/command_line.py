"""A command line, read as the dataclass of a command; its help, and the YAML file that replays it.

Every option is read with dashes or underscores and shown with one of them. What does not fit is a
`UserError` that names the option that was perhaps meant.
"""

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sft_probe.errors import UserError, unknown
from sft_probe.files import write_bytes
from sft_probe.options import Option, about, as_text, options_of, usage

log = logging.getLogger(__name__)
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose faults are `UserError`s, of a line each."""

    def error(self, message: str) -> Any:
        """Raise a `UserError` that names the command whose help says more."""
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def parser_of(
    prog: str, command: type, options: Sequence[Option], *, positionals: bool
) -> argparse.ArgumentParser:
    """Return the parser of a command, which is also what prints its help."""
    summary, description, examples = about(command)
    parser = Parser(
        prog=prog,
        usage=usage(prog, options),
        description=f"{summary}\n\n{description}".strip().replace("%", "%%"),
        epilog=f"examples:\n{_indented(examples)}".replace("%", "%%") if examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=100
        ),
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {"": parser}
    for option in options:
        if option.is_positional and not positionals:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group.lower())
        option.add_to(groups[option.group])
    return parser


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def read_command(prog: str, command: type[T], argv: Sequence[str]) -> T:
    """Return the command with the options of a command line, and those of its `--config` file.

    Raises:
        UserError: an unknown option, a value that does not fit, or a required one is missing.
        SystemExit: help was asked for, and printed.
    """
    options = options_of(command)
    if {"-h", "--help"} & set(argv):
        parser_of(prog, command, options, positionals=True).print_help()
        raise SystemExit(0)
    given = _values(prog, command, options, argv)
    if "config" in given:
        recorded = read_config(given["config"])
        flags = _config_flags(recorded, options, given["config"])
        given = {**_values(prog, command, options, flags), **given}
    missing = [option for option in options if option.is_required and option.name not in given]
    if missing:
        named = [option.metavar if option.is_positional else option.flag for option in missing]
        verb = "is" if len(named) == 1 else "are"
        raise UserError(f"{', '.join(named)} {verb} missing. Usage: {usage(prog, options)}")
    return command(**given)


def _values(
    prog: str, command: type, options: Sequence[Option], argv: Sequence[str]
) -> dict[str, Any]:
    """Return the value of each option that a command line gives."""
    parser = parser_of(prog, command, options, positionals=False)
    namespace, rest = parser.parse_known_args(canonical(argv, options))
    end = rest.index("--") if "--" in rest else len(rest)
    check_known(
        prog, [part for part in rest[:end] if part[:1] == "-" and len(part) > 1], options, "-h"
    )
    found = vars(namespace)
    texts = [part for part in rest if part != "--"]
    for option in options:
        if option.is_positional and texts:
            own, texts = (texts, []) if option.is_list else (texts[:1], texts[1:])
            read = [_read(option, text) for text in own]
            found[option.name] = read if option.is_list else read[0]
    if texts:
        raise UserError(f"{texts[0]!r} is one argument too many. Usage: {usage(prog, options)}")
    return found


def _read(option: Option, text: str) -> Any:
    try:
        return option.value_of(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{option.metavar} {text!r}: {error}") from error


def canonical(argv: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Return a command line in which every known option has the spelling that help shows."""
    spellings = {}
    for option in options:
        spellings[_dashed(option.flag)] = option.flag
        for old in option.old_names:
            spellings[_dashed(old)] = option.flag
    found: list[str] = []
    for position, part in enumerate(argv):
        if part == "--":
            return [*found, *argv[position:]]
        match = re.fullmatch(r"(--[A-Za-z][\w-]*)((?:=.*)?)", part, re.DOTALL)
        flag = spellings.get(_dashed(match[1])) if match else None
        if match and flag and _dashed(flag) != _dashed(match[1]):
            log.warning("%s is now %s; please use the new name.", match[1], flag)
        found.append(flag + match[2] if match and flag else part)
    return found


def _dashed(flag: str) -> str:
    return "--" + flag.removeprefix("--").replace("_", "-")


def check_known(prog: str, extra: Sequence[str], options: Iterable[Option], *others: str) -> None:
    """Raise `UserError` for options that do not exist, with the one that was perhaps meant."""
    if extra:
        flag = extra[0].partition("=")[0]
        known = [option.flag for option in options if not option.is_positional]
        raise unknown("option", flag, [*known, *others], use=f"See {prog} --help.")


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file. Raises `UserError` where it cannot be read."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must map options to values.")
    return {str(name): value for name, value in found.items()}


def _config_flags(recorded: Mapping[str, Any], options: Sequence[Option], path: Path) -> list[str]:
    """Return the command line that a YAML file stands for."""
    flags, positionals = [], []
    known = {_dashed(option.flag): option for option in options}
    for name, value in recorded.items():
        option = known.get(_dashed(name))
        if option is None:
            raise unknown(
                "option",
                name,
                [option.name for option in options],
                where=str(path),
                use="The help of the command lists all.",
            )
        values = [as_text(part) for part in value] if isinstance(value, list) else [as_text(value)]
        if option.is_positional:
            positionals += values
        elif option.is_switch:
            flags += [option.flag] if value is True else []
        elif value is not None:
            joined = values if option.is_list else [",".join(values)]
            flags += [option.flag, *joined] if option.is_list else [f"{option.flag}={joined[0]}"]
    return [*flags, "--", *positionals]


def log_written(paths: Iterable[Path], following: str = "") -> None:
    """Log what a command has written, the last one with the command that comes next.

    Args:
        paths: files or directories; each is logged when it is there.
        following: a command line, without `sft-probe`; empty where none suggests itself.
    """
    last: Path | None = None
    for path in paths:
        if last is not None:
            log.info("wrote %s", last)
        last = path
    if last is not None:
        log.info("wrote %s%s", last, f"; next: sft-probe {following}" if following else "")


def config_of(command: Any) -> dict[str, Any]:
    """Return the options of a command that differ from their defaults, as YAML would hold them."""
    found: dict[str, Any] = {}
    for option in options_of(type(command)):
        value = getattr(command, option.name)
        if value == option.default or option.name == "config":
            continue
        if option.is_list:
            found[option.name] = [as_text(part, option.metavar) for part in value]
        else:
            is_plain = isinstance(value, bool | int | float)
            found[option.name] = value if is_plain else as_text(value, option.metavar)
    return found


def write_config(path: Path, prog: str, values: Mapping[str, Any]) -> None:
    """Write the YAML file with which `--config` runs a command again, unless it is there."""
    import yaml

    options = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    content = f"# Run again with: {prog} --config {path}\n{options}".encode()
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)
