"""Score rows: one per run, step, split, category and doc, and the parquet file of all of them."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from sft_probe.analysis.checkpoints import Checkpoint
from sft_probe.files import fsync_path

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("model", pa.string()),
        ("train_category", pa.string()),
        ("order_seed", pa.int64()),
        ("step", pa.int64()),
        ("examples_seen", pa.int64()),
        ("tokens_seen", pa.int64()),
        ("epoch", pa.float64()),
        ("category", pa.string()),
        ("split", pa.string()),
        ("doc_id", pa.string()),
        ("conversation_id", pa.string()),
        ("prompt_format", pa.string()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("logprob", pa.float64()),
        ("logprob_first", pa.float64()),
        ("logprob_eos", pa.float64()),
        ("token_logprobs", pa.list_(pa.float32())),
        ("is_greedy", pa.bool_()),
        ("weights_dtype", pa.string()),
        ("compute_dtype", pa.string()),
        ("source", pa.string()),
    ]
)


def score_row(sample: dict[str, Any], checkpoint: Checkpoint, run: dict[str, Any]) -> dict[str, Any]:
    """One row from a sample that lm-eval logged. `run` gives the columns that do not change within a sweep.

    The stock `hf` model knows only sums: `logprob_first`, `logprob_eos` and `token_logprobs` are null.
    """
    doc = sample["doc"]
    logprob, is_greedy = sample["resps"][0][0]
    return {
        **run,
        "step": checkpoint.step,
        "examples_seen": checkpoint.examples_seen,
        "tokens_seen": checkpoint.tokens_seen,
        "epoch": checkpoint.epoch,
        **{name: doc[name] for name in ("category", "split", "doc_id", "conversation_id", "prompt_format")},
        "num_tokens": doc["num_tokens"],
        "num_bytes": doc["num_bytes"],
        "logprob": logprob,
        "logprob_first": None,
        "logprob_eos": None,
        "token_logprobs": None,
        "is_greedy": is_greedy,
        "weights_dtype": checkpoint.weights_dtype,
        "source": "lm_eval",
    }


def read_rows(paths: list[Path]) -> pa.Table:
    """The rows of many JSONL files, in the order of the files, as one table with `SCHEMA`."""
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    tables = [pyarrow.json.read_json(path, parse_options=options) for path in paths]
    return pa.concat_tables([table.select(SCHEMA.names) for table in tables]) if tables else SCHEMA.empty_table()


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a parquet file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    fsync_path(temporary)
    temporary.replace(path)
