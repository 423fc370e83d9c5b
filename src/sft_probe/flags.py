"""Values of command-line flags."""

import argparse


def names(text: str) -> tuple[str, ...]:
    """A flag's comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def shard(text: str) -> tuple[int, int]:
    """`i/N` as two numbers."""
    index, _, total = text.partition("/")
    if not (index.isdigit() and total.isdigit() and 1 <= int(index) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/N with 1 <= i <= N")
    return int(index), int(total)
