"""What a sweep scores, and how: taken from the run, fixed at first use, never mixed."""

import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sft_probe import __version__
from sft_probe.analysis.sweep.checkpoints import Checkpoint, main_source
from sft_probe.analysis.sweep.live_model import active_part, model_config, tokenizer_of
from sft_probe.analysis.sweep.parts import chosen_inputs
from sft_probe.analysis.sweep.request import SweepRequest, run_manifest
from sft_probe.errors import UserError, first_few
from sft_probe.files import make_dir, read_object, remove_leftovers, write_json
from sft_probe.models import check_weights_fit, load_tokenizer, local_folder
from sft_probe.probe_set import ProbeSet
from sft_probe.prompts import (
    DroppedDoc,
    EncodedDoc,
    PromptFormat,
    encode_probe_set,
    resolve_format,
    same_format,
    terminator_id,
)
from sft_probe.scoring.score import default_max_tokens
from sft_probe.weights import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 1024
_MAX_NAMED = 5
_FIXED = (
    "probe_set_sha256",
    "prompt_format",
    "tokenizer_sha256",
    "terminator_id",
    "items_sha256",
    "max_length",
    "dtype",
    "step_unit",
    "model_config",
)
_SWEEP_MANIFEST = {"max_tokens": int}
_SWEEP_MANIFEST_OPTIONAL = {"model": str | None, "run": str, "sources": list, "model_config": dict}


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What all steps of a sweep share."""

    run_columns: dict[str, Any]
    """`run model train_category order_seed compute_dtype` of every row."""
    probe_set: ProbeSet
    prompt_format: str
    """What gives the format again: a name or a path, with all that was chosen for the run."""
    format_name: str
    """As it stands in rows."""
    tokenizer: "PreTrainedTokenizerBase"
    decided_by: Checkpoint
    """The first one whose tokenizer and config can be read and whose weights fit; they hold for
    all."""
    tokenizer_source: tuple[str, str]
    """Name or path, and revision."""
    model_config: dict[str, Any]
    """That of all checkpoints."""
    max_length: int
    docs: list[EncodedDoc]
    dropped: list[DroppedDoc]


def resolve_settings(request: SweepRequest, checkpoints: Sequence[Checkpoint]) -> SweepSettings:
    """Fill in what the request leaves open from the run's manifest; tokenizer and config are those
    of a checkpoint.

    Args:
        request: what the user asked for.
        checkpoints: the first one that can be read decides; the others are reported when it is
            their turn.

    Raises:
        UserError: training has not finished, the probe set has changed or has another format than
            the run, no checkpoint can be read, or no doc fits.
    """
    manifest = run_manifest(request)
    earlier = sweep_manifest(request.directory) or {}
    probe_set, given = chosen_inputs(request)
    decided_by, tokenizer_source, tokenizer, config = _first_readable(checkpoints)
    recorded = manifest.get("prompt_format_source") or _recorded_format(request.directory)
    prompt_format = resolve_format(given, tokenizer, probe_set.docs, recorded)
    _check_against_run(manifest, probe_set, prompt_format, tokenizer, request)
    max_length = request.max_length or manifest.get("max_length") or DEFAULT_MAX_LENGTH
    docs, dropped = encode_probe_set(probe_set, prompt_format, tokenizer, max_length)
    if not docs:
        raise UserError(
            f"no doc of {probe_set.source} can be scored; the first one: {dropped[0].doc_id}: "
            f"{dropped[0].reason}"
        )
    return SweepSettings(
        run_columns={
            "run": earlier.get("run") or request.directory.resolve().name,
            "model": manifest.get("model")
            or earlier.get("model")
            or request.model
            or main_source(checkpoints),
            "train_category": manifest.get("train_category"),
            "order_seed": manifest.get("order_seed"),
            "compute_dtype": request.dtype,
        },
        probe_set=probe_set,
        prompt_format=prompt_format.source,
        format_name=prompt_format.name,
        tokenizer=tokenizer,
        decided_by=decided_by,
        tokenizer_source=tokenizer_source,
        model_config=config,
        max_length=max_length,
        docs=docs,
        dropped=dropped,
    )


_Readable = tuple[Checkpoint, tuple[str, str], "PreTrainedTokenizerBase", dict[str, Any]]


def _first_readable(checkpoints: Sequence[Checkpoint]) -> _Readable:
    """Return the first checkpoint whose tokenizer and config can be read, and these.

    One whose weights do not fit its config is passed over, unless there is no other: such a config
    is not to be that of all. Weights that are gone from every place still have their scores.
    """
    faults = []
    without_weights: _Readable | None = None
    for checkpoint in checkpoints:
        try:
            source = tokenizer_of(checkpoint)
            config = model_config(checkpoint.model, checkpoint.revision)
            readable = (checkpoint, source, load_tokenizer(*source), config)
            without_weights = without_weights or readable
            folder = local_folder(checkpoint.model, checkpoint.revision)
            check_weights_fit(local_folder(*base_of(folder, checkpoint.revision)))
            return readable
        except (
            Exception
        ) as error:  # of whatever library reads it; one bad checkpoint must not stop the others
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            faults.append(f"step {checkpoint.step}: {name}{textwrap.shorten(str(error), 300)}")
    if without_weights:
        return without_weights
    raise UserError("no checkpoint can be scored:\n" + first_few(faults, _MAX_NAMED, "\n"))


def _recorded_format(directory: Path) -> str | None:
    """Return the format of an earlier sweep into this directory, so that a clock or a rule in it
    stays what it was."""
    earlier = sweep_manifest(directory) or {}
    return earlier.get("prompt_format_source") or earlier.get("prompt_format")


def sweep_manifest(directory: Path) -> dict[str, Any] | None:
    """Return what earlier sweeps of a directory have fixed; `None` before the first one."""
    path = directory / "sweep" / "manifest.json"
    return read_object(path, _SWEEP_MANIFEST, _SWEEP_MANIFEST_OPTIONAL) if path.exists() else None


def _check_against_run(
    manifest: dict[str, Any],
    probe_set: ProbeSet,
    prompt_format: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    request: SweepRequest,
) -> None:
    if not manifest:
        return
    own_format = prompt_format
    if request.probe_set:
        own_format = resolve_format(
            probe_set.prompt_format, tokenizer, probe_set.docs, prompt_format.source
        )
    for name in (prompt_format.name, own_format.name):
        if not same_format(manifest["prompt_format"], name):
            raise UserError(
                "the prompt format differs: the run was trained with "
                f"{manifest['prompt_format']!r}, the sweep would "
                f"score {name!r}. One run has one format; use a probe set and a --prompt_format "
                "that match."
            )
    if not request.probe_set and probe_set.sha256 != manifest["request"].get("probe_set_sha256"):
        raise UserError(
            f"the probe set {probe_set.source} has changed since the run was trained on it."
        )


def fix_settings(settings: SweepSettings, request: SweepRequest) -> int:
    """Write `sweep/manifest.json` at first use; later sweeps must agree with it. Returns the token
    budget.

    Raises:
        UserError: names what differs from the steps already scored.
    """
    path = make_dir(request.directory / "sweep") / "manifest.json"
    manifest = _manifest(settings, request)
    with FileLock(path.with_name(".lock")):
        remove_leftovers(path.parent)
        if not path.exists():
            write_json(path, manifest)
        earlier = sweep_manifest(request.directory) or {}
    earlier.setdefault("step_unit", manifest["step_unit"])  # of an earlier version
    earlier["model_config"] = active_part(
        earlier.get("model_config")
    )  # an earlier version kept dropouts too
    differing = [_difference(name, earlier.get(name), manifest[name]) for name in _FIXED]
    differing = [difference for difference in differing if difference]
    if differing:
        raise UserError(
            f"{path.parent} holds steps scored otherwise: {'; '.join(differing)}. A sweep never "
            "mixes them: delete "
            "that directory, or sweep into another one."
        )
    if request.max_tokens:
        record(request.directory, max_tokens=request.max_tokens)
    return request.max_tokens or int(earlier["max_tokens"])


def _manifest(settings: SweepSettings, request: SweepRequest) -> dict[str, Any]:
    items = [(doc.doc.doc_id, doc.prompt_ids, doc.continuation_ids) for doc in settings.docs]
    return {
        **settings.run_columns,
        "step_unit": settings.decided_by.step_unit,
        "probe_set": settings.probe_set.name,
        "probe_set_source": settings.probe_set.absolute_source,
        "probe_set_sha256": settings.probe_set.sha256,
        "prompt_format": settings.format_name,
        "prompt_format_source": settings.prompt_format,
        "tokenizer_sha256": _tokenizer_sha256(settings.tokenizer),
        "terminator_id": terminator_id(settings.format_name, settings.tokenizer),
        "items_sha256": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
        "max_length": settings.max_length,
        "max_tokens": request.max_tokens or default_max_tokens(request.resolved_device),
        "dtype": settings.run_columns["compute_dtype"],
        "categories": list(settings.probe_set.categories),
        "num_docs": {
            split: sum(doc.doc.split == split for doc in settings.docs)
            for split in ("train", "heldout")
        },
        "doc_ids": [doc.doc.doc_id for doc in settings.docs],
        "doc_sha256": {doc.doc.doc_id: doc.doc.sha256 for doc in settings.docs},
        "dropped": [vars(drop) for drop in settings.dropped],
        "model_config": settings.model_config,
        "sft_probe_version": __version__,
    }


def record(directory: Path, **values: Any) -> None:
    """Put other values into `sweep/manifest.json`, such as a token budget, with which sums change
    by about 1e-6."""
    path = directory / "sweep" / "manifest.json"
    with FileLock(path.with_name(".lock")):
        write_json(path, {**(sweep_manifest(directory) or {}), **values})


def _tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    parts = [tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _difference(name: str, earlier: Any, now: Any) -> str:
    if not isinstance(earlier, dict) or earlier == now:
        return "" if earlier == now else f"{name} ({earlier} there, {now} now)"
    keys = [key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key)]
    return "; ".join(
        _difference(f"{name}.{key}", earlier.get(key), now.get(key)) for key in sorted(keys)[:5]
    )
