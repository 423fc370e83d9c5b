"""The file map in CONTRIBUTING.md names every file of the product, with what its docstring says."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_contributing_maps_every_file_of_the_product() -> None:
    code_map = runpy.run_path(str(ROOT / "benchmarks/code_map.py"))
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    missing = [
        line for line in code_map["file_map"]().splitlines() if line not in page.splitlines()
    ]
    assert not missing, "run: python benchmarks/code_map.py --write"
    listed = [line for line in page.splitlines() if line.startswith("- `") and ".py`" in line]
    assert len(listed) == len(code_map["product_files"]()), "a file is listed that is no more"
