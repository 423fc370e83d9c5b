"""What was recorded of a run, from wherever it lies: a run directory, score rows, lm-eval's files,
a table of means."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from sft_probe.analysis.stats.imports.choose import import_runs
from sft_probe.analysis.stats.imports.imported import Imported
from sft_probe.analysis.stats.imports.store import read_import
from sft_probe.analysis.stats.measures import Cube, add_measures, cube
from sft_probe.analysis.stats.places import kind_of, named_path
from sft_probe.errors import UserError, first_few, unknown
from sft_probe.files import find, read_object
from sft_probe.models import EMBEDDED_MODEL
from sft_probe.probe_set import CATEGORIES, EMBEDDED_PROBE_SETS, ProbeSet, load_probe_set
from sft_probe.scores import (
    DISTANCE_COLUMNS,
    KEY,
    SCHEMA,
    TOKEN_COLUMNS,
    read_scores,
    read_scores_parquet,
)

_KINDS = {
    "model": str | None,
    "train_category": str | None,
    "arguments": dict,
    "categories": list,
    "dropped": list,
    "step_unit": str,
    "probe_set": str | None,
    "probe_set_sha256": str | None,
    "doc_sha256": dict,
    "reference": str | None,
}
_MAX_NAMED = 5
_SETTING = (
    "train_data",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "dtype",
    "bf16",
    "fp16",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "max_length",
)
_DISAGREEMENT_NATS = 0.05
SPLIT_NAMES = {"heldout": "held-out prompts", "train": "prompts trained on"}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run as one source saw it: score rows of docs, or only means over docs."""

    name: str
    path: Path
    rows: pd.DataFrame
    """From `add_measures`, of one source; empty where only means are known."""
    tokens: pa.Table | None = None
    """`token_logprobs`, `TOKEN_COLUMNS` and `DISTANCE_COLUMNS`; the index of `rows` counts its
    rows."""
    means: pd.DataFrame | None = None
    """`split category step value`, where no doc is known; nats with the terminator, as they were
    published."""
    step_unit: str = "optimizer step"
    manifest: dict[str, Any] = field(default_factory=dict)
    """Of the training; empty for what was trained elsewhere."""
    probe: dict[str, Any] = field(default_factory=dict)
    """Of the sweep or live probe."""
    probe_set: ProbeSet | None = None
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Doc id to category to response."""
    prompts: dict[str, str] = field(default_factory=dict)
    benchmarks: pd.DataFrame | None = None
    generations: pd.DataFrame | None = None
    """Greedy answers, as in `sft_probe.analysis.stats.generations`."""
    stages: tuple[tuple[float, str], ...] = ()
    """Of a chain: step and name of each start of a further stage."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the numbers."""

    @property
    def train_category(self) -> str | None:
        """What the run was trained on, where that is known."""
        return self.manifest.get("train_category") or self.probe.get("train_category")

    @property
    def trained_on(self) -> str:
        """What the run was trained on, for people."""
        if self.manifest.get("objective") == "dpo":
            return "chosen over rejected (DPO)"
        return self.train_category or "?"

    def target(self, categories: Sequence[str]) -> str | None:
        """Return which of these categories holds the responses that the run was trained on; `None`
        where none does."""
        trained = str(self.train_category)
        return next(
            (name for name in (trained, trained.removesuffix("_no_prompt")) if name in categories),
            None,
        )

    @property
    def model(self) -> str:
        """Name of the model that was trained."""
        return str(self.manifest.get("model") or self.probe.get("model") or "?")

    @property
    def setting(self) -> str:
        """What repeats of a run have in common: all that is known of them but the seeds and the
        length of training."""
        arguments = self.manifest.get("arguments", {})
        trained = [arguments.get(name) for name in _SETTING]
        probed = [self.probe.get(name) for name in ("probe_set_sha256", "prompt_format", "dtype")]
        return json.dumps([self.model, self.train_category, trained, probed], default=str)

    @property
    def order_seed(self) -> str:
        """Seed of the data order."""
        seed = self.manifest.get("order_seed", self.probe.get("order_seed"))
        return "?" if seed is None else str(seed)

    def has(self, measure: str) -> bool:
        """Return whether a log-prob is known: `logprob`, or `logprob_with_eos`."""
        if self.means is not None:
            return measure == "logprob_with_eos"
        return bool(self.rows[measure].notna().any())

    @property
    def vocab_size(self) -> int | None:
        """Number of logits of the model, where a sweep recorded its config."""
        config = self.probe.get("model_config") or {}
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return int(size) if size else None

    def sums(self, measure: str) -> str:
        """Say what is in the sums of a measure."""
        if self.means is not None:
            return "as published"
        return "with the terminator" if measure == "logprob_with_eos" else "without the terminator"

    @property
    def splits(self) -> list[str]:
        """Held-out prompts first."""
        frame = self.rows if self.means is None else self.means
        return sorted(frame["split"].unique(), key=["heldout", "train"].index)

    def categories(self, split: str) -> list[str]:
        """Return the categories with rows, in the order of the probe set, else the standard one."""
        frame = self.rows if self.means is None else self.means
        present = list(dict.fromkeys(frame.loc[frame["split"] == split, "category"]))
        order = list(self.probe.get("categories") or CATEGORIES)
        return [name for name in order if name in present] + [
            name for name in present if name not in order
        ]

    def cube(self, split: str, categories: Sequence[str] | None = None) -> Cube:
        """Return arrays over docs of one split."""
        rows = self.rows[self.rows["split"] == split]
        names = list(categories or self.categories(split))
        return cube(rows[rows["category"].isin(names)], names, self.texts)


