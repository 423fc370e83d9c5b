"""Run directories with made-up score rows, of which every number is known."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_probe.scores import TOKEN_COLUMNS, score_row

CURVES: dict[str, Callable[[int], float]] = {
    "chosen": lambda step: 4.0 * np.log2(step + 1),
    "rejected": lambda step: 2.0 * np.log2(step + 1),
    "non_response": lambda step: 3.0 * min(step, 4) / 4 - 1.0 * max(step - 4, 0),
}
STEPS = (0, 1, 4, 8)
NUM_TOKENS = 40


def write_run(
    directory: Path,
    *,
    curves: Mapping[str, Callable[[int], float]] | None = None,
    steps: Sequence[int] = STEPS,
    num_docs: int = 24,
    seed: int = 0,
    texts: dict[str, str] | None = None,
    prompt: str = "What is it?",
    omit: Callable[[dict[str, Any]], bool] = lambda _: False,
    argmax: Callable[[int], float] | None = None,
    **columns: Any,
) -> Path:
    """A live-probed run: the mean body change of each category is its curve (nats per response),
    the noise has sd 1.

    The first token gains a tenth of a curve, the terminator a quarter, the body the rest of what
    `logprob` gains: the whole curve. `texts`: category to response of every doc, so that a probe
    set lies beside the run. `argmax`: change of the argmax mass of every response, for rows
    with token columns; the other columns do not move.
    """
    curves = curves or CURVES
    probe = directory / "probe"
    probe.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    shared = {
        "run": directory.name,
        "model": "made-up",
        "train_category": "chosen",
        "order_seed": seed,
    } | columns
    starts = generator.normal(-3.0, 0.2, size=(num_docs, len(curves), NUM_TOKENS + 1))
    noise = {
        step: generator.normal(0, 1.0 if step else 0.0, size=(num_docs, len(curves)))
        for step in steps
    }
    for step in steps:
        rows = []
        for doc in range(num_docs):
            for number, (category, curve) in enumerate(curves.items()):
                tokens = starts[doc, number].copy()
                gain = curve(step) + noise[step][doc, number]
                tokens[0] += 0.1 * gain
                tokens[1:-1] += 0.9 * gain / (NUM_TOKENS - 1)
                tokens[-1] += 0.25 * gain
                rows.append(_row({**shared, "step": step}, f"d{doc}", category, tokens))
                if argmax is not None:
                    mass = -20.0 + argmax(step) + 0.1 * noise[step][doc, number]
                    rows[-1] |= _columns(mass)
        rows = [row for row in rows if not omit(row)]
        (probe / f"step_{step:06d}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    manifest = {
        **shared,
        "categories": list(curves),
        "prompt_format": "hh",
        "dtype": "float32",
        "dropped": [],
    }
    if texts is not None:
        path = directory / "set.jsonl"
        docs = [
            _doc(f"d{doc}", prompt, {name: f"{text} {doc}" for name, text in texts.items()})
            for doc in range(num_docs)
        ]
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        manifest["probe_set"] = str(path)
    (probe / "manifest.json").write_text(json.dumps({"probe_set": "elsewhere", **manifest}))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def _row(columns: dict[str, Any], doc_id: str, category: str, tokens: np.ndarray) -> dict[str, Any]:
    step = columns["step"]
    return score_row(
        {
            **columns,
            "examples_seen": 4 * step,
            "tokens_seen": 400 * step,
            "epoch": step / 8,
            "weights_dtype": "float32",
            "compute_dtype": "float32",
            "source": "live",
        },
        {
            "category": category,
            "split": "heldout",
            "doc_id": doc_id,
            "conversation_id": doc_id,
            "prompt_format": "hh",
            "num_bytes": 4 * NUM_TOKENS,
        },
        logprob=float(tokens[:-1].sum()),
        token_logprobs=tokens[:-1].tolist(),
        first=0,
        logprob_eos=float(tokens[-1]),
        is_greedy=False,
    )


def _columns(argmax: float) -> dict[str, list[float]]:
    values = (argmax / NUM_TOKENS, 2.0, 3, 0.5)
    return {name: [value] * NUM_TOKENS for name, value in zip(TOKEN_COLUMNS, values, strict=True)}


def _doc(doc_id: str, prompt: str, responses: dict[str, str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {
        "doc_id": doc_id,
        "conversation_id": doc_id,
        "split": "heldout",
        "messages": messages,
        **responses,
    }
