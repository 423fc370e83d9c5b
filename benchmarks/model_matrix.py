"""Prints docs/models.md: what was tried of every architecture, form of adapter, and tokenizer;
takes minutes.

Architectures are tiny and random, held against transformers' own float64 forward
(tests/architectures.py). Run: python benchmarks/model_matrix.py > docs/models.md
"""

import importlib
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from architectures import LARGEST_ERROR, LARGEST_LOSS_ERROR, Row, architecture_row

HEAD = """# Models

What was tried, and what came of it. Printed by `python benchmarks/model_matrix.py`; `make test` checks a part of each
table, `make test-full` the whole.
"""  # noqa: E501
ARCHITECTURES = """## Architectures

Every causal LM of transformers {version}, tiny and with random weights. Its scores (shared prompts, texts longer than a
sliding window, eager and SDPA attention where there are both) are held against a float64 forward of the same ids by
transformers alone, its training loss against the float64 mean over labelled tokens. **Right** means at most
{error:g} nats off per response and {loss:g} of the loss; the largest difference found stands beside it.

- *right*: every distinct prefix is computed once.
- *right (plain way)*: each response is computed with its whole prompt, as its attention takes no mask of ours, or
  keeps a state; slower, as right.
- *right (one at a time)*: what else is in a batch changes a row, so that none is.
- *refused*: one message, and nothing is scored or trained.
- *untested*: cannot be tried tiny and offline. Nothing is promised, but the checks below run on every model.

Whatever the table says, each model is tried when it is loaded, on made-up texts: what follows a token may not change
its logits, scores must be those of its plain forward pass, and, in training, so must the losses. Where training passes
over the same tokens differ although every dropout is 0, the log and the run's manifest (`noise_nats`) say so.

{counts}

| `model_type` | class | result | largest error, nats | loss, relative | |
| --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def main() -> None:
    """Print the page."""
    logging.disable(logging.ERROR)
    rows = [architecture_row(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    print(HEAD)
    print(
        ARCHITECTURES.format(
            version=version("transformers"),
            error=LARGEST_ERROR,
            loss=LARGEST_LOSS_ERROR,
            counts=_counts(rows),
        )
    )
    for row in rows:
        print(_line(row))
    _print_table("Adapters", ("form", "result", ""), _rows("adapter_forms", "adapter_rows"))
    _print_table(
        "Formats and tokenizers",
        ("tokenizer", "result", ""),
        _rows("tokenizer_matrix", "tokenizer_rows"),
    )


def _counts(rows: Sequence[Row]) -> str:
    results = [row.result for row in rows]
    return (
        ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(sorted(results)))
        + "."
    )


def _line(row: Row) -> str:
    figures = (
        [f"{row.error_nats:.1g}", f"{row.loss_error:.1g}"]
        if row.result.startswith("right")
        else ["", ""]
    )
    note = row.note.replace("|", "\\|").replace("\n", " ")
    return (
        f"| `{row.model_type}` | {row.class_name} | {row.result} | {figures[0]} | {figures[1]} | "
        f"{note} |"
    )


def _rows(module: str, function: str) -> Iterable[Sequence[str]]:
    """What a matrix of the tests says of itself."""
    return list(getattr(importlib.import_module(module), function)())


def _print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n## {title}\n")
    for cells in (head, ["---"] * len(head), *rows):
        print(
            "|", " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells), "|"
        )


if __name__ == "__main__":
    main()
