"""What a set will cost: calls, tokens and money, before anything is requested."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sft_probe.synth.asking import budget
from sft_probe.synth.asking.protocol import Answer, Request, WriterId
from sft_probe.synth.asking.store import Store, open_copy
from sft_probe.synth.build import SetPlan, write_texts
from sft_probe.synth.checks import expected_opinion, longest_opinion


@dataclass
class CostEstimate:
    """What a run would request, estimated without a tokenizer. Costs are in USD, None where the
    price is unknown."""

    calls: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    cost_usd: float | None = None
    max_cost_usd: float | None = None
    """An upper bound: every prompt with a token per byte, every output of its full length, every
    call as often as it may be billed, every text that may fail a check written twice."""


def estimate_cost(
    requests: Iterable[Request],
    writer: WriterId,
    store: Store | None = None,
    price: budget.Price | None = None,
    *,
    maybe_requests: Iterable[Request] = (),
) -> CostEstimate:
    """Return the calls, tokens and cost of what the store lacks; request nothing.

    `maybe_requests` are those that may be needed in addition; they count in the upper bound alone.
    """
    price = price or budget.price_of(writer)
    estimate, worst_usd = CostEstimate(), 0.0
    for request in requests:
        if not _is_stored(request, writer, store):
            estimate.calls += 1
            estimate.prompt_tokens += budget.expected_prompt_tokens(request)
            estimate.output_tokens += budget.expected_output_tokens(request)
            worst_usd += price.worst_usd(request) if price else 0.0
    if price:
        maybe = (request for request in maybe_requests if not _is_stored(request, writer, store))
        worst_usd += sum(map(price.worst_usd, maybe))
        estimate.cost_usd = price.cost_usd(estimate.prompt_tokens, estimate.output_tokens)
        estimate.max_cost_usd = budget.MAX_BILLED_CALLS * worst_usd
    return estimate


def _is_stored(request: Request, writer: WriterId, store: Store | None) -> bool:
    answer = store.get(writer, request) if store is not None else None
    return answer is not None and answer.is_final


def describe_cost(
    plan: SetPlan, writer: WriterId | None, limits: budget.Limits, store_path: Path
) -> str:
    """Return what a dry run prints: docs, calls, tokens and cost."""
    docs = f"docs: {len(plan.docs)}; rows left out so far: {len(plan.left_out)}"
    if writer is None:
        return f"{docs}\ncalls: 0; no model is needed"
    with open_copy(store_path) if store_path.is_file() else contextlib.nullcontext() as store:
        num_stored = sum(_is_stored(request, writer, store) for request in plan.requests())
        requests, maybe = _requests(plan, writer, store, num_stored == plan.num_requests)
        estimate = estimate_cost(requests, writer, store, limits.price, maybe_requests=maybe)
        spent_usd = store.cost_usd() if store else 0.0
    if estimate.cost_usd is None or estimate.max_cost_usd is None:
        cost = "unknown; give --price INPUT,OUTPUT"
    else:
        most_usd = estimate.max_cost_usd
        if limits.max_cost_usd is not None:
            most_usd = min(most_usd, max(0.0, limits.max_cost_usd - spent_usd))
        cost = f"{min(estimate.cost_usd, most_usd):.4f} USD, at most {most_usd:.4f}"
    again = "one more or two" if plan.options.judge else "one more"
    return (
        f"{docs}\n"
        f"calls: {estimate.calls} ({num_stored} texts are stored), and {again} for each text that "
        "fails a check\n"
        f"tokens, estimated: {estimate.prompt_tokens:.0f} in, {estimate.output_tokens:.0f} out\n"
        f"cost: {cost}"
    )


def _requests(
    plan: SetPlan, writer: WriterId, store: Store | None, is_written: bool
) -> tuple[Iterable[Request], Iterable[Request]]:
    """Return what a run will request, and what it may request in addition."""
    if store and is_written:  # all first texts are there, so it is known which of them fail
        missing = _missing_requests(plan, writer, store)
        # the writer may still judge texts to be bad
        return missing, _second_texts(plan) if plan.options.judge and missing else ()
    return _first_texts(plan), _second_texts(plan)


def _first_texts(plan: SetPlan) -> Iterator[Request]:
    """Yield the requests for first texts, and for opinions on them where the writer judges."""
    for request in plan.requests():
        yield request
        if plan.options.judge:
            yield expected_opinion(request, plan.thinking_tokens)


def _second_texts(plan: SetPlan) -> Iterator[Request]:
    """Yield the request for each second text, with the longest opinions on both where the writer
    judges."""
    for request in plan.requests():
        second = replace(request, sample_index=1)
        yield second
        if plan.options.judge:
            yield longest_opinion(request, plan.thinking_tokens)
            yield longest_opinion(second, plan.thinking_tokens)


def _missing_requests(plan: SetPlan, writer: WriterId, store: Store) -> list[Request]:
    """Return the opinions and second texts that are missing where all first texts are stored."""
    missing: list[Request] = []

    def stored(requests: Iterator[Request], _: int) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            answer = store.get(writer, request)
            if answer is not None and answer.is_final:
                yield request, answer
            else:
                missing.append(request)

    write_texts(plan, stored)
    return missing
