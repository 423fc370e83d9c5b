"""Which optimizer steps are kept: the `--snapshot_steps` grammar."""

from sft_probe.errors import UserError


def parse_steps(text: str, max_steps: int) -> list[int]:
    """Resolves `"0,1,4,16,last"` to sorted steps within `0..max_steps`; step 0 and the last are always among them.

    Explicit steps beyond the last one are left out, so that one recipe serves short and long runs.

    Raises:
        UserError: a part of the text is neither a whole number nor `last`.
    """
    steps = {0, max_steps}
    for part in (part.strip() for part in text.split(",")):
        if part == "last":
            continue
        if not (part.isascii() and part.isdigit()):
            raise UserError(f"--snapshot_steps {text!r}: {part!r} is neither a step (0, 1, 2, ...) nor `last`.")
        if int(part) <= max_steps:
            steps.add(int(part))
    return sorted(steps)
