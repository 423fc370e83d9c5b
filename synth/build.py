"""From a source to checked docs: draw, split, have the texts written, check them, leave out what
fails twice."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.prompts import PromptFormat
from sft_probe.synth import first_rule
from sft_probe.synth.asking.budget import Trial
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.categories import (
    Template,
    load_templates,
    make_requests,
    permuted,
    read_topics,
    topic_of,
)
from sft_probe.synth.checks import FAULT, fault_in, fault_of, opinion_request
from sft_probe.synth.duplicates import NearDuplicates, count_words
from sft_probe.synth.sources import Rejected, SourcePair, hub_revision, read_pairs
from sft_probe.synth.splits import (
    RULE,
    add_random,
    check_sizes,
    conversation_id,
    draw_key,
    split_pairs,
)

UNTRAINED_TEMPLATE = "untrained@1"
Obtain = Callable[[Iterator[Request], int], Iterator[tuple[Request, Answer]]]
"""Gives every request, of which the number is told, its answer, in order."""
Checked = tuple[Request, Answer, str | None]
"""A request, its answer, and what is wrong with it."""


def _ignore(_: str) -> None:
    """Note nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a set is made from, as asked for."""

    source: str
    kinds: tuple[str, ...]
    """Categories beside chosen and rejected."""
    templates: Path | None
    prompt_format: str
    heldout_frac: float | None
    limit: int | None
    seed: int
    thinking_tokens: int = 0
    """Room for a model's thoughts, on top of the output limit of each text."""
    judge: bool = False
    """Whether the writer is asked about each text that passes the checks."""
    rule: int = RULE
    """Version of the rule by which docs are drawn, split and given topics."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The pairs that a set is made from, before anything is written."""

    settings: Settings
    pairs: list[SourcePair]
    templates: dict[str, Template]
    topics: dict[str, str]
    """By doc_id."""
    rejected: Rejected
    revision: str | None
    """Of a hub source."""
    num_rows: int
    """Rows of the source."""
    num_not_drawn: int
    """Usable rows that `limit` left behind."""

    @property
    def num_requests(self) -> int:
        """How many texts the writer is asked for when none fails a check."""
        return len(self.pairs) * len(self.templates)

    def requests(self) -> Iterator[Request]:
        """Yield what the writer is asked, doc by doc."""
        extra = self.settings.thinking_tokens
        for pair in self.pairs:
            for request in make_requests(pair, self.templates, self.topics[pair.doc_id]):
                yield replace(request, max_output_tokens=request.max_output_tokens + extra)


@dataclass(kw_only=True)
class Written:
    """Texts that passed, and what became of the others."""

    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """By doc_id and category."""
    sample_index: dict[str, dict[str, int]] = field(default_factory=dict)
    """0, or 1 for a text that was written twice; by doc_id and category."""
    first_faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults of first texts, by category and fault."""
    last_faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults that a second text did not mend."""
    model_versions: set[str] = field(default_factory=set)
    opinions: Counter[str] = field(default_factory=Counter)
    """What the writer says of its texts: `yes`, `judged` (bad) or `no verdict`."""

    def accept(self, request: Request, answer: Answer) -> None:
        """Keeps a text."""
        self.texts.setdefault(request.doc_id, {})[request.category] = (answer.text or "").strip()
        self.sample_index.setdefault(request.doc_id, {})[request.category] = request.sample_index
        self.model_versions.add(f"{request.category}: {answer.model_version}")


def make_plan(settings: Settings, rejected: Rejected, tokenizer: Any = None) -> Plan:
    """Reads the source, draws, splits.

    Args:
        settings: what is asked for.
        rejected: gets what is left out.
        tokenizer: of the untrained model, where its answers are asked for; every prompt must fit
        its chat template.

    Raises:
        UserError: the source, a template or the splits are unusable.
    """
    templates = load_templates(settings.kinds, settings.templates)
    revision = hub_revision(settings.source)
    pairs = read_pairs(settings.source, rejected, revision)
    num_rows = len(pairs) + len(rejected.rows)
    if (
        settings.prompt_format != "chat" or tokenizer is not None
    ):  # else it is a model's own, known only later
        prompt_format = PromptFormat(settings.prompt_format, tokenizer)
        pairs = [pair for pair in pairs if _has_format(pair, prompt_format, rejected)]
    if not pairs:
        reasons = rejected.reasons() if num_rows else "it is empty"
        raise UserError(f"the source {settings.source} has no usable row of {num_rows}: {reasons}.")
    ordered = _ordered(pairs, settings)
    drawn = ordered[: settings.limit]
    return Plan(
        settings=settings,
        pairs=split_pairs(drawn, settings.heldout_frac, settings.seed, rejected, settings.rule),
        templates=templates,
        topics=_topics(drawn, settings),
        rejected=rejected,
        revision=revision,
        num_rows=num_rows,
        num_not_drawn=len(pairs) - len(drawn),
    )


