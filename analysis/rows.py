"""Score rows: one per run, step, split, category and doc, and the parquet file of all of them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from sft_probe.analysis.checkpoints import Checkpoint
from sft_probe.files import fsync_path

if TYPE_CHECKING:
    from sft_probe.tasks.lm import ProbeScore

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


def score_row(
    doc: dict[str, Any], score: "ProbeScore", first: int, checkpoint: Checkpoint, run: dict[str, Any]
) -> dict[str, Any]:
    """One row.

    Args:
        doc: of a `sft_probe_*` task.
        score: what the model says of its response.
        first: index of the first token that holds more than white space.
        checkpoint: the weights.
        run: the columns that do not change within a sweep.
    """
    return {
        **run,
        "step": checkpoint.step,
        "examples_seen": checkpoint.examples_seen,
        "tokens_seen": checkpoint.tokens_seen,
        "epoch": checkpoint.epoch,
        **{name: doc[name] for name in ("category", "split", "doc_id", "conversation_id", "prompt_format")},
        "num_tokens": score.num_tokens,
        "num_bytes": doc["num_bytes"],
        "logprob": score[0],
        "logprob_first": score.token_logprobs[first],
        "logprob_eos": score.logprob_eos,
        "token_logprobs": score.token_logprobs,
        "is_greedy": score[1],
        "weights_dtype": checkpoint.weights_dtype,
        "source": "lm_eval",
    }


def read_rows(paths: list[Path]) -> pa.Table:
    """The rows of many JSONL files, some of them empty, in the order of the files, as one table with `SCHEMA`."""
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    tables = [pyarrow.json.read_json(path, parse_options=options) for path in paths if path.stat().st_size]
    return pa.concat_tables([table.select(SCHEMA.names) for table in tables]) if tables else SCHEMA.empty_table()


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a parquet file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    fsync_path(temporary)
    temporary.replace(path)
