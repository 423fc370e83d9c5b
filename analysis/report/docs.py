"""What the report's browser of single docs shows: prompts, responses, curves, and the change of
each token."""

import json
import math
from typing import Any

import numpy as np

from sft_probe.analysis.figures.docs import token_changes
from sft_probe.analysis.figures.style import colors_of, ticks
from sft_probe.analysis.stats.measures import Cube
from sft_probe.analysis.stats.runs import Recording

MAX_CHARACTERS = 4000


def browser(recording: Recording, measure: str, max_bytes: int) -> dict[str, Any]:
    """One run's docs for the browser, as many as fit into `max_bytes` of JSON; `omitted` counts the
    others.

    `curves` are levels of `measure` in nats; texts are cut at 4,000 characters.
    """
    split = recording.splits[0]
    arrays = recording.cube(split)
    categories = arrays.categories
    docs: list[dict[str, Any]] = []
    for number in range(len(arrays.doc_ids)):
        doc = _doc(recording, split, arrays, number, measure)
        max_bytes -= len(json.dumps(doc))
        if max_bytes < 0 and docs:
            break
        docs.append(doc)
    return {
        "name": recording.name,
        "steps": arrays.steps,
        "ticks": ticks(arrays.steps),
        "categories": categories,
        "colors": colors_of(categories),
        "docs": docs,
        "omitted": len(arrays.doc_ids) - len(docs),
    }


def _doc(
    recording: Recording, split: str, arrays: Cube, number: int, measure: str
) -> dict[str, Any]:
    doc_id = arrays.doc_ids[number]
    texts = recording.texts.get(doc_id, {})
    values = arrays.arrays[measure if not np.isnan(arrays.arrays[measure]).all() else "logprob"][
        number
    ]
    changes = token_changes(
        recording, split, doc_id, arrays.categories, (arrays.steps[0], arrays.steps[-1])
    )
    tokens = {}
    for category, own in changes.groupby("category", sort=False) if len(changes) else ():
        words = [str(word) for word in own["token"]]
        if any(words) and sum(map(len, words)) <= MAX_CHARACTERS:
            moved = [round(float(value), 3) for value in own["change"]]
            tokens[str(category)] = {"texts": words, "changes": moved}
    return {
        "id": doc_id,
        "prompt": cut(recording.prompts.get(doc_id, "(the prompt is not here)")),
        "responses": {name: cut(text) for name, text in texts.items() if name in arrays.categories},
        "curves": {
            name: [None if math.isnan(value) else round(float(value), 3) for value in values[place]]
            for place, name in enumerate(arrays.categories)
        },
        "tokens": tokens,
        "answers": _answers(recording, doc_id),
    }


def _answers(recording: Recording, doc_id: str) -> list[dict[str, Any]]:
    """Greedy answers to this prompt by step, where the sweep made some."""
    if recording.generations is None:
        return []
    own = recording.generations[recording.generations["doc_id"] == doc_id].sort_values("step")
    return [
        {
            "step": int(row["step"]),
            "text": cut(row["text"]),
            "tokens": int(row["num_tokens"]),
            "ended": bool(row["ended"]),
        }
        for _, row in own.iterrows()
    ]


def cut(text: str) -> str:
    """The text, or its start and how much is missing."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} [cut: {len(text)} characters]"
