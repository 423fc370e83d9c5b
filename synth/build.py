"""From a source to checked docs: draw, split, have texts written, check them, leave out failures.

A text that fails a check is written once more; a doc with a text that fails twice is left out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sft_probe.errors import UserError
from sft_probe.probe_set import Doc, LeftOut, common_reasons
from sft_probe.prompts import PromptFormat
from sft_probe.synth import categories, splits
from sft_probe.synth.asking.budget import Trial
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.checks import JUDGED, fault_in, fault_of, opinion_request
from sft_probe.synth.duplicates import NearDuplicates
from sft_probe.synth.options import SynthRun
from sft_probe.synth.sources import hub_revision, read_pairs

UNTRAINED_TEMPLATE = "untrained@1"
Ask = Callable[[Iterator[Request], int], Iterator[tuple[Request, Answer]]]
"""Yields each request with its answer, in order. The second argument is the number of requests."""
Checked = tuple[Request, Answer, str | None]
"""A request, its answer, and the fault of the answer."""


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """The docs of a set before any text is written."""

    options: SynthRun
    kinds: tuple[str, ...]
    """Categories beside chosen and rejected."""
    rule: int
    """Version of the rule by which docs are drawn, split and given topics."""
    thinking_tokens: int
    """Room for a model's thoughts, added to the output limit of each text."""
    docs: list[Doc]
    """With `chosen` and `rejected` alone."""
    templates: dict[str, categories.Template]
    topics: dict[str, str]
    """Topic of the non-response by doc_id; empty where none is requested."""
    left_out: list[LeftOut]
    """Rows and docs that are not used; grows until the set is written."""
    revision: str | None
    """Commit of a hub source."""
    num_rows: int
    """Number of rows of the source."""
    num_not_drawn: int
    """Number of usable rows beyond the limit."""

    @property
    def num_requests(self) -> int:
        """Number of texts to write when none fails a check."""
        return len(self.docs) * len(self.templates)

    def requests(self) -> Iterator[Request]:
        """Yield the first request for each text, doc by doc."""
        for doc in self.docs:
            topic = self.topics.get(doc.doc_id, "")
            for request in categories.make_requests(doc, self.templates, topic):
                limit = request.max_output_tokens + self.thinking_tokens
                yield replace(request, max_output_tokens=limit)

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


def plan_set(
    options: SynthRun,
    left_out: list[LeftOut],
    *,
    rule: int = splits.RULE,
    thinking_tokens: int = 0,
    tokenizer: Any = None,
) -> SetPlan:
    """Read the source, draw docs and split them; what cannot be used goes to `left_out`.

    The `tokenizer` is that of the untrained model, if requested: every prompt must fit its chat
    template.

    Raises:
        UserError: the source, a template or the splits are unusable.
    """
    kinds = categories.kinds_of(options)
    templates = categories.load_templates(kinds, options.templates)
    revision = hub_revision(options.source)
    docs = read_pairs(options.source, left_out, revision)
    num_rows = len(docs) + len(left_out)
    # the format `chat` without a tokenizer belongs to a model that is chosen later
    if options.prompt_format != "chat" or tokenizer is not None:
        prompt_format = PromptFormat(options.prompt_format, tokenizer)
        docs = [doc for doc in docs if _fits(doc, prompt_format, left_out)]
    if not docs:
        reasons = common_reasons(left_out) if num_rows else "it is empty"
        raise UserError(
            f"the source {options.source} has no usable row among {num_rows}: {reasons}."
        )
    drawn = _ordered(docs, options.seed, rule)[: options.limit]
    return SetPlan(
        options=options,
        kinds=kinds,
        rule=rule,
        thinking_tokens=thinking_tokens,
        docs=splits.split_docs(drawn, options.heldout_frac, options.seed, left_out, rule),
        templates=templates,
        topics=_topics(drawn, options, rule) if "non_response" in kinds else {},
        left_out=left_out,
        revision=revision,
        num_rows=num_rows,
        num_not_drawn=len(docs) - len(drawn),
    )


