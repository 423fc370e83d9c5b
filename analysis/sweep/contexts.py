"""The same held-out responses under other prompts: near, far and none.

What a response gains under its own prompt but not under these is what its own prompt gives.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sft_probe.files import read_object, write_json
from sft_probe.prompts import EncodedDoc
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import FittingScorer
from sft_probe.synth.splits import derangement

NUM_FAR = 4
"""Derangements: each doc is given so many prompts of other docs, drawn at random."""
PLAN = "contexts.json"


def context_plan(path: Path, docs: Sequence[EncodedDoc], model: Any) -> dict[str, Any]:
    """Return which docs lend their prompts to which, from a file, or made and stored there.

    `near` is the doc of another conversation whose prompt is nearest by the cosine of mean last
    hidden states; `far` are `NUM_FAR` derangements that give every doc another conversation.

    Args:
        path: where the plan is kept: it holds for all checkpoints of a sweep.
        docs: the held-out docs.
        model: the first checkpoint.

    Raises:
        UserError: one conversation is more than half of the docs.
    """
    if path.exists():
        return read_object(path, {"near": dict, "far": dict})
    ids = [doc.doc.doc_id for doc in docs]
    conversations = [doc.doc.conversation_id for doc in docs]
    draws = [derangement(conversations, seed) for seed in range(NUM_FAR)]
    plan = {
        "near": dict(zip(ids, _nearest(docs, model), strict=True)),
        "far": {ids[i]: [ids[draw[i]] for draw in draws] for i in range(len(ids))},
    }
    write_json(path, plan)
    return plan


def _nearest(docs: Sequence[EncodedDoc], model: Any) -> list[str]:
    means = []
    for doc in docs:
        ids = torch.tensor([doc.prompt_ids], device=model.device)
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        means.append(hidden[0].float().mean(0))
    unit = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    unit = torch.nn.functional.normalize(unit - unit.mean(0), dim=-1)
    cosine = unit @ unit.T
    conversations = [doc.doc.conversation_id for doc in docs]
    for i, conversation in enumerate(conversations):
        for j, other in enumerate(conversations):
            if conversation == other:
                cosine[i, j] = -2
    return [docs[int(j)].doc.doc_id for j in cosine.argmax(-1)]


def score_contexts(
    scorer: FittingScorer,
    model: Any,
    docs: Sequence[EncodedDoc],
    plan: dict[str, Any],
    *,
    contexts: Sequence[str],
    start_id: int,
    terminator_id: int,
    max_length: int,
    first_visible: dict[tuple[str, str], int],
) -> list[dict[str, Any]]:
    """Score every response under every context; the token ids of a response are always the same.

    Args:
        scorer: the sweep's.
        model: the checkpoint.
        docs: the held-out docs.
        plan: from `context_plan`.
        contexts: some of `CONTEXTS`.
        start_id: BOS, or EOS where there is none: what stands before a text without a prompt.
        terminator_id: scored after each response.
        max_length: a doc is left out where one of its contexts makes a response longer.
        first_visible: by doc and category, the first token that holds more than white space.

    Returns:
        Rows `category split doc_id conversation_id context context_doc_id num_tokens logprob
        logprob_first logprob_eos`; log-probs in nats, `logprob` without the terminator.
    """
    prompts = {doc.doc.doc_id: doc.prompt_ids for doc in docs}
    keys, items = [], []
    for doc in docs:
        lenders = list(_lenders(doc.doc.doc_id, plan, contexts))
        longest = max(len(prompts[lender]) if lender else 1 for _, lender in lenders)
        if longest + max(map(len, doc.continuation_ids.values())) > max_length:
            continue
        for context, lender in lenders:
            prefix = prompts[lender] if lender else [start_id]
            for category, ids in doc.continuation_ids.items():
                keys.append((doc, category, context, lender))
                items.append(Continuation(prefix, ids, terminator_id))
    scores = dict(scorer.score(model, items))
    return [
        {
            "category": category,
            "split": doc.doc.split,
            "doc_id": doc.doc.doc_id,
            "conversation_id": doc.doc.conversation_id,
            "context": context,
            "context_doc_id": lender,
            "num_tokens": len(items[index].continuation_ids),
            "logprob": scores[index].logprob,
            "logprob_first": float(
                scores[index].token_logprobs[first_visible[doc.doc.doc_id, category]]
            ),
            "logprob_eos": scores[index].logprob_eos,
        }
        for index, (doc, category, context, lender) in enumerate(keys)
    ]


def _lenders(
    doc_id: str, plan: dict[str, Any], contexts: Sequence[str]
) -> Iterable[tuple[str, str | None]]:
    """Yield each context of a doc with the doc whose prompt it is."""
    for context in contexts:
        if context == "far":
            yield from (("far", lender) for lender in plan["far"][doc_id])
        else:
            lender = {"own": doc_id, "near": plan["near"].get(doc_id), "none": None}[context]
            yield context, lender