def load_recordings(paths: Sequence[Path]) -> list[Recording]:
    """Read every run, and name it as in `NAME=RUN`; equal names are numbered.

    Raises:
        UserError: a path holds nothing that can be read; the message names it.
    """
    recordings = []
    for name, path in map(named_path, paths):
        recording = load_recording(path)
        recordings.append(replace(recording, name=name) if name else recording)
    names = [recording.name for recording in recordings]
    return [
        replace(item, name=f"{item.name} ({number})") if names.count(item.name) > 1 else item
        for number, item in enumerate(recordings, start=1)
    ]


def load_recording(path: Path) -> Recording:
    """Read a run directory, a parquet file of score rows, a directory of lm-eval's results, or
    means."""
    kind = kind_of(path)
    if kind == "rows":
        return _of_rows(path, path.parent, read_scores_parquet(path))
    if kind == "import":
        return _of_import(path, [read_import(path)])
    if kind == "run":
        rows = find(path, "sweep/step_*/*/rows.jsonl") or find(path, "probe/step_*.jsonl")
        return _of_rows(path, path, read_scores(rows))
    if kind == "table":
        return _of_rows(path, path, read_scores_parquet(path / "scores.parquet"))
    return _of_import(path, import_runs(path))


def _of_import(path: Path, runs: Sequence[Imported]) -> Recording:
    """Return what an import has read as a recording."""
    if len(runs) > 1:
        raise UserError(
            f"{path} holds {len(runs)} models: `sft-probe import {path} --out runs/NAME` makes a "
            "run of each."
        )
    (run,) = runs
    notes = run.notes
    if run.means is not None:
        notes = (
            "means over docs as they were published: no intervals, and the terminator may be in "
            "the sums",
            *notes,
        )
    return Recording(
        name=run.name,
        path=path,
        rows=add_measures(run.rows if run.rows is not None else SCHEMA.empty_table()),
        means=run.means,
        step_unit=run.step_unit,
        probe={**run.settings, "model": run.model, "form": run.form},
        texts=run.texts,
        prompts=run.prompts,
        benchmarks=run.benchmarks,
        notes=notes,
    )


def recording_of_rows(directory: Path, table: pa.Table) -> Recording:
    """Return what score rows of a run directory record; with the texts of its probe set, where that
    is there."""
    return _of_rows(directory, directory, table)


def _of_rows(path: Path, directory: Path, table: pa.Table) -> Recording:
    if not table.num_rows:
        raise UserError(f"{path} holds no score rows.")
    frame = add_measures(table)
    for name, known in (("split", {"heldout", "train"}), ("source", {"lm_eval", "live"})):
        if other := set(frame[name].map(str)) - known:
            raise unknown(name, min(other), sorted(known), where=str(path))
    repeated = frame.duplicated(list(KEY))
    if repeated.any():
        first = frame[repeated].iloc[0]
        raise UserError(
            f"{path}: two score rows of {', '.join(f'{name} {first[name]}' for name in KEY)}."
        )
    if frame["run"].nunique() > 1:
        raise UserError(
            f"{path} holds {frame['run'].nunique()} runs; give each in a file of its own."
        )
    source = "lm_eval" if (frame["source"] == "lm_eval").any() else "live"  # never on one curve
    manifest = _json_of(directory / "manifest.json")
    probe = _json_of(directory / ("sweep" if source == "lm_eval" else "probe") / "manifest.json")
    probe.setdefault("model", frame["model"].iloc[0])
    probe.setdefault("train_category", frame["train_category"].iloc[0])
    probe_set, set_notes = _probe_set_of(directory, manifest, probe)
    benchmarks, generations = directory / "benchmarks.csv", directory / "generations.parquet"
    rows = frame[frame["source"] == source]
    return Recording(
        name=str(frame["run"].iloc[0]),
        path=path,
        rows=rows,
        step_unit=probe.get("step_unit", "optimizer step"),
        tokens=table.select(["token_logprobs", *TOKEN_COLUMNS, *DISTANCE_COLUMNS]).combine_chunks(),
        manifest=manifest,
        probe=probe,
        probe_set=probe_set,
        texts={doc.doc_id: doc.responses for doc in probe_set.docs} if probe_set else {},
        prompts={doc.doc_id: _prompt_text(doc.messages) for doc in probe_set.docs}
        if probe_set
        else {},
        benchmarks=pd.read_csv(benchmarks) if benchmarks.is_file() else None,
        generations=pd.read_parquet(generations) if generations.is_file() else None,
        notes=(*set_notes, *_notes(directory, rows, manifest, probe, source)),
    )