def _key(pair: SourcePair, seed: int) -> bytes:
    return draw_key(
        {"messages": pair.messages, "chosen": pair.chosen, "rejected": pair.rejected}, seed
    )


def _ordered(pairs: list[SourcePair], settings: Settings) -> list[SourcePair]:
    """The pairs in the order in which they are drawn and written."""
    if settings.rule == 1:
        return first_rule.draw_order(pairs, settings.seed)
    return sorted(pairs, key=lambda pair: _key(pair, settings.seed))


def _topics(drawn: list[SourcePair], settings: Settings) -> dict[str, str]:
    """The topic of each doc by its id, where topics are asked for."""
    if "non_response" not in settings.kinds:
        return dict.fromkeys((pair.doc_id for pair in drawn), "")
    parts = read_topics(settings.templates, len(drawn))
    if settings.rule == 1:
        topics = first_rule.order_topics(parts, settings.seed)
        return {pair.doc_id: topic for pair, topic in zip(drawn, topics, strict=False)}
    return {pair.doc_id: topic_of(parts, _key(pair, settings.seed)) for pair in drawn}


def write_texts(plan: Plan, obtain: Obtain, note_fault: Callable[[str], None] = _ignore) -> Written:
    """Have every text written and checked, a second time where it fails; docs that fail twice go to
    `plan.rejected`.

    Args:
        plan: what is written.
        obtain: gives the answers.
        note_fault: is told what is wrong with a text, for the live line.

    Raises:
        UserError: some texts have no answer, or nothing that comes back can be used.
    """
    keeper, again = _Keeper(plan, obtain, note_fault), []
    for request, answer, fault in keeper.checked(plan.requests(), plan.num_requests, Trial()):
        if fault and answer.is_turned_down:  # a second try would be the same request
            keeper.leave_out(request, fault, f": not taken by the server: {answer.reason}")
        elif fault:
            keeper.written.first_faults[request.category, fault] += 1
            again.append(replace(request, sample_index=1))
    for request, _, fault in keeper.checked(iter(again), len(again)):
        if fault:
            keeper.leave_out(request, fault, f", written twice: {fault}")
    return keeper.written


class _Keeper:
    """Keeps the texts that pass the checks, and leaves out docs whose texts do not."""

    def __init__(self, plan: Plan, obtain: Obtain, note_fault: Callable[[str], None]) -> None:
        self.written = Written()
        self._plan, self._obtain, self._note_fault = plan, obtain, note_fault
        self._pairs = {pair.doc_id: pair for pair in plan.pairs}
        self._indexes = {kind: NearDuplicates() for kind in plan.templates}

    def checked(
        self, requests: Iterator[Request], number: int, trial: Trial | None = None
    ) -> Iterator[Checked]:
        """Yield each request with its answer and what is wrong with it; keep the texts with which
        nothing is.

        Raises:
            UserError: some have no answer, or the trial ends the run.
        """
        for request, answer, fault in self._judged(self._looked_at(requests, number, trial), trial):
            if fault is None:
                self.written.accept(request, answer)
            yield request, answer, fault
        if self.written.opinions[FAULT]:  # a second text may be like one that was turned down
            self._indexes = {kind: NearDuplicates() for kind in self._plan.templates}
            for texts in self.written.texts.values():
                for kind, text in texts.items():
                    self._indexes[kind].add(text)

    def _looked_at(
        self, requests: Iterator[Request], number: int, trial: Trial | None
    ) -> Iterator[Checked]:
        """Yield each answer with the fault that the checks see."""
        for request, answer in _answered(self._obtain(requests, number)):
            pair, index = self._pairs[request.doc_id], self._indexes[request.category]
            fault = fault_of(request, answer, pair, self._plan.templates[request.category])
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
        """Have the writer say which of the texts that passed are bad, where this is asked for; hold
        them meanwhile."""
        if not self._plan.settings.judge:
            yield from checked
            return
        held, extra = list(checked), self._plan.settings.thinking_tokens
        opinions = {
            i: opinion_request(request, str(answer.text), extra)
            for i, (request, answer, fault) in enumerate(held)
            if fault is None
        }
        found: dict[str, str | None] = {}
        for opinion, answer in _answered(self._obtain(iter(opinions.values()), len(opinions))):
            found[opinion.prompt] = fault = fault_in(answer)
            self.written.opinions[fault or "yes"] += 1
            if fault == FAULT:
                self._note_fault(fault)
            if trial:
                trial.note(opinion.category, answer, fault)
        for i, (request, answer, fault) in enumerate(held):
            is_bad = i in opinions and found.get(opinions[i].prompt) == FAULT
            yield request, answer, FAULT if is_bad else fault

    def leave_out(self, request: Request, fault: str, why: str) -> None:
        """Leave a doc out for the fault of one of its texts."""
        self.written.last_faults[request.category, fault] += 1
        self._plan.rejected.add(self._pairs[request.doc_id], f"`{request.category}`{why}")


