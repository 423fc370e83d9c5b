"""Which optimizer steps something happens at: the grammar of `--snapshot_steps` and its like.

steps = part {"," part}
part  = N        that step
      | ...      between numbers: the progression before it, up to the number after it: geometric
      where the three
                 numbers before it are (1,2,4,...,512), else arithmetic (100,200,...,1000)
      | log2     0, 1, 2, 4, 8, ... to the last step
      | +N       every multiple of N after the number before it (512,+100 is 512, 600, 700, ...)
      | epoch    the last step of each epoch
      | last     the last step
"""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft_probe.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments


def resolve_steps(
    text: str, *, flag: str, args: "TrainingArguments", state: "TrainerState", dataloader: Any
) -> list[int]:
    """Parse a schedule for a training that is about to begin; in one without a known length the
    only epoch ends last."""
    from transformers.trainer_utils import has_length

    num_batches = (
        len(dataloader)
        if has_length(dataloader)
        else state.max_steps * args.gradient_accumulation_steps
    )
    steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
    return parse_steps(text, flag=flag, max_steps=state.max_steps, steps_per_epoch=steps_per_epoch)


def parse_steps(text: str, *, flag: str, max_steps: int, steps_per_epoch: int) -> list[int]:
    """Resolve `"0,1,2,4,...,512,+100,epoch,last"` to sorted steps within `0..max_steps`.

    Steps beyond the last one are left out, so that one recipe serves short and long runs.

    Args:
        text: in the grammar above.
        flag: whose value it is, for messages.
        max_steps: the last step of the run.
        steps_per_epoch: optimizer steps.

    Raises:
        UserError: the text is not in the grammar, or the number after `...` is not in the
            progression.
    """
    steps: set[int] = set()
    numbers: list[int] = []  # those that stand together right before a part
    parts = [part.strip() for part in text.split(",")]
    for position, part in enumerate(parts):
        if _is_number(part):
            numbers.append(int(part))
            steps.add(int(part))
        elif part == "...":
            following = parts[position + 1] if position + 1 < len(parts) else ""
            steps.update(_progression(numbers, following, max_steps, f"{flag} {text!r}"))
        elif part[:1] == "+" and _is_number(part[1:]) and int(part[1:]) > 0:
            every, after = int(part[1:]), numbers[-1] if numbers else 0
            steps.update(range((after // every + 1) * every, max_steps + 1, every))
            numbers = []
        elif part in ("log2", "epoch", "last"):
            steps.update(_named(part, max_steps, steps_per_epoch))
            numbers = []
        else:
            raise UserError(
                f"{flag} {text!r}: {part!r} is neither a step (0, 1, 2, ...) nor one of ..., log2, "
                "+N (every N-th step), epoch, last."
            )
    return sorted(step for step in steps if step <= max_steps)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _named(name: str, max_steps: int, steps_per_epoch: int) -> Iterator[int]:
    if name == "log2":
        yield 0
        yield from itertools.takewhile(
            lambda step: step <= max_steps, (2**i for i in itertools.count())
        )
    elif name == "epoch":
        yield from range(steps_per_epoch, max_steps + 1, steps_per_epoch)
    else:
        yield max_steps


def _progression(numbers: list[int], following: str, max_steps: int, value: str) -> Iterator[int]:
    """Return what stands between `numbers` and `following`, as far as `max_steps`."""
    if len(numbers) < 2 or numbers[-1] <= numbers[-2] or not _is_number(following):
        raise UserError(
            f"{value}: ... stands between two rising numbers and the one to reach, as in "
            "1,2,4,...,64."
        )
    *before, second, first = numbers[-3:]
    last = int(following)
    if before and before[0] > 0 and second * second == before[0] * first and first % second == 0:
        powers = (first * (first // second) ** i for i in itertools.count())
        reached = list(itertools.takewhile(lambda step: step <= last, powers))
        reaches = reached[-1:] == [last]
        yield from reached
    else:
        reaches = last in range(first, last + 1, first - second)
        yield from range(first, min(last, max_steps) + 1, first - second)
    if not reaches:
        raise UserError(f"{value}: the progression before ... does not reach {last}.")
