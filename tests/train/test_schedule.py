"""The grammar of `--snapshot_steps`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.errors import UserError
from sft_probe.train.schedule import parse_steps


def parse(text: str, max_steps: int, steps_per_epoch: int = 7) -> list[int]:
    return parse_steps(
        text, flag="--some_steps", max_steps=max_steps, steps_per_epoch=steps_per_epoch
    )


@pytest.mark.parametrize(
    ("text", "max_steps", "expected"),
    [
        ("0,1,2,4,...,32,+100,last", 250, [0, 1, 2, 4, 8, 16, 32, 100, 200, 250]),
        ("100,200,...,500", 450, [100, 200, 300, 400]),
        ("2,4,...,10", 99, [2, 4, 6, 8, 10]),
        ("1,3,9,...,81", 99, [1, 3, 9, 27, 81]),
        ("0,1,2,...,5", 99, [0, 1, 2, 3, 4, 5]),
        ("512,+100", 800, [512, 600, 700, 800]),
        ("log2", 17, [0, 1, 2, 4, 8, 16]),
        ("epoch", 20, [7, 14]),
        ("last, 3", 20, [3, 20]),
        ("+5", 12, [5, 10]),
        ("1,2,...,1000000000000", 3, [1, 2, 3]),
    ],
)
def test_a_schedule_means_these_steps(text: str, max_steps: int, expected: list[int]) -> None:
    assert parse(text, max_steps) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("often", "'often' is neither a step"),
        ("", "'' is neither a step"),
        ("+0", "'+0' is neither"),
        ("-1", "'-1' is neither"),
        ("1,...,8", "between two rising numbers"),
        ("4,2,...,1", "between two rising numbers"),
        ("1,2,4,...", "between two rising numbers"),
        ("1,2,4,...,100", "does not reach 100"),
        ("3,5,...,8", "does not reach 8"),
        ("1,2,...,2,4,...,1", "does not reach 1"),
    ],
)
def test_faults_of_a_schedule_are_reported_with_the_flag(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, 200)
    assert words in str(caught.value)
    assert f"--some_steps {text!r}" in str(caught.value)


parts = st.one_of(
    st.integers(0, 5000).map(str),
    st.integers(1, 900).map("+{}".format),
    st.sampled_from(["log2", "epoch", "last"]),
)


@given(st.lists(parts, min_size=1), st.integers(1, 4000), st.integers(1, 500))
def test_any_schedule_gives_sorted_steps_within_the_run(
    texts: list[str], max_steps: int, steps_per_epoch: int
) -> None:
    steps = parse(",".join(texts), max_steps, steps_per_epoch)
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(max_steps + 1))
    assert {int(text) for text in texts if text.isdigit() and int(text) <= max_steps} <= set(steps)
    assert "last" not in texts or max_steps in steps
    assert "epoch" not in texts or set(
        range(steps_per_epoch, max_steps + 1, steps_per_epoch)
    ) <= set(steps)
    assert "log2" not in texts or {1, 2**10} & set(range(max_steps + 1)) <= set(steps)


@given(st.integers(0, 50), st.integers(1, 50), st.integers(2, 60), st.integers(1, 4000))
def test_every_nth_step_is_an_arithmetic_progression(
    start: int, step: int, count: int, max_steps: int
) -> None:
    full = [start + step * i for i in range(count)]
    text = f"{full[0]},{full[1]},...,{full[-1]}"
    assert parse(text, max_steps) == [number for number in full if number <= max_steps]


@given(st.text(alphabet="0123456789,+. abelgnopst"), st.integers(1, 50))
def test_no_text_given_as_schedule_gives_a_traceback(text: str, max_steps: int) -> None:
    try:
        steps = parse(text, max_steps)
    except UserError:
        return
    assert set(steps) <= set(range(max_steps + 1))
