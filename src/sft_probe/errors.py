"""What a user reads where something stops: one line, an exit code, never a traceback.

Everything that a user can get wrong (data, flags, paths, models) raises `UserError`; the command
line prints its message and exits with code 2. Any other exception is a defect of this program.
"""

import difflib
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

log = logging.getLogger(__name__)
_QUICK_S = 2.0
_AGAIN_S = 60.0
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it."""


class UserError(Exception):
    """Says what was wrong, where, and what to do about it."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into its message and exit code 2, Ctrl-C into one line and code 130."""
    try:
        yield
    except UserError as error:
        print(f"sft-probe: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("sft-probe: interrupted; what is complete is kept.", file=sys.stderr)  # noqa: T201
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def quiet() -> None:
    """Show what this program says and the errors of other libraries, but not their warnings.

    `SFT_PROBE_VERBOSE=1` shows everything.
    """
    if os.environ.get("SFT_PROBE_VERBOSE"):
        logging.basicConfig(level=logging.INFO)
        return
    start = "\r\033[K" if sys.stderr.isatty() else ""  # a line of its own where a bar is drawn
    logging.basicConfig(level=logging.ERROR, format=start + "%(message)s")
    logging.getLogger("sft_probe").setLevel(logging.INFO)
    # DeepSpeed sets the level of its logger when it is imported; a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", append=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Log what is being done where the block takes over 2 s, and once a minute while it lasts.

    Args:
        what: such as `loading the model`.
    """
    ended = threading.Event()
    started = time.monotonic()

    def report() -> None:
        wait = _QUICK_S
        while not ended.wait(wait):
            seconds = time.monotonic() - started
            log.info("%s%s", what, " ..." if wait == _QUICK_S else f" ({seconds:.0f} s so far)")
            wait = _AGAIN_S

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run_command(arguments: Sequence[str], output: IO[str] | None = None) -> int:
    """Run `sft-probe` in a process of its own and return its exit code.

    Ctrl-C reaches that process too, so this one waits until it has stopped in order.
    """
    command = [sys.executable, "-m", "sft_probe", *arguments]
    with subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def first_few(names: Iterable[str], most: int, separator: str = ", ") -> str:
    """Return the first names and how many more there are: `a, b and 3 more`.

    Args:
        names: in the order in which they are shown.
        most: how many of them are shown.
        separator: what stands between them; lines where it is a line break.
    """
    every = list(names)
    space = separator if separator.isspace() else " "
    more = f"{space}and {len(every) - most} more" if len(every) > most else ""
    return separator.join(every[:most]) + more


def unknown(
    what: str, name: str, known: Iterable[str], *, where: str = "", use: str = ""
) -> UserError:
    """Return the error for a name that does not exist: the one form of all commands.

        WHERE: there is no WHAT 'NAME'. Did you mean X? Use one of A, B, C.

    Args:
        what: the kind of thing, such as `category`.
        name: as the user wrote it.
        known: the names that exist.
        where: the option or file that holds the name.
        use: the last sentence, where a list of all names would be too long or too little.
    """
    known = list(known)
    place = f"{where}: " if where else ""
    remedy = use or f"Use one of {', '.join(known)}."
    return UserError(
        f"{place}there is no {what} {name!r}.{did_you_mean(name, known)} {remedy}".rstrip()
    )


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?`, or nothing where no known name is close to the text."""
    plain = {name.replace("_", "-"): name for name in known}
    close = difflib.get_close_matches(text.replace("_", "-"), plain, n=1, cutoff=0.6)
    return f" Did you mean {plain[close[0]]}?" if close else ""


def check_names(where: str, what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise the error of `unknown` for the first of these names that is not known."""
    for name in names:
        if name not in known:
            raise unknown(what, name, known, where=where)
