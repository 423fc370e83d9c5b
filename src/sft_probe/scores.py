"""Score rows, the one table that everything else is made from: one row per run, step, split,
category, doc and source."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from sft_probe.errors import UserError
from sft_probe.files import new_file

if TYPE_CHECKING:
    from sft_probe.scoring.targets import Distances, TokenColumns

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
        ("logprob_with_eos", pa.float64()),
        ("token_logprobs", pa.list_(pa.float32())),
        ("token_max_logprobs", pa.list_(pa.float32())),
        ("token_entropies", pa.list_(pa.float32())),
        ("token_ranks", pa.list_(pa.int32())),
        ("token_norms", pa.list_(pa.float32())),
        ("token_kl_forward", pa.list_(pa.float32())),
        ("token_kl_reverse", pa.list_(pa.float32())),
        ("token_reference_ranks", pa.list_(pa.int32())),
        ("is_greedy", pa.bool_()),
        ("weights_dtype", pa.string()),
        ("compute_dtype", pa.string()),
        ("source", pa.string()),
    ]
)
"""Columns of a score row in order. `docs/data.md` says what each means."""
KEY = ("run", "source", "step", "split", "category", "doc_id")
"""Columns that no two score rows have in common."""
TOKEN_COLUMNS = ("token_max_logprobs", "token_entropies", "token_ranks", "token_norms")
"""Columns of the distribution at each token; null in rows that were scored without them."""
DISTANCE_COLUMNS = ("token_kl_forward", "token_kl_reverse", "token_reference_ranks")
"""Columns of the distance from a reference at each token; null in rows that were scored without
one."""
_MAY_LACK = (*TOKEN_COLUMNS, *DISTANCE_COLUMNS, "logprob_with_eos")
"""Columns that files of earlier versions do not have."""
_DIGITS = 6
_OF_DOC = ("category", "split", "doc_id", "conversation_id", "prompt_format", "num_bytes")


def score_row(
    columns: dict[str, Any],
    doc: dict[str, Any],
    *,
    logprob: float,
    token_logprobs: list[float],
    first: int,
    logprob_eos: float | None,
    is_greedy: bool,
    token_columns: "TokenColumns | None" = None,
    distances: "Distances | None" = None,
) -> dict[str, Any]:
    """Build one score row; log-probs are in nats.

    Args:
        columns: the columns of the run, the step and the source.
        doc: category, split, ids, prompt format and size of the response.
        logprob: sum over the response without the terminator.
        token_logprobs: [num_tokens]
        first: index of the first token that holds more than white space.
        logprob_eos: log-prob of the terminator after the response.
        is_greedy: whether greedy decoding would write the response.
        token_columns: `TOKEN_COLUMNS`, each [num_tokens]; they are rounded to 6 digits.
        distances: `DISTANCE_COLUMNS`, likewise.
    """
    more: dict[str, Any] = dict.fromkeys([*TOKEN_COLUMNS, *DISTANCE_COLUMNS])
    for names, columns_of in ((TOKEN_COLUMNS, token_columns), (DISTANCE_COLUMNS, distances)):
        for name, values in zip(names, columns_of or (), strict=columns_of is not None):
            exact = values.astype(values.dtype if values.dtype.kind == "i" else float)
            more[name] = exact.round(_DIGITS).tolist()
    row = {
        **columns,
        **{name: doc[name] for name in _OF_DOC},
        "num_tokens": len(token_logprobs),
        "logprob": logprob,
        "logprob_first": token_logprobs[first],
        "logprob_eos": logprob_eos,
        "logprob_with_eos": None,
        "token_logprobs": token_logprobs,
        "is_greedy": is_greedy,
        **more,
    }
    return {name: row[name] for name in SCHEMA.names}


def read_scores(paths: Sequence[Path]) -> pa.Table:
    """Read the score rows of JSONL files, some of which may be empty, into one table in the order
    of the files.

    Raises:
        UserError: a file is damaged or was written by another version.
    """
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    tables = [SCHEMA.empty_table()]
    for path in paths:
        try:
            if path.stat().st_size:
                table = pyarrow.json.read_json(path, parse_options=options).select(SCHEMA.names)
                tables.append(table)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} holds no score rows of this version: {error}") from error
        if missing := [name for name in KEY if tables[-1][name].null_count]:
            raise UserError(
                f"{path} holds no score rows of this version: {', '.join(missing)} is missing in "
                "a row."
            )
    return pa.concat_tables(tables)


def read_scores_parquet(path: Path) -> pa.Table:
    """Read a parquet file of score rows, of an earlier version too. Raises `UserError` where it
    holds anything else."""
    try:
        table = pyarrow.parquet.read_table(path)
        for name in _MAY_LACK:
            if name not in table.column_names:
                nulls = pa.nulls(len(table), SCHEMA.field(name).type)
                table = table.append_column(SCHEMA.field(name), nulls)
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise UserError(
            f"{path} is no parquet file of score rows ({error}); docs/data.md lists their columns."
        ) from error


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    with new_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