def _answered(answers: Iterator[tuple[Request, Answer]]) -> Iterator[tuple[Request, Answer]]:
    """Raises `UserError` at the end where some were never given: a set without them would be
    another one next time."""
    missing: Counter[str] = Counter()
    for request, answer in answers:
        if answer.status == "error":
            missing[str(answer.reason)] += 1
        else:
            yield request, answer
    if missing:
        raise UserError(
            f"{missing.total()} texts have no answer (most often: "
            f"{missing.most_common(1)[0][0]}), so the set is not "
            "written. All others are stored; run the same command again."
        )


def write_untrained(plan: Plan, written: Written, tokenizer: Any, obtain: Obtain) -> None:
    """Adds the answers of the untrained model to the rendered prompts; what it cannot end in a
    sentence is left out."""
    prompt_format = PromptFormat(plan.settings.prompt_format, tokenizer)
    pairs = {pair.doc_id: pair for pair in plan.pairs}
    requests = [_untrained_request(pair, prompt_format) for pair in plan.pairs]
    for request, answer in _answered(obtain(iter(requests), len(requests))):
        fault = (
            answer.status
            if answer.status != "ok"
            else None
            if (answer.text or "").strip()
            else "empty"
        )
        if fault:
            written.last_faults["untrained", fault] += 1
            plan.rejected.add(pairs[request.doc_id], f"`untrained`: {fault}")
        else:
            written.accept(request, answer)


def make_docs(plan: Plan, written: Written) -> list[dict[str, Any]]:
    """The docs of the set: those with every text, `random` drawn among them.

    Raises:
        UserError: too few docs are left.
    """
    out = {row["doc_id"] for row in plan.rejected.rows if "doc_id" in row}
    docs: list[dict[str, Any]] = []
    trained_texts: set[str | None] = set()
    for pair in sorted(plan.pairs, key=lambda pair: pair.split != "train"):  # train first
        if pair.doc_id in out:
            continue
        texts = _texts(pair, plan.settings, written)
        responses = {text for text in texts.values() if text is not None}
        if None in texts.values():
            plan.rejected.add(pair, "`permuted`: the words of chosen have one order only")
        elif pair.split == "heldout" and not trained_texts.isdisjoint(responses):
            plan.rejected.add(pair, "held out, but a text written for it is in train")
        else:
            if pair.split == "train":
                trained_texts |= responses
            docs.append(_doc(pair, texts, written))
    check_sizes([doc["split"] for doc in docs], plan.rejected)
    if "random" in plan.settings.kinds:
        for split in ("train", "heldout"):
            add_random([doc for doc in docs if doc["split"] == split], plan.settings.seed)
    return docs


def _texts(pair: SourcePair, settings: Settings, written: Written) -> dict[str, str | None]:
    made: dict[str, str | None] = {**written.texts.get(pair.doc_id, {})}
    if "permuted" in settings.kinds:
        key = pair.doc_id if settings.rule == 1 else _key(pair, settings.seed).hex()
        made["permuted"] = permuted(pair, f"{settings.seed} {key}")
    return {"chosen": pair.chosen, "rejected": pair.rejected} | {
        kind: made[kind] for kind in settings.kinds if kind != "random"
    }


def _doc(pair: SourcePair, texts: dict[str, str | None], written: Written) -> dict[str, Any]:
    num_words = count_words(pair.chosen)
    ratios = {
        kind: round(count_words(str(text)) / num_words, 3)
        for kind, text in texts.items()
        if kind != "chosen"
    }
    return {
        "doc_id": pair.doc_id,
        "conversation_id": conversation_id(pair),
        "split": pair.split,
        "messages": pair.messages,
        **texts,
        "meta": {
            "file": pair.file,
            "line": pair.line,
            "length_ratio": ratios,
            "sample_index": written.sample_index.get(pair.doc_id, {}),
        },
    }


def _has_format(pair: SourcePair, prompt_format: PromptFormat, rejected: Rejected) -> bool:
    """Whether the prompt format has a place for every turn."""
    try:
        prompt_format.render(pair.messages)
    except UserError as error:
        rejected.add(pair, str(error))
        return False
    return True


def _untrained_request(pair: SourcePair, prompt_format: PromptFormat) -> Request:
    prompt = prompt_format.render(pair.messages)
    num_words = count_words(pair.chosen)
    return Request(
        doc_id=pair.doc_id,
        category="untrained",
        template=UNTRAINED_TEMPLATE,
        template_sha256=hashlib.sha256(prompt_format.name.encode()).hexdigest(),
        prompt=(prompt.text + prompt.separator).rstrip(" "),
        source_text=pair.messages[-1]["content"],
        num_words=num_words,
        temperature=0.0,
        max_output_tokens=max(1024, 4 * num_words),
    )
