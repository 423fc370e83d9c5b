"""From a source to checked docs: draw, split, have texts written, check them, leave out failures.

A text that fails a check is written once more; a doc with a text that fails twice is left out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc, LeftOut, common_reasons
from sft_probe.prompts import PromptFormat
from sft_probe.synth.asking.budget import Trial
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.categories import (
    SOURCE_OF,
    Template,
    load_templates,
    make_requests,
    order_topics,
    permuted,
    read_topics,
    request_of,
    topic_of,
)
from sft_probe.synth.checks import JUDGED, fault_in, fault_of, opinion_request
from sft_probe.synth.duplicates import NearDuplicates
from sft_probe.synth.sources import hub_revision, read_pairs
from sft_probe.synth.splits import (
    RULE,
    check_sizes,
    draw_key,
    draw_order,
    split_docs,
    with_random_in_splits,
)

UNTRAINED_TEMPLATE = "untrained@1"
Ask = Callable[[Iterator[Request], int], Iterator[tuple[Request, Answer]]]
"""Yields each request with its answer, in order. The second argument is the number of requests."""
Checked = tuple[Request, Answer, str | None]
"""A request, its answer, and the fault of the answer."""


@dataclass(frozen=True, kw_only=True)
class SetSettings:
    """The user's choices for a set."""

    source: str
    kinds: tuple[str, ...]
    """Categories beside chosen and rejected."""
    templates: Path | None
    prompt_format: str
    heldout_frac: float | None
    limit: int | None
    seed: int
    thinking_tokens: int = 0
    """Room for a model's thoughts, added to the output limit of each text."""
    judge: bool = False
    """Whether the writer is asked about each text that passes the checks."""
    rule: int = RULE
    """Version of the rule by which docs are drawn, split and given topics."""

    @property
    def written_kinds(self) -> list[str]:
        """Categories that need a writer."""
        return [kind for kind in self.kinds if kind in SOURCE_OF]


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """The docs of a set before any text is written."""

    settings: SetSettings
    docs: list[Doc]
    """With `chosen` and `rejected` alone."""
    templates: dict[str, Template]
    topics: dict[str, str]
    """Topic of the non-response by doc_id."""
    left_out: list[LeftOut]
    """Rows and docs that are not used; grows until the set is written."""
    revision: str | None
    """Commit of a hub source."""
    num_rows: int
    """Number of rows of the source."""
    num_not_drawn: int
    """Number of usable rows beyond `limit`."""

    @property
    def num_requests(self) -> int:
        """Number of texts to write when none fails a check."""
        return len(self.docs) * len(self.templates)

    def requests(self) -> Iterator[Request]:
        """Yield the first request for each text, doc by doc."""
        extra = self.settings.thinking_tokens
        for doc in self.docs:
            for request in make_requests(doc, self.templates, self.topics[doc.doc_id]):
                yield replace(request, max_output_tokens=request.max_output_tokens + extra)

    def leave_out(self, doc: Doc, reason: str) -> None:
        """Record that a doc is not used."""
        self.left_out.append(LeftOut(place=doc.place, doc_id=doc.doc_id, reason=reason))


@dataclass(kw_only=True)
class Written:
    """The texts that passed the checks, and the faults of the others."""

    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """By doc_id and category."""
    sample_index: dict[str, dict[str, int]] = field(default_factory=dict)
    """0, or 1 for a text that was written twice; by doc_id and category."""
    first_faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults of first texts, by category and fault."""
    last_faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults for which a doc was left out, by category and fault."""
    model_versions: set[str] = field(default_factory=set)
    opinions: Counter[str] = field(default_factory=Counter)
    """What the writer says of its texts: `yes`, `judged` (bad) or `no verdict`."""

    def accept(self, request: Request, answer: Answer) -> None:
        """Keep the text of an answer."""
        self.texts.setdefault(request.doc_id, {})[request.category] = (answer.text or "").strip()
        self.sample_index.setdefault(request.doc_id, {})[request.category] = request.sample_index
        self.model_versions.add(f"{request.category}: {answer.model_version}")


def plan_set(settings: SetSettings, left_out: list[LeftOut], tokenizer: Any = None) -> SetPlan:
    """Read the source, draw docs and split them.

    Args:
        settings: the user's choices.
        left_out: receives the rows and docs that cannot be used.
        tokenizer: of the untrained model, whose chat template must fit every prompt, if requested.

    Raises:
        UserError: the source, a template or the splits are unusable.
    """
    templates = load_templates(settings.kinds, settings.templates)
    revision = hub_revision(settings.source)
    docs = read_pairs(settings.source, left_out, revision)
    num_rows = len(docs) + len(left_out)
    # the format `chat` without a tokenizer belongs to a model that is chosen later
    if settings.prompt_format != "chat" or tokenizer is not None:
        prompt_format = PromptFormat(settings.prompt_format, tokenizer)
        docs = [doc for doc in docs if _fits(doc, prompt_format, left_out)]
    if not docs:
        reasons = common_reasons(left_out) if num_rows else "it is empty"
        raise UserError(
            f"the source {settings.source} has no usable row among {num_rows}: {reasons}."
        )
    drawn = _ordered(docs, settings)[: settings.limit]
    return SetPlan(
        settings=settings,
        docs=split_docs(drawn, settings.heldout_frac, settings.seed, left_out, settings.rule),
        templates=templates,
        topics=_topics(drawn, settings),
        left_out=left_out,
        revision=revision,
        num_rows=num_rows,
        num_not_drawn=len(docs) - len(drawn),
    )


