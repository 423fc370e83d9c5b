"""The live probe in a training loop of your own: score the model as it is, record the rows."""

import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from sft_probe.errors import UserError, first_few
from sft_probe.files import make_dir, read_object, write_json, write_jsonl
from sft_probe.models import check_window
from sft_probe.probe_set import DEFAULT_PROBE_SET, ProbeSet, load_probe_set
from sft_probe.prompts import (
    EncodedDoc,
    PromptFormat,
    encode_probe_set,
    first_visible,
    resolve_format,
    terminator_id,
)
from sft_probe.scores import score_row
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import FittingScorer, Score, default_max_tokens
from sft_probe.train.model import (
    inner_model,
    name_of,
    num_virtual_tokens,
    score_adapted,
    weights_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE_SEED = 0
_MAX_NAMED = 5
_IDENTITY = ("probe_set_sha256", "prompt_format_source", "max_length")
"""Entries of `probe/manifest.json` that all steps of a run have in common."""


class ProbeRows(list[dict[str, Any]]):
    """Score rows of one model, and the manifest that says which texts they belong to."""

    def __init__(self, rows: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> None:
        super().__init__(rows)
        self.manifest = manifest


def score(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    probe_set: str | Path = DEFAULT_PROBE_SET,
    *,
    prompt_format: str | None = None,
    num_train: int = 0,
    max_length: int = 1024,
    max_tokens: int | None = None,
) -> ProbeRows:
    """Return the score rows of a model, as it is now, on the held-out docs of a probe set.

    For a training loop of your own; the modes of the model's modules are restored afterwards.

        if step in (0, 1, 2, 4, 8, 16):
            record("runs/mine", step, score(model, tokenizer, "my-set.jsonl"))

    `pandas.DataFrame(score(model, tokenizer))` is a table of the rows.

    Args:
        model: a causal LM of `transformers`, with a PEFT adapter or without.
        tokenizer: the model's tokenizer.
        probe_set: path, hub id or embedded name.
        prompt_format: hh, chat, plain or a Jinja file; default: the probe set's own.
        num_train: besides the held-out docs, score a fixed sample of this many of the train split.
        max_length: tokens of prompt, response and terminator; longer docs are left out and named.
        max_tokens: the token budget of one forward pass; default: by device.

    Raises:
        UserError: the probe set or the format is unusable, or the model cannot be scored.
    """
    inner = inner_model(model)
    check_window(max_length + num_virtual_tokens(model), inner)
    texts = EncodedTexts(
        load_probe_set(str(probe_set)), tokenizer, prompt_format, max_length, num_train
    )
    texts.report_dropped()
    scorer = FittingScorer(
        max_tokens or default_max_tokens(str(inner.device)), max_length, with_columns=True
    )
    columns = {
        **dict.fromkeys(("run", "train_category", "order_seed", "step", "examples_seen")),
        **{"tokens_seen": None, "epoch": None, "model": name_of_model(inner), "source": "live"},
        **dtypes_of(model),
    }
    manifest = {"model": columns["model"], "dtype": name_of(inner.dtype), **texts.manifest}
    return ProbeRows(score_docs(texts.docs, model, scorer, columns), manifest)


def record(
    run: str | Path,
    step: int,
    rows: Sequence[dict[str, Any]],
    *,
    train_category: str | None = None,
    epoch: float = 0.0,
    examples_seen: int | None = None,
    tokens_seen: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the rows of one step to `RUN/probe/step_NNNNNN.jsonl` and return that path.

    Args:
        run: the run directory, which `sft-probe analyze`, `plot` and `report` read.
        step: the number of updates made so far.
        rows: from `score`.
        train_category: the category that is trained on, if it is one of the probe set.
        epoch: passes over the training data so far.
        examples_seen: training examples so far, over all processes.
        tokens_seen: tokens trained on so far.
        overwrite: replace the rows of this step if there are any, as a resumed loop does.

    Raises:
        UserError: the run has rows of this step already, or rows of another probe set, format or
            length.
    """
    folder = make_dir(Path(run) / "probe")
    if fault := fault_of_other_rows(folder, getattr(rows, "manifest", {})):
        raise UserError(fault)
    if _path(folder, step).exists() and not overwrite:
        raise UserError(
            f"{folder} has rows of step {step} already. Choose another run directory, or pass "
            "overwrite=True."
        )
    columns = {
        "run": Path(run).resolve().name,
        "step": step,
        "train_category": train_category,
        "epoch": epoch,
        "examples_seen": examples_seen,
        "tokens_seen": tokens_seen,
    }
    if isinstance(rows, ProbeRows):
        names = {name: columns[name] for name in ("run", "train_category")}
        write_json(folder / "manifest.json", {**rows.manifest, **names})
    write_step(folder, step, [{**row, **columns} for row in rows])
    return _path(folder, step)


class EncodedTexts:
    """The docs of a probe set as token ids, and what the manifest says of them."""

    def __init__(
        self,
        probe_set: ProbeSet,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_format: str | None,
        max_length: int,
        num_train: int,
        *,
        recorded: str | None = None,
        is_collective: bool = False,
    ) -> None:
        given = prompt_format or probe_set.prompt_format
        found = resolve_format(given, tokenizer, probe_set.docs, recorded)
        source = [found.source]
        if is_collective:
            broadcast_object_list(source)  # each rank may have read another time
        resolved = PromptFormat(source[0], tokenizer)
        kept, self.dropped = encode_probe_set(probe_set, resolved, tokenizer, max_length)
        train = [doc for doc in kept if doc.doc.split == "train"]
        sample = random.Random(_SAMPLE_SEED).sample(train, min(num_train, len(train)))  # noqa: S311
        chosen = [doc for doc in kept if doc.doc.split == "heldout"] + sample
        if not chosen:
            raise UserError(
                f"no doc of {probe_set.source} can be scored; {len(self.dropped)} were left out."
            )
        end_id = terminator_id(resolved.name, tokenizer)
        self.docs = [EncodedProbe(doc, resolved.name, tokenizer, end_id) for doc in chosen]
        self.manifest = {
            "probe_set": probe_set.name,
            "probe_set_source": probe_set.absolute_source,
            "probe_set_sha256": probe_set.sha256,
            "prompt_format": resolved.name,
            "prompt_format_source": resolved.source,
            "terminator_id": end_id,
            "max_length": max_length,
            "categories": list(probe_set.categories),
            "doc_ids": [doc.doc_id for doc in self.docs],
            "doc_sha256": {doc.doc.doc_id: doc.doc.sha256 for doc in chosen},
            "dropped": [vars(drop) for drop in self.dropped],
        }

    def report_dropped(self) -> None:
        """Log which docs are not scored, and why."""
        for drop in self.dropped:
            log.warning("not probed: %s: %s", drop.doc_id, drop.reason)


class EncodedProbe:
    """One doc: its items, and the rows that their scores become."""

    def __init__(
        self,
        encoded: EncodedDoc,
        format_name: str,
        tokenizer: "PreTrainedTokenizerBase",
        end_id: int,
    ) -> None:
        self.doc_id = encoded.doc.doc_id
        self.items = [
            Continuation(encoded.prompt_ids, ids, end_id)
            for ids in encoded.continuation_ids.values()
        ]
        self._columns = [
            {
                "category": category,
                "split": encoded.doc.split,
                "doc_id": self.doc_id,
                "conversation_id": encoded.doc.conversation_id,
                "prompt_format": format_name,
                "num_bytes": len(response.encode()),
            }
            for category, response in encoded.doc.responses.items()
        ]
        self._first = [first_visible(tokenizer, ids) for ids in encoded.continuation_ids.values()]

    def rows(self, columns: dict[str, Any], scores: Iterator[Score]) -> list[dict[str, Any]]:
        """Return one row for each item, taking as many scores."""
        mine = itertools.islice(scores, len(self.items))
        return [
            score_row(
                columns,
                doc,
                logprob=score.logprob,
                token_logprobs=score.token_logprobs.tolist(),
                first=first,
                logprob_eos=score.logprob_eos,
                is_greedy=score.is_greedy,
                token_columns=score.columns,
            )
            for doc, first, score in zip(self._columns, self._first, mine, strict=True)
        ]


def score_docs(
    docs: Sequence[EncodedProbe], model: Any, scorer: FittingScorer, columns: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the score rows of some docs, with these columns of run and step in each."""
    with evaluating(model):
        found = dict(score_adapted(scorer, model, [item for doc in docs for item in doc.items]))
    scores = iter([found[index] for index in range(len(found))])
    return [row for doc in docs for row in doc.rows(columns, scores)]


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"


def write_step(folder: Path, step: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rows of a step, name those that are NaN or infinite, and return the others."""
    scored: list[dict[str, Any]] = []
    faults: list[dict[str, Any]] = []
    for row in rows:
        (scored if math.isfinite(row["logprob"] + row["logprob_eos"]) else faults).append(row)
    if faults:
        names = first_few((f"{row['doc_id']} {row['category']}" for row in faults), _MAX_NAMED)
        log.error("step %d: %d logits are NaN or infinite: %s", step, len(faults), names)
        keys = ("step", "split", "category", "doc_id")
        notes = [{**{key: row[key] for key in keys}, "reason": "NaN or inf"} for row in faults]
        write_jsonl(folder / f"faults_{step:06d}.jsonl", notes)
    write_jsonl(_path(folder, step), scored)
    return scored


def fault_of_other_rows(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Return in which way the rows of `folder` are not comparable with those of this manifest."""
    path = folder / "manifest.json"
    earlier = read_object(path) if path.exists() else {}
    names = [name for name in _IDENTITY if name in manifest.keys() & earlier.keys()]
    differing = [name for name in names if earlier[name] != manifest[name]]
    if not differing or not list(folder.glob("step_*.jsonl")):
        return None
    return (
        f"{folder} has rows of another {differing[0].rpartition('_')[0].replace('_', ' ')}. "
        "Choose another run directory."
    )


def name_of_model(model: Any) -> str:
    """Return the path or hub id that the model was loaded from, else its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def dtypes_of(model: Any) -> dict[str, str]:
    """Return the columns of a score row that tell in which dtype it was computed."""
    return {
        "weights_dtype": weights_dtype(model),
        "compute_dtype": name_of(inner_model(model).dtype),
    }


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in eval mode for the length of a block, computing in its own dtype.

    Under mixed precision (`bf16`, `fp16`) accelerate has put an autocast into the model's forward,
    unlike a sweep's.
    """
    modes = {module: module.training for module in model.modules()}
    own = vars(model)
    forward = own.get("forward")
    model.eval()
    if "_original_forward" in own:  # set by accelerate, for its own `unwrap_model`
        own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        if "_original_forward" in own:
            own["forward"] = forward
        for module, mode in modes.items():
            module.training = mode
