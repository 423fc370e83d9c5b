"""The doc functions of the `sft_probe_*` tasks: what lm-eval calls, by the names in the YAML
files."""

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from sft_probe.errors import UserError
from sft_probe.models import load_config, load_tokenizer
from sft_probe.probe_set import DEFAULT_PROBE_SET, Doc, ProbeSet, load_probe_set
from sft_probe.prompts import (
    DroppedDoc,
    Prompt,
    PromptFormat,
    dropped_by_faults,
    encode_probe_set,
    refused_docs,
    resolve_format,
)

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)


def load_docs(
    *,
    category: str,
    split: str,
    probe_set: str | None = None,
    prompt_format: str | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    revision: str = "main",
    max_length: int | None = None,
    **_: Any,
) -> "dict[str, datasets.Dataset]":
    """Return the docs of one category and split, for lm-eval's `custom_dataset`.

    Everything but `category` and `split` comes from `--metadata`, into which lm-eval merges the
    model's arguments. Where these name a tokenizer or a model, docs that do not fit `max_length`
    tokens are left out of all categories and named in the log, and `num_tokens` is known.

    Args:
        category: a category of the probe set.
        split: `train` or `heldout`.
        probe_set: path or id; default: the environment's SFT_PROBE_SET, else the embedded set.
        prompt_format: default: the probe set's own. What the name leaves open (see `PromptFormat`)
            is chosen by a test on all docs, where the tokenizer is known.
        tokenizer: name or path; default: `pretrained`.
        pretrained: the model's name or path.
        revision: of the tokenizer on the hub.
        max_length: tokens of prompt, response and terminator; default: the model's window.

    Raises:
        UserError: the probe set is unusable, or lacks the category, or no doc is left.
    """
    import datasets

    source = probe_set or os.environ.get("SFT_PROBE_SET") or DEFAULT_PROBE_SET
    loaded = load_probe_set(source)
    if category not in loaded.categories:
        raise UserError(
            f"the probe set {source} has no category {category!r}; it has "
            f"{', '.join(loaded.categories)}."
        )
    all_rows = _rows(
        source=source,
        sha256=loaded.sha256,
        format_name=prompt_format or loaded.prompt_format,
        tokenizer_name=tokenizer or pretrained,
        revision=revision,
        max_length=max_length,
    )
    rows = [row for row in all_rows if row["split"] == split and row["category"] == category]
    if not rows:
        raise UserError(
            f"the probe set {source} has no usable doc in the split {split}; the log names what "
            "was left out."
        )
    return {split: datasets.Dataset.from_list(rows)}


@functools.lru_cache(maxsize=2)
def _rows(
    *,
    source: str,
    sha256: str,  # noqa: ARG001 - part of the cache key: the file may have changed
    format_name: str,
    tokenizer_name: str | None,
    revision: str,
    max_length: int | None,
) -> list[dict[str, Any]]:
    probe_set = load_probe_set(source)
    prompt_format, pairs, dropped = _usable_docs(
        probe_set, format_name, tokenizer_name, revision, max_length
    )
    for drop in dropped:
        log.warning("left out of all categories: %s: %s", drop.doc_id, drop.reason)
    return [
        {
            "doc_id": doc.doc_id,
            "conversation_id": doc.conversation_id,
            "split": doc.split,
            "category": category,
            "prompt_format": prompt_format.name,
            "prompt": prompt.text,
            "continuation": prompt.separator + response,
            "num_bytes": len(response.encode()),
            "num_tokens": len(ids[category]) if ids else None,
        }
        for doc, prompt, ids in pairs
        for category, response in doc.responses.items()
    ]


def _usable_docs(
    probe_set: ProbeSet,
    format_name: str,
    tokenizer_name: str | None,
    revision: str,
    max_length: int | None,
) -> tuple[PromptFormat, list[tuple[Doc, Prompt, dict[str, list[int]]]], list[DroppedDoc]]:
    """Return the docs with prompts and, where the tokenizer is known, the ids of their responses;
    and what is left out."""
    if tokenizer_name is None:
        log.warning("no tokenizer is known, so the length of the docs is not checked")
        prompt_format = PromptFormat(format_name)
        refused = refused_docs(prompt_format, probe_set.docs)
        names = {drop.doc_id for drop in refused}
        docs = [doc for doc in probe_set.docs if doc.doc_id not in names]
        dropped = dropped_by_faults(probe_set) + refused
        return (
            prompt_format,
            [(doc, prompt_format.render(doc.messages), {}) for doc in docs],
            dropped,
        )
    tokenizer = load_tokenizer(tokenizer_name, revision)
    prompt_format = resolve_format(format_name, tokenizer, probe_set.docs)
    kept, dropped = encode_probe_set(
        probe_set, prompt_format, tokenizer, max_length or _window(tokenizer_name, revision)
    )
    return prompt_format, [(item.doc, item.prompt, item.continuation_ids) for item in kept], dropped


def _window(model_name: str, revision: str) -> int:
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(load_config(model_name, revision)))


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Return the metrics of one doc: `logprob` in nats, summed over separator and response, without
    the terminator."""
    logprob = results[0][0]
    metrics = {
        "logprob": logprob,
        "num_bytes": doc["num_bytes"],
        "logprob_per_byte": (logprob, doc["num_bytes"]),
    }
    return metrics if doc["num_tokens"] is None else metrics | {"num_tokens": doc["num_tokens"]}


def ratio_of_sums(pairs: list[tuple[float, int]]) -> float:
    """Sum of the first entries over the sum of the second: nats per byte over all docs."""
    numerators, denominators = zip(*pairs, strict=True)
    return float(sum(numerators) / sum(denominators))
