"""Values of command-line flags."""

import argparse
import math


def names(text: str) -> tuple[str, ...]:
    """A flag's comma-separated list, each name once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


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


def rate(text: str) -> float:
    """A positive number."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def amount(text: str) -> float:
    """A sum of money, from 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no amount of money")
    return number


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def heldout(text: str) -> float:
    """A number of docs, or a share of all between 0 and 1."""
    return float(positive(text)) if text.isdigit() else fraction(text)