def _key(doc: Doc, seed: int) -> bytes:
    pair = {side: doc.responses[side] for side in ("chosen", "rejected")}
    return draw_key({"messages": doc.messages, **pair}, seed)


def _ordered(docs: list[Doc], settings: SetSettings) -> list[Doc]:
    """Return docs in the order in which they are drawn and written."""
    if settings.rule == 1:
        return draw_order(docs, settings.seed)
    return sorted(docs, key=lambda doc: _key(doc, settings.seed))


def _topics(drawn: list[Doc], settings: SetSettings) -> dict[str, str]:
    """Return the topic of each doc by its id; empty ones where no topics are needed."""
    if "non_response" not in settings.kinds:
        return dict.fromkeys((doc.doc_id for doc in drawn), "")
    parts = read_topics(settings.templates, len(drawn))
    if settings.rule == 1:
        topics = order_topics(parts, settings.seed)
        return {doc.doc_id: topic for doc, topic in zip(drawn, topics, strict=False)}
    return {doc.doc_id: topic_of(parts, _key(doc, settings.seed)) for doc in drawn}


def write_texts(
    plan: SetPlan, ask: Ask, note_fault: Callable[[str], None] = lambda _: None
) -> Written:
    """Have every text written and checked, and a text that fails a second time.

    Docs with a text that fails twice go to `plan.left_out`.

    Args:
        plan: the docs.
        ask: returns the answers.
        note_fault: called with the fault of each text, for the live line.

    Raises:
        UserError: some texts have no answer, or none of the answers can be used.
    """
    checker, again = _Checker(plan, ask, note_fault), []
    for request, answer, fault in checker.checked(plan.requests(), plan.num_requests, Trial()):
        if fault and answer.is_turned_down:  # a second request would be the same
            checker.leave_out(request, fault, f": not accepted by the server: {answer.reason}")
        elif fault:
            checker.written.first_faults[request.category, fault] += 1
            again.append(replace(request, sample_index=1))
    for request, _, fault in checker.checked(iter(again), len(again)):
        if fault:
            checker.leave_out(request, fault, f", written twice: {fault}")
    return checker.written


class _Checker:
    """Checks answers, keeps texts that pass, and leaves out docs whose texts do not."""

    def __init__(self, plan: SetPlan, ask: Ask, note_fault: Callable[[str], None]) -> None:
        self.written = Written()
        self._plan, self._ask, self._note_fault = plan, ask, note_fault
        self._docs = {doc.doc_id: doc for doc in plan.docs}
        self._indexes = {kind: NearDuplicates() for kind in plan.templates}

    def checked(
        self, requests: Iterator[Request], number: int, trial: Trial | None = None
    ) -> Iterator[Checked]:
        """Yield each request with its answer and its fault; keep the texts without a fault.

        Raises:
            UserError: some requests have no answer, or the trial ends the run.
        """
        for request, answer, fault in self._judged(self._looked_at(requests, number, trial), trial):
            if fault is None:
                self.written.accept(request, answer)
            yield request, answer, fault
        if self.written.opinions[JUDGED]:  # a second text may resemble one that was judged bad
            self._indexes = {kind: NearDuplicates() for kind in self._plan.templates}
            for texts in self.written.texts.values():
                for kind, text in texts.items():
                    self._indexes[kind].add(text)

    def _looked_at(
        self, requests: Iterator[Request], number: int, trial: Trial | None
    ) -> Iterator[Checked]:
        """Yield each answer with the fault that the checks find."""
        for request, answer in _answered(self._ask(requests, number)):
            doc, index = self._docs[request.doc_id], self._indexes[request.category]
            fault = fault_of(request, answer, doc, self._plan.templates[request.category])
            if fault is None and index.holds(str(answer.text)):
                fault = "near-duplicate"
            if fault is None:
                index.add(str(answer.text))
            elif answer.status == "ok":
                self._note_fault(fault)
            if trial:
                trial.note(request.category, answer, fault)
            yield request, answer, fault

    def _judged(self, checked: Iterator[Checked], trial: Trial | None) -> Iterator[Checked]:
        """Ask the writer which of the texts that passed are bad, where the user wants that.

        All texts are held in memory until the opinions are there.
        """
        if not self._plan.settings.judge:
            yield from checked
            return
        held, extra = list(checked), self._plan.settings.thinking_tokens
        opinions = [
            None if fault else opinion_request(request, str(answer.text), extra)
            for request, answer, fault in held
        ]
        asked = [opinion for opinion in opinions if opinion]
        bad: set[str] = set()
        for opinion, answer in _answered(self._ask(iter(asked), len(asked))):
            fault = fault_in(answer)
            self.written.opinions[fault or "yes"] += 1
            if fault == JUDGED:
                bad.add(opinion.prompt)
                self._note_fault(fault)
            if trial:
                trial.note(opinion.category, answer, fault)
        for (request, answer, fault), own in zip(held, opinions, strict=True):
            yield request, answer, JUDGED if own and own.prompt in bad else fault

    def leave_out(self, request: Request, fault: str, why: str) -> None:
        """Leave a doc out for the fault of one of its texts."""
        self.written.last_faults[request.category, fault] += 1
        self._plan.leave_out(self._docs[request.doc_id], f"`{request.category}`{why}")


