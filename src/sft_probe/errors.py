"""The one exception that a user is meant to read.

Everything that a user can get wrong (data, flags, paths, models) raises `UserError`; the command line prints its
message and exits with code 2. Any other exception is a defect of this program.
"""


class UserError(Exception):
    """Says what was wrong, where, and what to do about it."""
