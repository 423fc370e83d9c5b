"""What one part of the program writes, another reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.json
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_probe.analysis.imports import _read_samples
from sft_probe.analysis.simplicity import first_epoch
from sft_probe.files import jsonl_lines, write_jsonl

NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` cuts at, and JSON does not escape."""


@pytest.mark.parametrize(
    "read",
    [
        lambda path: list(_read_samples(path)),
        lambda path: pd.DataFrame(first_epoch(path.parent)).to_dict("records"),
        lambda path: pd.read_json(path, lines=True, dtype=False).to_dict("records"),
        lambda path: pyarrow.json.read_json(path).to_pylist(),
    ],
)
def test_a_row_of_any_text_is_one_line(tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]]) -> None:
    same = {"run": "r", "category": "chosen", "split": "train", "step": 1, "loss_sum": 1.5, "num_tokens": 3}
    rows = [{"doc_id": f"a{NO_LINE_ENDS}b{i}", "order": i, "num_bytes": 9, **same} for i in range(3)]
    write_jsonl(tmp_path / "first_epoch.jsonl", rows)
    assert [row["doc_id"] for row in read(tmp_path / "first_epoch.jsonl")] == [row["doc_id"] for row in rows]


@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_lines_come_back(lines: list[str]) -> None:
    assert jsonl_lines("".join(f"{line}\n" for line in lines)) == lines
