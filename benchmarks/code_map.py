"""Prints the end of CONTRIBUTING.md: how large files and functions are, and a line for each file of
the product.

Run: python benchmarks/code_map.py [--write]
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("src/sft_probe", "tasks", "synth", "train", "analysis")


def product_files() -> list[Path]:
    """Return every Python file of the product, room by room."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in files if not any(parent.is_symlink() for parent in path.parents)]


def file_map() -> str:
    """Return a line per file: its path, and the first sentence of its docstring."""
    lines = []
    for path in product_files():
        about = (
            (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")
            .split("\n\n")[0]
            .replace("\n", " ")
        )
        lines.append(f"- `{path.relative_to(ROOT)}`: {about}")
    return "\n".join(lines)


def sizes() -> str:
    """Return a table of the sizes of files and functions."""
    lengths = [path.read_text("utf-8").count("\n") for path in product_files()]
    trees = [ast.parse(path.read_text("utf-8")) for path in product_files()]
    functions = sorted(
        node.end_lineno - node.lineno + 1
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    modules = [
        length
        for path, length in zip(product_files(), lengths, strict=True)
        if path.name != "__init__.py"
    ]
    return "\n".join(
        [
            "| files | lines | median file | longest file | function: median | p90 | longest |",
            "|---|---|---|---|---|---|---|",
            f"| {len(modules)} | {sum(lengths)} | {statistics.median(modules):.0f} | "
            f"{max(modules)} | "
            f"{statistics.median(functions):.0f} | {functions[len(functions) * 9 // 10]} | "
            f"{functions[-1]} |",
        ]
    )


def main() -> None:
    """Print both parts, or write them into CONTRIBUTING.md."""
    text = f"{sizes()}\n\n{file_map()}\n"
    if "--write" not in sys.argv[1:]:
        print(text, end="")
        return
    page = ROOT / "CONTRIBUTING.md"
    head = page.read_text("utf-8").partition("| files |")[0]
    page.write_text(head + text, "utf-8")


if __name__ == "__main__":
    main()