def _fits(doc: Doc, prompt_format: PromptFormat, left_out: list[LeftOut]) -> bool:
    """Return whether the prompt format has a place for every turn."""
    try:
        prompt_format.render(list(doc.messages))
    except UserError as error:
        left_out.append(LeftOut(place=doc.place, doc_id=doc.doc_id, reason=str(error)))
        return False
    return True


def _key(doc: Doc, seed: int) -> bytes:
    pair = {side: doc.responses[side] for side in ("chosen", "rejected")}
    return splits.draw_key({"messages": doc.messages, **pair}, seed)


def _ordered(docs: list[Doc], seed: int, rule: int) -> list[Doc]:
    """Return docs in the order in which they are drawn and written."""
    if rule == 1:
        return splits.shuffled(docs, seed)
    return sorted(docs, key=lambda doc: _key(doc, seed))


def _topics(drawn: list[Doc], options: SynthRun, rule: int) -> dict[str, str]:
    """Return the topic of each doc by its id."""
    parts = categories.read_topics(options.templates, len(drawn))
    if rule == 1:
        topics = categories.order_topics(parts, options.seed)
        return {doc.doc_id: topic for doc, topic in zip(drawn, topics, strict=False)}
    keys = {doc.doc_id: _key(doc, options.seed) for doc in drawn}
    return {doc_id: categories.topic_of(parts, key) for doc_id, key in keys.items()}


def write_texts(
    plan: SetPlan, ask: Ask, note_fault: Callable[[str], None] = lambda _: None
) -> Written:
    """Have every text written and checked, and a text that fails a second time.

    Docs with a text that fails twice go to `plan.left_out`. `note_fault` is called with the fault
    of each text, for the live line.

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
        if not self._plan.options.judge:
            yield from checked
            return
        held, extra = list(checked), self._plan.thinking_tokens
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
    prompt_format = PromptFormat(plan.options.prompt_format, tokenizer)
    docs, requests = {doc.doc_id: doc for doc in plan.docs}, []
    for doc in plan.docs:
        prompt = prompt_format.render(list(doc.messages))
        request = categories.request_of(
            doc,
            "untrained",
            template=UNTRAINED_TEMPLATE,
            template_sha256=hashlib.sha256(prompt_format.name.encode()).hexdigest(),
            prompt=(prompt.text + prompt.separator).rstrip(" "),
            source_text=doc.messages[-1]["content"],
            temperature=0.0,
        )
        requests.append(request)
    for request, answer in _answered(ask(iter(requests), len(requests))):
        if answer.status == "ok" and (answer.text or "").strip():
            written.accept(request, answer)
            continue
        fault = "empty" if answer.status == "ok" else answer.status
        written.last_faults["untrained", fault] += 1
        plan.leave_out(docs[request.doc_id], f"`untrained`: {fault}")


def finish_docs(plan: SetPlan, written: Written) -> list[Doc]:
    """Return the docs that have every text, `random` drawn among them.

    Raises:
        UserError: too few docs are left.
    """
    out = {item.doc_id for item in plan.left_out}
    docs: list[Doc] = []
    trained_texts: set[str] = set()
    for doc in sorted(plan.docs, key=lambda doc: doc.split != "train"):  # train first
        if doc.doc_id in out:
            continue
        made = dict(written.texts.get(doc.doc_id, {}))
        if "permuted" in plan.kinds:
            key = doc.doc_id if plan.rule == 1 else _key(doc, plan.options.seed).hex()
            text = categories.permuted(doc.responses["chosen"], f"{plan.options.seed} {key}")
            if text is None:
                plan.leave_out(doc, "`permuted`: the words of chosen have one order only")
                continue
            made["permuted"] = text
        texts = doc.responses | {kind: made[kind] for kind in plan.kinds if kind != "random"}
        if doc.split == "train":
            trained_texts.update(texts.values())
        elif not trained_texts.isdisjoint(texts.values()):
            plan.leave_out(doc, "held out, but a text written for it is in train")
            continue
        docs.append(replace(doc, responses=texts))
    splits.check_sizes(docs, plan.left_out)
    is_random_drawn = "random" in plan.kinds
    return splits.with_random_in_splits(docs, plan.options.seed) if is_random_drawn else docs
