"""What `sft-probe synth` does: from preference pairs to a probe set."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sft_probe.errors import UserError
from sft_probe.synth.options import SynthRun

if TYPE_CHECKING:
    from sft_probe.synth.asking.batch import BatchWriter
    from sft_probe.synth.asking.budget import Limits
    from sft_probe.synth.asking.protocol import Answer, Named, Request, Writer
    from sft_probe.synth.asking.store import Store
    from sft_probe.synth.build import SetPlan
    from sft_probe.synth.writers.hf import HfWriter

    AnyWriter = Writer | BatchWriter

_log = logging.getLogger(__name__)
_GEMINI = "gemini-3.5-flash-lite"
_MODELS = {
    "hf": "smollm2-135m-instruct-q4_1",
    "gemini": _GEMINI,
    "gemini-legacy": _GEMINI,
    "gemini-batch": _GEMINI,
}

_OFFLINE_NOTE = (
    "The texts of the writer `offline` are pieces of the embedded set, drawn by a hash. They have "
    "the length that "
    "is asked for and do not mean what their category says: this set is for trying things out."
)


def run_synth(options: SynthRun) -> None:
    """Write a set, or print what it would cost."""
    from sft_probe.probe_set import LeftOut
    from sft_probe.synth.asking.store import Store
    from sft_probe.synth.build import SetSettings, plan_set
    from sft_probe.synth.categories import DEFAULT_KINDS, KINDS
    from sft_probe.synth.output import STORE, begin_set, check_directory, rule_of, write_left_out

    kinds = options.categories or DEFAULT_KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(
            f"--categories: {', '.join(unknown)} cannot be made; there are {', '.join(KINDS)}."
        )
    if options.judge and options.writer == "offline":
        raise UserError(
            "--judge needs a writer that can read; offline is no model. Choose another --writer."
        )
    check_directory(options.out, options.source)
    names = ("source", "templates", "prompt_format", "heldout_frac", "limit", "seed", "judge")
    fields = {name: getattr(options, name) for name in names}
    settings = SetSettings(
        kinds=kinds, rule=rule_of(options.out), thinking_tokens=_thinking_tokens(options), **fields
    )
    left_out: list[LeftOut] = []
    if options.dry_run:  # needs neither key nor package, and writes nothing
        _print_estimate(options, plan_set(settings, left_out))
        return
    # made before anything is paid for: it may not be there, or have no place for a prompt
    untrained = _untrained_writer(options) if "untrained" in kinds else None
    writer = _writer(options)
    begin_set(options.out)
    try:
        with Store(options.out / STORE) as store:
            plan = plan_set(settings, left_out, untrained.tokenizer if untrained else None)
            _write(options, plan, store, writer, untrained)
    except KeyboardInterrupt:
        _log.warning("stopped; the same command resumes")
        raise SystemExit(130) from None
    finally:
        if left_out:
            write_left_out(options.out, left_out)


def _write(
    options: SynthRun,
    plan: "SetPlan",
    store: "Store",
    writer: "AnyWriter",
    untrained: "HfWriter | None",
) -> None:
    """Have the texts of a plan written, and write the set."""
    from sft_probe.synth.asking.budget import UselessRunError
    from sft_probe.synth.build import UNTRAINED_TEMPLATE, finish_docs, write_texts, write_untrained
    from sft_probe.synth.output import write_set

    _log.info(
        "%d rows read, %d docs to be written, %d texts",
        plan.num_rows,
        len(plan.docs),
        plan.num_requests,
    )
    keys: set[str] = set()
    asker = _Asker(writer, store, _limits(options), keys)
    try:
        written = write_texts(plan, asker.obtain, asker.note_fault)
    except UselessRunError as error:  # its cause may be in the server, where it can be fixed
        store.forget_without_text(writer, error.category)
        raise
    writers = _written_by(plan, writer)
    if untrained:
        local = _Asker(untrained, store, _local_limits(), keys)
        write_untrained(plan, written, untrained.tokenizer, local.obtain)
        writers["untrained"] = f"{untrained.name} {untrained.model}, {UNTRAINED_TEMPLATE}"
    docs = finish_docs(plan, written)
    # of the texts of this set alone, whatever else was asked or lost: the same set has the same
    # card
    facts = {
        "license": _license(options),
        "cost_usd": round(store.cost_of(keys), 6),
        "note": _OFFLINE_NOTE if options.writer == "offline" and plan.templates else None,
    }
    write_set(options.out, docs, plan, written, writers=writers, facts=facts)
    _log.info("wrote %s: %d docs; rows left out: %s", options.out, len(docs), _left_out(plan))


def _left_out(plan: "SetPlan") -> str:
    number = len({item.place for item in plan.left_out})
    return f"{number}, with the reasons in synthesis/rejected_rows.jsonl" if number else "none"


def print_status(directory: Path) -> None:
    """Print the texts written so far, by category, and what they cost."""
    from sft_probe.synth.asking.store import open_copy
    from sft_probe.synth.output import STORE

    path = directory / STORE
    if not path.is_file():
        raise UserError(
            f"{path} is missing: nothing was written in {directory} by `sft-probe synth`."
        )
    with open_copy(path) as store:
        lines = [
            f"{'category':<20}{'status':<12}{'texts':>8}{'tokens in':>12}"
            f"{'tokens out':>12}{'USD':>12}"
        ]
        for count in store.counts():
            lines.append(
                f"{count.category:<20}{count.status:<12}{count.num_answers:>8}{count.num_prompt_tokens:>12}"
                f"{count.num_output_tokens:>12}{count.cost_usd:>12.4f}"
            )
        num_lost, lost_usd = store.lost_calls()
        lines.append(
            f"spent: {store.cost_usd():.4f} USD, of it {lost_usd:.4f} for {num_lost} calls without "
            "an answer"
        )
    lines.append(_set_line(directory / "probe_set.json"))
    print("\n".join(lines))  # noqa: T201


def _set_line(manifest: Path) -> str:
    from sft_probe.files import read_object

    if not manifest.is_file():
        return "set: not written yet"
    counts = read_object(manifest, {"counts": dict})["counts"]
    return f"set: {counts.get('train', 0)} train, {counts.get('heldout', 0)} heldout"


@dataclass
class _Unasked:
    """A remote writer by name alone."""

    name: str
    model: str
    api_version: str


def _named(options: SynthRun) -> "Named":
    if options.writer in ("hf", "offline"):
        return _writer(options)
    from sft_probe.synth.writers import key_version

    model = _model(options)
    api_version = "v1" if options.writer == "openai" else "v1beta"
    return _Unasked(options.writer, model, key_version(api_version, options.writer, model))


def _thinking_tokens(options: SynthRun) -> int:
    """Return the room for thoughts, and say what a model that thinks is told."""
    from sft_probe.synth.writers import least_thinking

    model = _model(options)
    thinking = least_thinking(options.writer, model)
    num_tokens = int(options.thinking_tokens or thinking.num_tokens)
    if thinking.config or num_tokens:
        said = [f"{name} {value}" for name, value in thinking.config.items()]
        said += [f"{num_tokens} tokens more in the output limit"] if num_tokens else []
        _log.info("%s thinks before it writes, so it is asked with %s", model, ", ".join(said))
    return num_tokens


def _model(options: SynthRun) -> str:
    model = options.model or _MODELS.get(options.writer)
    if model is None and options.writer != "offline":
        raise UserError(f"--writer {options.writer} needs --model.")
    return str(model)


def _writer(options: SynthRun) -> "AnyWriter":
    try:
        return _make_writer(options.writer, _model(options), options.base_url)
    except ImportError as error:
        extra = options.writer.replace("gemini-batch", "gemini")
        raise UserError(
            f"--writer {options.writer} needs more packages ({error}). Run:  pip install "
            f"'sft-probe[{extra}]'"
        ) from error


def _make_writer(name: str, model: str, base_url: str | None) -> "AnyWriter":
    if name == "offline":
        from sft_probe.synth.writers.offline import OfflineWriter

        return OfflineWriter()
    if name == "hf":
        from sft_probe.synth.writers.hf import HfWriter

        return HfWriter(model)
    if name == "gemini":
        from sft_probe.synth.writers.gemini import GeminiWriter

        return GeminiWriter(model, base_url=base_url)
    if name == "gemini-legacy":
        from sft_probe.synth.writers.gemini_legacy import LegacyGeminiWriter

        return LegacyGeminiWriter(model, base_url=base_url)
    if name == "gemini-batch":
        from sft_probe.synth.writers.gemini import GeminiBatchWriter

        return GeminiBatchWriter(model, base_url=base_url)
    from sft_probe.synth.writers.openai import OpenAIWriter

    return OpenAIWriter(model, base_url=base_url)


class _Asker:
    """Asks one writer, notes the key of each answer, and shows in the live line what fails."""

    def __init__(
        self, writer: "AnyWriter", store: "Store", limits: "Limits", keys: set[str]
    ) -> None:
        self._writer, self._store, self._limits, self._keys = writer, store, limits, keys

    def obtain(
        self, requests: "Iterator[Request]", total: int
    ) -> "Iterator[tuple[Request, Answer]]":
        """Yield every request with its answer, in order."""
        from sft_probe.synth.asking.live import Progress, obtain
        from sft_probe.synth.asking.store import request_key

        self._progress = Progress(total)
        answers = obtain(requests, self._writer, self._store, self._limits, progress=self._progress)
        with contextlib.closing(answers):
            for request, answer in answers:
                self._keys.add(request_key(self._writer, request))
                yield request, answer

    def note_fault(self, fault: str) -> None:
        """Show that a text does not pass a check."""
        self._progress.failed(fault)


def _limits(options: SynthRun) -> "Limits":
    from sft_probe.synth.asking.budget import Limits, parse_price

    if options.writer == "hf":
        return _local_limits()
    return Limits(
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        max_cost_usd=options.max_cost_usd,
        max_wait_s=options.max_wait_s,
        price=parse_price(options.price) if options.price else None,
    )


def _local_limits() -> "Limits":
    """Of a local model: full batches, and no time-out, since a call waits for the batches before
    it."""
    from sft_probe.synth.asking.budget import Limits
    from sft_probe.synth.writers.hf import CONCURRENCY

    return Limits(concurrency=CONCURRENCY, timeout_s=86400.0)


def _untrained_writer(options: SynthRun) -> "HfWriter":
    from sft_probe.synth.writers.hf import HfWriter

    return HfWriter(options.untrained_model or _MODELS["hf"], is_chat=False)


def _written_by(plan: "SetPlan", writer: "AnyWriter") -> dict[str, str]:
    fixed = {
        "random": "derangement of chosen within the split",
        "permuted": "words of chosen, shuffled",
    }
    names = {"chosen": "source", "rejected": "source"}
    for kind in plan.settings.kinds:
        template = plan.templates.get(kind)
        made_by = (
            "pieces of the embedded set"
            if writer.name == "offline"
            else template.name
            if template
            else ""
        )
        names[kind] = (
            f"{writer.name} {writer.model}, {made_by}" if template else fixed.get(kind, "")
        )
    return names


def _license(options: SynthRun) -> str:
    is_hh = str(options.source).partition(":")[0] == "Anthropic/hh-rlhf"
    return str(options.license or ("mit" if is_hh else "unknown"))


def _print_estimate(options: SynthRun, plan: "SetPlan") -> None:
    from sft_probe.synth.asking.budget import estimate
    from sft_probe.synth.asking.store import open_copy
    from sft_probe.synth.output import STORE

    writer, limits, path = _named(options), _limits(options), options.out / STORE
    with open_copy(path) if path.is_file() else contextlib.nullcontext() as store:
        guess = estimate(
            plan.requests(), writer, store, limits.price, maybe_requests=_second_texts(plan)
        )
        num_stored = guess.num_stored
        if (
            store and not guess.calls
        ):  # all first texts are there, so it is known which of them fail
            missing = _missing_requests(plan, writer, store)
            # what the writer has not been asked about may be turned down yet
            maybe = _second_texts(plan) if options.judge and missing else ()
            guess = estimate(missing, writer, store, limits.price, maybe_requests=maybe)
        elif options.judge:
            guess = estimate(
                _with_opinions(plan),
                writer,
                store,
                limits.price,
                maybe_requests=_second_texts(plan),
            )
        left_usd = max(0.0, (limits.max_cost_usd or 0.0) - (store.cost_usd() if store else 0.0))
    if guess.cost_usd is None or guess.max_cost_usd is None:
        cost = "unknown; give --price INPUT,OUTPUT"
    else:
        most_usd = (
            guess.max_cost_usd if limits.max_cost_usd is None else min(left_usd, guess.max_cost_usd)
        )
        cost = f"{min(guess.cost_usd, most_usd):.4f} USD, at most {most_usd:.4f}"
    again = "one more or two" if options.judge else "one more"
    lines = [
        f"docs: {len(plan.docs)}; rows left out so far: {len(plan.left_out)}",
        f"calls: {guess.calls} ({num_stored} texts are stored), and {again} for each text that "
        "fails a check",
        f"tokens, by a guess: {guess.prompt_tokens} in, {guess.output_tokens} out",
        f"cost: {cost}",
    ]
    print("\n".join(lines))  # noqa: T201


def _with_opinions(plan: "SetPlan") -> "Iterator[Request]":
    """Yield the first texts, and what the writer will be asked about them."""
    from sft_probe.synth.checks import expected_opinion

    for request in plan.requests():
        yield request
        yield expected_opinion(request, plan.settings.thinking_tokens)


def _second_texts(plan: "SetPlan") -> "Iterator[Request]":
    """Yield every text that may be written a second time, with the longest opinions on both where
    they are asked."""
    from sft_probe.synth.checks import longest_opinion

    for request in plan.requests():
        second = replace(request, sample_index=1)
        yield second
        if plan.settings.judge:
            yield longest_opinion(request, plan.settings.thinking_tokens)
            yield longest_opinion(second, plan.settings.thinking_tokens)


def _missing_requests(plan: "SetPlan", writer: "Named", store: "Store") -> "list[Request]":
    """Return the opinions and second texts that are missing where all first texts are stored."""
    from sft_probe.synth.build import write_texts

    missing: list[Request] = []

    def stored(requests: "Iterator[Request]", _: int) -> "Iterator[tuple[Request, Answer]]":
        for request in requests:
            answer = store.get(writer, request)
            if answer is not None and answer.is_final:
                yield request, answer
            else:
                missing.append(request)

    write_texts(plan, stored)
    return missing
