"""What the benchmark scripts share: real docs, both sides on one model, timing, and tables."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sft_probe.files import jsonl_lines
from sft_probe.probe_set import Doc
from sft_probe.prompts import EncodedDoc, PromptFormat, encode_doc, terminator_id
from sft_probe.scoring.packing import Continuation
from sft_probe.synth.hh import parse_prompt
from sft_probe.tasks.lm import ProbeLM

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
MAX_LENGTH = 1024
SIX = ("chosen", "rejected", "reject_gptsemantic", "chosen_initial", "irr_test", "irr_hum")


def parser(
    description: str | None, num_docs: int, repeats: int | None = None
) -> argparse.ArgumentParser:
    """The flags that most scripts have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data",
        type=Path,
        default=DATA / "helpful-base/probe_train.jsonl",
        help="prompts and responses",
    )
    made.add_argument("--num_docs", type=int, default=num_docs)
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats)
    return made


def load_docs(path: Path, num_docs: int, num_categories: int, tokenizer: Any) -> list[EncodedDoc]:
    """The first docs whose responses are all there and fit: the columns of `SIX`, or for more the
    file's first ones."""
    docs: list[EncodedDoc] = []
    for number, line in enumerate(jsonl_lines(path.read_text("utf-8")), start=1):
        row = json.loads(line)
        names = SIX if num_categories <= len(SIX) else [name for name in row if name != "prompt"]
        responses = {name: row[name].strip() for name in names[:num_categories]}
        messages = parse_prompt(row["prompt"])
        if not messages or not all(responses.values()):
            continue
        doc = Doc(
            doc_id=f"d{number}",
            conversation_id=f"c{number}",
            split="heldout",
            messages=tuple(messages),
            responses=responses,
            random_doc_id=None,
        )
        encoded = encode_doc(doc, PromptFormat("hh"), tokenizer, MAX_LENGTH)
        if isinstance(encoded, EncodedDoc):
            docs.append(encoded)
        if len(docs) == num_docs:
            break
    assert len(docs) == num_docs, f"{path} has only {len(docs)} usable docs"
    return docs


def instances(docs: Sequence[EncodedDoc]) -> list[Instance]:
    """lm-eval's requests, as the tasks `sft_probe_<category>` make them: `ProbeLM` scores the
    terminator too."""
    return [
        Instance(
            request_type="loglikelihood",
            doc={"doc_id": item.doc.doc_id, "prompt_format": "hh"},
            arguments=(item.prompt.text, item.prompt.separator + response),
            idx=0,
            metadata=(f"sft_probe_{category}", index, 1),
        )
        for index, item in enumerate(docs)
        for category, response in item.doc.responses.items()
    ]


def items_of(docs: Sequence[EncodedDoc], tokenizer: Any) -> list[Continuation]:
    """The token ids of `instances`, with the terminator."""
    end = terminator_id("hh", tokenizer)
    return [
        Continuation(doc.prompt_ids, ids, end)
        for doc in docs
        for ids in doc.continuation_ids.values()
    ]


def hflm(model: Any, tokenizer: Any, batch_size: int, **options: Any) -> HFLM:
    """Stock lm-eval on a model that is loaded already. float32 softmax, which is as exact as it
    gets, by default."""
    options = {"softmax_dtype": "float32"} | options
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=MAX_LENGTH,
        **options,
    )


def probe_lm(model: Any, tokenizer: Any) -> ProbeLM:
    """Ours on the same model object."""
    return ProbeLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=MAX_LENGTH)


def scorer(lm: HFLM, requests: list[Instance]) -> Callable[[], list[Any]]:
    """One call that scores all requests from their text; `ProbeLM` forgets token ids first, so that
    both tokenise."""

    def call() -> list[Any]:
        if isinstance(lm, ProbeLM):
            lm._ids.clear()
        return list(lm.loglikelihood(requests, disable_tqdm=True))

    return call


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def median_time(
    sides: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each side, and its last result; the sides take turns (A B A B ...)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in sides.items():
            spent, results[name] = timed(call)
            seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a Markdown table; the keys of the first row are its head."""
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print("|", " | ".join(map(_text, cells)), "|", flush=True)
    print(flush=True)


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if cell < 1000 else str(round(cell))
