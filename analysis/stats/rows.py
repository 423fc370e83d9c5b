"""The parquet file of all score rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from sft_probe.errors import UserError
from sft_probe.files import new_file
from sft_probe.scores import COLUMNS

_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "list<float32>": pa.list_(pa.float32()),
}
_KEY = ("run", "step", "split", "category", "doc_id", "source")
SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])


def read_rows(paths: list[Path]) -> pa.Table:
    """The rows of many JSONL files, some of them empty, in the order of the files, as one table
    with `SCHEMA`.

    Raises:
        UserError: a file is damaged or of another version.
    """
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    tables = []
    for path in paths:
        try:
            if path.stat().st_size:
                tables.append(pyarrow.json.read_json(path, parse_options=options))
                _check_key(path, tables[-1])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} holds no score rows of this version: {error}") from error
    return (
        pa.concat_tables([table.select(SCHEMA.names) for table in tables])
        if tables
        else SCHEMA.empty_table()
    )


def _check_key(path: Path, table: pa.Table) -> None:
    """Raise `UserError` where a row does not say what it belongs to."""
    if missing := [name for name in _KEY if table[name].null_count]:
        raise UserError(
            f"{path} holds no score rows of this version: {', '.join(missing)} is missing in a row."
        )


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a parquet file atomically."""
    with new_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