def _answered(answers: Iterator[tuple[Request, Answer]]) -> Iterator[tuple[Request, Answer]]:
    """Yield the answers that are there; raise `UserError` at the end where some are not.

    A set without them would be a different one once they are there.
    """
    missing: Counter[str] = Counter()
    for request, answer in answers:
        if answer.status == "error":
            missing[str(answer.reason)] += 1
        else:
            yield request, answer
    if missing:
        raise UserError(
            f"{missing.total()} texts have no answer (most often: "
            f"{missing.most_common(1)[0][0]}), so the set is not written. All others are stored; "
            "run the same command again."
        )


def write_untrained(plan: SetPlan, written: Written, tokenizer: Any, ask: Ask) -> None:
    """Add the untrained model's own answers; docs whose answer does not end are left out."""
    prompt_format = PromptFormat(plan.settings.prompt_format, tokenizer)
    docs = {doc.doc_id: doc for doc in plan.docs}
    requests = [_untrained_request(doc, prompt_format) for doc in plan.docs]
    for request, answer in _answered(ask(iter(requests), len(requests))):
        fault = None if (answer.text or "").strip() else "empty"
        fault = fault if answer.status == "ok" else answer.status
        if fault:
            written.last_faults["untrained", fault] += 1
            plan.leave_out(docs[request.doc_id], f"`untrained`: {fault}")
        else:
            written.accept(request, answer)


def finish_docs(plan: SetPlan, written: Written) -> list[Doc]:
    """Return the docs that have every text, `random` drawn among them.

    Raises:
        UserError: too few docs are left.
    """
    out = {item.doc_id for item in plan.left_out}
    docs: list[Doc] = []
    trained_texts: set[str | None] = set()
    for doc in sorted(plan.docs, key=lambda doc: doc.split != "train"):  # train first
        if doc.doc_id in out:
            continue
        texts = _texts(doc, plan.settings, written)
        if texts is None:
            plan.leave_out(doc, "`permuted`: the words of chosen have one order only")
        elif doc.split == "heldout" and not trained_texts.isdisjoint(texts.values()):
            plan.leave_out(doc, "held out, but a text written for it is in train")
        else:
            if doc.split == "train":
                trained_texts.update(texts.values())
            docs.append(replace(doc, responses=texts))
    check_sizes(docs, plan.left_out)
    if "random" not in plan.settings.kinds:
        return docs
    return with_random_in_splits(docs, plan.settings.seed)


def _texts(doc: Doc, settings: SetSettings, written: Written) -> dict[str, str] | None:
    """Return all responses of a doc but `random`; None where `permuted` has only one order."""
    made = dict(written.texts.get(doc.doc_id, {}))
    if "permuted" in settings.kinds:
        key = doc.doc_id if settings.rule == 1 else _key(doc, settings.seed).hex()
        shuffled = permuted(doc.responses["chosen"], f"{settings.seed} {key}")
        if shuffled is None:
            return None
        made["permuted"] = shuffled
    return doc.responses | {kind: made[kind] for kind in settings.kinds if kind != "random"}


def _fits(doc: Doc, prompt_format: PromptFormat, left_out: list[LeftOut]) -> bool:
    """Return whether the prompt format has a place for every turn."""
    try:
        prompt_format.render(list(doc.messages))
    except UserError as error:
        left_out.append(LeftOut(place=doc.place, doc_id=doc.doc_id, reason=str(error)))
        return False
    return True


def _untrained_request(doc: Doc, prompt_format: PromptFormat) -> Request:
    prompt = prompt_format.render(list(doc.messages))
    return request_of(
        doc,
        "untrained",
        template=UNTRAINED_TEMPLATE,
        template_sha256=hashlib.sha256(prompt_format.name.encode()).hexdigest(),
        prompt=(prompt.text + prompt.separator).rstrip(" "),
        source_text=doc.messages[-1]["content"],
        temperature=0.0,
    )
