"""What a set will cost: calls, tokens and money, before anything is requested."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sft_probe.synth.asking.budget import (
    MAX_BILLED_CALLS,
    Limits,
    Price,
    expected_output_tokens,
    expected_prompt_tokens,
    price_of,
)
from sft_probe.synth.asking.protocol import Answer, Request, WriterId
from sft_probe.synth.asking.store import Store, open_copy
from sft_probe.synth.build import SetPlan, write_texts
from sft_probe.synth.checks import expected_opinion, longest_opinion


@dataclass(frozen=True)
class CostEstimate:
    """What a run would request, estimated without a tokenizer. Costs are in USD, None where the
    price is unknown."""

    num_stored: int
    calls: int
    prompt_tokens: int
    output_tokens: int
    cost_usd: float | None
    max_cost_usd: float | None
    """An upper bound: every prompt with a token per byte, every output of its full length, every
    call as often as it may be billed, every text that may fail a check written twice."""


def estimate_cost(
    requests: Iterable[Request],
    writer: WriterId,
    store: Store | None = None,
    price: Price | None = None,
    *,
    maybe_requests: Iterable[Request] = (),
) -> CostEstimate:
    """Return the calls, tokens and cost of what the store lacks; request nothing.

    Args:
        requests: what will be requested.
        writer: the writer.
        store: answers so far.
        price: replaces the price table.
        maybe_requests: what may be requested in addition; it counts in the upper bound alone.
    """
    price = price or price_of(writer)
    num_requests = calls = 0
    prompt_tokens = output_tokens = max_cost_usd = 0.0
    for request in requests:
        num_requests += 1
        if _is_missing(request, writer, store):
            calls += 1
            prompt_tokens += expected_prompt_tokens(request)
            output_tokens += expected_output_tokens(request)
            max_cost_usd += MAX_BILLED_CALLS * price.worst_usd(request) if price else 0.0
    if price:
        maybe_missing = (one for one in maybe_requests if _is_missing(one, writer, store))
        max_cost_usd += sum(MAX_BILLED_CALLS * price.worst_usd(one) for one in maybe_missing)
    return CostEstimate(
        num_stored=num_requests - calls,
        calls=calls,
        prompt_tokens=round(prompt_tokens),
        output_tokens=round(output_tokens),
        cost_usd=price.cost_usd(prompt_tokens, output_tokens) if price else None,
        max_cost_usd=max_cost_usd if price else None,
    )


def _is_missing(request: Request, writer: WriterId, store: Store | None) -> bool:
    answer = store.get(writer, request) if store is not None else None
    return answer is None or not answer.is_final


def describe_cost(plan: SetPlan, writer: WriterId | None, limits: Limits, store_path: Path) -> str:
    """Return what a dry run prints: docs, calls, tokens and cost."""
    docs = f"docs: {len(plan.docs)}; rows left out so far: {len(plan.left_out)}"
    if writer is None:
        return f"{docs}\ncalls: 0; no model is needed"
    with open_copy(store_path) if store_path.is_file() else contextlib.nullcontext() as store:
        first, estimate = _estimates(plan, writer, store, limits.price)
        spent_usd = store.cost_usd() if store else 0.0
    if estimate.cost_usd is None or estimate.max_cost_usd is None:
        cost = "unknown; give --price INPUT,OUTPUT"
    else:
        most_usd = estimate.max_cost_usd
        if limits.max_cost_usd is not None:
            most_usd = min(most_usd, max(0.0, limits.max_cost_usd - spent_usd))
        cost = f"{min(estimate.cost_usd, most_usd):.4f} USD, at most {most_usd:.4f}"
    again = "one more or two" if plan.settings.judge else "one more"
    return (
        f"{docs}\n"
        f"calls: {estimate.calls} ({first.num_stored} texts are stored), and {again} for each text "
        "that fails a check\n"
        f"tokens, estimated: {estimate.prompt_tokens} in, {estimate.output_tokens} out\n"
        f"cost: {cost}"
    )


def _estimates(
    plan: SetPlan, writer: WriterId, store: Store | None, price: Price | None
) -> tuple[CostEstimate, CostEstimate]:
    """Return the estimate of the first texts, and that of everything a run may request."""
    judge = plan.settings.judge
    first = estimate_cost(plan.requests(), writer, store, price, maybe_requests=_second_texts(plan))
    if store and not first.calls:  # all first texts are there, so it is known which of them fail
        missing = _missing_requests(plan, writer, store)
        # the writer may still judge texts to be bad
        maybe = _second_texts(plan) if judge and missing else ()
        return first, estimate_cost(missing, writer, store, price, maybe_requests=maybe)
    if judge:
        requests = _with_opinions(plan)
        return first, estimate_cost(
            requests, writer, store, price, maybe_requests=_second_texts(plan)
        )
    return first, first


def _with_opinions(plan: SetPlan) -> Iterator[Request]:
    """Yield the requests for first texts and for opinions on them."""
    for request in plan.requests():
        yield request
        yield expected_opinion(request, plan.settings.thinking_tokens)


def _second_texts(plan: SetPlan) -> Iterator[Request]:
    """Yield the request for each second text, with the longest opinions on both where the writer
    judges."""
    for request in plan.requests():
        second = replace(request, sample_index=1)
        yield second
        if plan.settings.judge:
            yield longest_opinion(request, plan.settings.thinking_tokens)
            yield longest_opinion(second, plan.settings.thinking_tokens)


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
