"""The directory of an imported run: what `sft-probe import` writes and `load_recording` reads."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from sft_probe.analysis.stats.imports.choose import import_runs
from sft_probe.analysis.stats.imports.imported import Imported
from sft_probe.analysis.stats.places import IMPORT_MANIFEST, is_import
from sft_probe.errors import UserError
from sft_probe.files import make_dir, read_jsonl, read_object, write_json, write_jsonl, write_text
from sft_probe.scores import read_scores_parquet, write_parquet

_REQUIRED = {
    "name": str,
    "form": str,
    "step_unit": str,
    "taken": list,
    "notes": list,
    "settings": dict,
}


def write_import(run: Imported, source: Path, out: Path) -> Path:
    """Write a run as a directory, its manifest last, and return the directory.

    Raises:
        UserError: the directory holds anything else than an imported run.
    """
    if out.exists() and not is_import(out) and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no imported run. Choose another --out.")
    make_dir(out)
    for name in (IMPORT_MANIFEST, "scores.parquet", "means.csv", "benchmarks.csv", "texts.jsonl"):
        (out / name).unlink(missing_ok=True)
    if run.rows is not None:
        write_parquet(out / "scores.parquet", run.rows)
    for name, table in (("means", run.means), ("benchmarks", run.benchmarks)):
        if table is not None:
            write_text(out / f"{name}.csv", table.to_csv(index=False))
    if run.texts:
        docs = (
            {"doc_id": doc_id, "prompt": run.prompts.get(doc_id), "responses": responses}
            for doc_id, responses in run.texts.items()
        )
        write_jsonl(out / "texts.jsonl", docs)
    manifest = {name: getattr(run, name) for name in ("name", "model", *_REQUIRED)}
    write_json(out / IMPORT_MANIFEST, {**manifest, "source": str(source.resolve())})
    return out


def import_to(path: Path, out: Path, texts: Path | None = None) -> Iterator[str]:
    """Write the runs of a file or directory, and yield what each was taken for.

    Args:
        path: what `import_runs` reads.
        out: directory of the run, or of a run for each of several models.
        texts: of the docs of a `.npy`.
    """
    runs = import_runs(path, texts)
    for run in runs:
        folder = out / re.sub(r"[^\w.-]+", "_", run.name) if len(runs) > 1 else out
        write_import(run, path, folder)
        yield "\n".join(
            [
                f"{folder}: {run.form}",
                *(f"  {line}" for line in run.taken),
                *(f"! {note}" for note in run.notes),
            ]
        )


def read_import(directory: Path) -> Imported:
    """Read the directory of an imported run. Raises `UserError` where a file has faults."""
    manifest = read_object(directory / IMPORT_MANIFEST, _REQUIRED, {"model": str | None})
    texts_path, scores = directory / "texts.jsonl", directory / "scores.parquet"
    docs = read_jsonl(texts_path) if texts_path.is_file() else []
    return Imported(
        name=directory.resolve().name,
        form=manifest["form"],
        model=manifest.get("model"),
        step_unit=manifest["step_unit"],
        taken=tuple(manifest["taken"]),
        notes=tuple(manifest["notes"]),
        settings=manifest["settings"],
        rows=read_scores_parquet(scores) if scores.is_file() else None,
        means=_table(directory / "means.csv"),
        benchmarks=_table(directory / "benchmarks.csv"),
        texts={doc["doc_id"]: doc["responses"] for doc in docs},
        prompts={doc["doc_id"]: doc["prompt"] for doc in docs},
    )


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path, dtype={"task": str, "filter": str}) if path.is_file() else None
