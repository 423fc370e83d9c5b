"""The one exception that a user is meant to read.

Everything that a user can get wrong (data, flags, paths, models) raises `UserError`; the command
line prints its message and exits with code 2. Any other exception is a defect of this program.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Says what was wrong, where, and what to do about it."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` into its message on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"sft-probe: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
