"""What one part of the program writes, another reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.json
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.analysis.studies.simplicity import first_epoch
from sft_probe.errors import UserError
from sft_probe.files import (
    find,
    jsonl_lines,
    new_dir,
    new_file,
    read_jsonl,
    read_object,
    remove_leftovers,
    write_json,
    write_jsonl,
    write_text,
)

NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` cuts at, and JSON does not escape."""


@pytest.mark.parametrize(
    "read",
    [
        read_jsonl,
        lambda path: pd.DataFrame(first_epoch(path.parent)).to_dict("records"),
        lambda path: pd.read_json(path, lines=True, dtype=False).to_dict("records"),
        lambda path: pyarrow.json.read_json(path).to_pylist(),
    ],
)
def test_a_jsonl_row_of_any_text_is_written_as_one_line(
    tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    same = {
        "run": "r",
        "category": "chosen",
        "split": "train",
        "step": 1,
        "loss_sum": 1.5,
        "num_tokens": 3,
    }
    rows = [
        {"doc_id": f"a{NO_LINE_ENDS}b{i}", "order": i, "num_bytes": 9, **same} for i in range(3)
    ]
    write_jsonl(tmp_path / "first_epoch.jsonl", rows)
    assert [row["doc_id"] for row in read(tmp_path / "first_epoch.jsonl")] == [
        row["doc_id"] for row in rows
    ]


@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_jsonl_lines_that_were_written_are_read_back(lines: list[str]) -> None:
    assert jsonl_lines("".join(f"{line}\n" for line in lines)) == lines


def test_a_half_written_file_or_directory_is_never_read_as_data(tmp_path: Path) -> None:
    """Readers leave it out, two writers do not meet, and the owner of a folder cleans what the dead
    left."""
    with new_dir(tmp_path / "part") as one, new_dir(tmp_path / "part") as other:
        assert one != other
        for folder in (one, other):
            (folder / "rows.jsonl").write_text(folder.name)
        assert find(tmp_path, "*/rows.jsonl") == []
    assert find(tmp_path, "*/rows.jsonl") == [tmp_path / "part/rows.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["part"], (
        "the second one to end is discarded"
    )
    for name in (
        ".part.tmp",
        ".part.0123.tmp",
        ".other.0123.tmp",
    ):  # of an earlier version, and of this one
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("half")
    assert find(tmp_path, "**/*.jsonl") == [tmp_path / "part/rows.jsonl"]
    remove_leftovers(tmp_path, "part")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123.tmp", "part"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def fail_in(block: Any, name: str) -> None:
    with block as temporary:
        (temporary / name if name else temporary).write_text("new")
        raise ZeroDivisionError


def test_a_block_that_fails_while_writing_leaves_no_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    for block, name in ((new_file(tmp_path / "file"), ""), (new_dir(tmp_path / "folder"), "rows")):
        with pytest.raises(ZeroDivisionError):
            fail_in(block, name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


VALUES: list[Any] = [None, True, 0, 1.5, "x", [], {}]
FITS: dict[Any, list[Any]] = {
    int: [0],
    float: [0, 1.5],
    str: ["x"],
    bool: [True],
    list: [[]],
    dict: [{}],
    str | None: [None, "x"],
    float | None: [None, 0, 1.5],
    int | str: [0, "x"],
}


@pytest.mark.parametrize("kind", FITS, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_of_another_shape_is_refused_with_the_field(
    tmp_path: Path, kind: Any, value: Any
) -> None:
    path = tmp_path / "object.json"
    write_json(path, {"key": value})
    if any(value is fit or (value == fit and type(value) is type(fit)) for fit in FITS[kind]):
        assert read_object(path, {"key": kind}) == {"key": value}
    else:
        with pytest.raises(UserError, match="'key' is ") as caught:
            read_object(path, {"key": kind})
        assert str(path) in str(caught.value)
        with pytest.raises(UserError, match="'key' is "):
            read_object(path, optional={"key": kind})
    with pytest.raises(UserError, match="has no 'other'"):
        read_object(path, {"other": kind})
    assert read_object(path, optional={"other": kind}) == {"key": value}
