"""Prints docs/cli.md: every command with its options, as the dataclasses declare them.

Run: python benchmarks/cli_page.py [--write]
"""

import sys
from pathlib import Path

from sft_probe.cli import COMMANDS
from sft_probe.options import Command, Option, about, options_of, usage
from sft_probe.train.options import Train

ROOT = Path(__file__).resolve().parents[1]
_HEAD = """# The command line

Written by `python benchmarks/cli_page.py --write` from the dataclasses of the commands; a test
compares.

Dashes and underscores are both read in every option. `sft-probe COMMAND --help` shows a command's
page in the terminal, and for `train` also the options of `transformers.TrainingArguments`.
`--config FILE` reads options from a YAML file, with underscores in their names. Every run writes
such a file: `RUN/config.yaml` (train), `RUN/sweep/config.yaml`, `SET/synthesis/config.yaml` and
`transfer/config.yaml`. A mistake ends with one line and exit code 2, Ctrl-C with one line and 130
(`train`: with a resume state and 75).
`SFT_PROBE_VERBOSE=1` shows the messages of the libraries below.
"""


def page() -> str:
    """Return the whole page."""
    summaries = [
        f"- [`{name}`](#{name.replace(' ', '-')}): {about(command)[0]}"
        for name, command in COMMANDS.items()
    ]
    sections = [_section(name, command) for name, command in COMMANDS.items()]
    return "\n".join([_HEAD, *summaries, "", "\n".join(sections)]).rstrip() + "\n"


def _section(name: str, command: type[Command]) -> str:
    options = options_of(command, underscores=command is Train)
    summary, description, examples = about(command)
    lines = [f"## {name}", summary, ""]
    lines += [" ".join(description.split()), ""] if description else []
    lines += ["```", usage(f"sft-probe {name}", options), "", examples, "```", ""]
    if options:
        lines += ["| option | what it does | default |", "|---|---|---|"]
    group = ""
    for option in options:
        if option.group != group:
            group = option.group
            lines.append(f"| *{group}* | | |")
        lines.append(_line(option))
    return "\n".join([*lines, ""])


def _line(option: Option) -> str:
    metavar = "" if option.is_switch else f" {option.metavar}"
    flag = option.metavar if option.is_positional else f"{option.flag}{metavar}"
    text = f"`{flag}`" + (" (required)" if option.is_required else "")
    cells = (text, option.help, f"`{option.shown_default}`" if option.shown_default else "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        (ROOT / "docs/cli.md").write_text(page(), "utf-8")
    else:
        print(page(), end="")