def _json_of(path: Path) -> dict[str, Any]:
    return read_object(path, optional=_KINDS) if path.is_file() else {}


def _prompt_text(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _probe_set_of(
    directory: Path, manifest: dict[str, Any], probe: dict[str, Any]
) -> tuple[ProbeSet | None, list[str]]:
    """Return the probe set of the rows, or its docs that still have the same texts."""
    sources = [manifest.get("probe_set"), probe.get("probe_set_source"), probe.get("probe_set")]
    found = [source for source in sources if isinstance(source, str)]
    found += [str(directory / Path(source).name) for source in found]  # moved with the run
    hashes = probe.get("doc_sha256", {})
    for source in dict.fromkeys(found):
        if source not in EMBEDDED_PROBE_SETS and not Path(source).exists():
            continue
        probe_set = load_probe_set(source)
        if probe_set.sha256 == probe.get("probe_set_sha256", probe_set.sha256):
            return probe_set, []
        same = tuple(doc for doc in probe_set.docs if hashes.get(doc.doc_id) == doc.sha256)
        if same:
            changed = len(hashes) - len(same)
            note = f"{source} has changed: {changed} of {len(hashes)} docs have no texts here"
            return replace(probe_set, docs=same), [note] * (changed > 0)
    return None, [
        "the probe set is not here or has changed: no texts are shown, and clusters are "
        "conversations alone"
    ]


def _notes(
    directory: Path,
    rows: pd.DataFrame,
    manifest: dict[str, Any],
    probe: dict[str, Any],
    source: str,
) -> list[str]:
    notes = []
    if dropped := probe.get("dropped"):
        names = first_few((str(drop["doc_id"]) for drop in dropped), _MAX_NAMED)
        notes.append(f"{len(dropped)} docs were left out of all categories: {names}")
    for split, part in rows.groupby("split"):
        size = part["doc_id"].nunique() * part["category"].nunique() * part["step"].nunique()
        if missing := size - len(part):
            notes.append(
                f"{split}: {missing} of {size} scores are missing (NaN, or a step that is not "
                "complete)"
            )
    if dtypes := {"bfloat16", "float16"} & {
        *rows["weights_dtype"].dropna(),
        *rows["compute_dtype"].dropna(),
    }:
        notes.append(
            f"{', '.join(sorted(dtypes))} hides small changes: early steps are near-copies of the "
            "start"
        )
    model = str(manifest.get("model") or probe.get("model") or "")
    if model == EMBEDDED_MODEL:
        notes.append(
            "the model is instruction-tuned and dequantised from 4 bits: early steps may repair "
            "that"
        )
    elif any(word in model.lower() for word in ("instruct", "chat", "-it", "rlhf", "dpo")):
        notes.append("the model is instruction-tuned already, by its name")
    if probe.get("probe_set") in EMBEDDED_PROBE_SETS:
        notes.append(
            "the texts were written for the demo: it demonstrates the tool, it is no evidence"
        )
    if source == "lm_eval" and (live := find(directory, "probe/step_*.jsonl")):
        notes.append(
            f"the scores are those of the sweep; those of the live probe ({len(live)} steps) are "
            "left out, since both never share a curve"
        )
        notes += _disagreement(rows, live)
    return notes


def _disagreement(swept: pd.DataFrame, live: list[Path]) -> list[str]:
    """Say where the live probe and the sweep scored the same response at the same step and
    differ."""
    keys = ["step", "split", "category", "doc_id"]
    columns = [*keys, "logprob"]
    both = swept[columns].merge(
        read_scores(live).select(columns).to_pandas(), on=keys, suffixes=("", "_live")
    )
    largest = float((both["logprob"] - both["logprob_live"]).abs().max()) if len(both) else math.nan
    if not largest > _DISAGREEMENT_NATS:
        return []
    return [
        f"live probe and sweep differ by up to {largest:.2f} nats on {len(both)} common scores "
        "(weights in 16 bits?)"
    ]
