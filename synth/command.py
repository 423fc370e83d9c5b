"""What `sft-probe synth` does: from preference pairs to a probe set."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_probe.command_line import config_of, log_written, write_config
from sft_probe.errors import UserError, check_names
from sft_probe.files import read_object
from sft_probe.probe_set import LeftOut, train_command
from sft_probe.synth import build, output
from sft_probe.synth.asking.budget import Limits, UselessRunError, parse_price
from sft_probe.synth.asking.live import Progress, ask_all
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.asking.store import Store, open_copy, request_key
from sft_probe.synth.categories import KINDS, SOURCE_OF, kinds_of
from sft_probe.synth.estimate import describe_cost
from sft_probe.synth.options import SynthRun
from sft_probe.synth.sources import HH
from sft_probe.synth.writers import EMBEDDED_WRITER, make_writer, name_writer, thinking_tokens

if TYPE_CHECKING:
    from sft_probe.synth.writers import AnyWriter
    from sft_probe.synth.writers.hf import HfWriter

_LOG = logging.getLogger(__name__)
_OFFLINE_NOTE = (
    "The texts of the writer `offline` are pieces of the embedded set, drawn by a hash. They have "
    "the requested length but do not mean what their category says: this set is for trying things "
    "out."
)
_MADE_BY = {
    "chosen": "source",
    "rejected": "source",
    "random": "derangement of chosen within the split",
    "permuted": "words of chosen, shuffled",
}


def run_synth(options: SynthRun) -> None:
    """Write a set, or print what it would cost."""
    _check(options)
    kinds = kinds_of(options)
    left_out: list[LeftOut] = []
    needs_writer = not SOURCE_OF.keys().isdisjoint(kinds)
    plan_options: dict[str, Any] = {
        "rule": output.rule_of(options.out),
        "thinking_tokens": thinking_tokens(options) if needs_writer else 0,
    }
    if options.dry_run:  # needs neither key nor package, and writes nothing
        writer = name_writer(options) if needs_writer else None
        plan = build.plan_set(options, left_out, **plan_options)
        print(describe_cost(plan, writer, _limits(options), options.out / output.STORE))  # noqa: T201
        return
    # before anything is paid for: the model may be missing, or its template may not fit a prompt
    untrained = None
    if "untrained" in kinds:
        from sft_probe.synth.writers.hf import HfWriter

        untrained = HfWriter(options.untrained_model or EMBEDDED_WRITER, is_chat=False)
    writer = make_writer(options) if needs_writer else None
    output.begin_set(options.out)
    config = options.out / output.WORK_DIR / "config.yaml"
    write_config(config, "sft-probe synth run", config_of(options))
    try:
        with Store(options.out / output.STORE) as store:
            tokenizer = untrained.tokenizer if untrained else None
            plan = build.plan_set(options, left_out, tokenizer=tokenizer, **plan_options)
            _write(options, plan, store, writer, untrained)
    except KeyboardInterrupt:
        _LOG.warning("stopped; run the same command to resume")
        raise SystemExit(130) from None
    finally:
        if left_out:
            output.write_left_out(options.out, left_out)


def _check(options: SynthRun) -> None:
    """Raise `UserError` where options do not fit together."""
    kinds = kinds_of(options)
    check_names("--categories", "category", kinds, KINDS)
    written = [kind for kind in kinds if kind in SOURCE_OF]
    if written and not options.writer:
        raise UserError(
            f"a model writes {', '.join(written)}: give --writer (gemini, openai, hf, ..., or "
            "offline to try things out), or --categories random, which needs no model."
        )
    if options.judge and options.writer == "offline":
        raise UserError(
            "--judge needs a writer that can read, and offline is not a model. Choose another "
            "--writer."
        )
    output.check_directory(options.out, options.source)


def _write(
    options: SynthRun,
    plan: build.SetPlan,
    store: Store,
    writer: "AnyWriter | None",
    untrained: "HfWriter | None",
) -> None:
    """Have the texts of a plan written, and write the set."""
    counts = (plan.num_rows, len(plan.docs), plan.num_requests)
    _LOG.info("%d rows read; %d docs with %d texts to write", *counts)
    keys: set[str] = set()
    written, writers = build.Written(), {name: _MADE_BY[name] for name in ("chosen", "rejected")}
    writers |= {kind: _MADE_BY.get(kind, "") for kind in plan.kinds}
    if writer:
        written = _Asker(writer, store, _limits(options), keys).write_texts(plan)
        is_offline = writer.name == "offline"
        for kind, template in plan.templates.items():
            made_from = "pieces of the embedded set" if is_offline else template.name
            writers[kind] = f"{writer.name} {writer.model}, {made_from}"
    if untrained:
        local = _Asker(untrained, store, _local_limits(), keys)
        build.write_untrained(plan, written, untrained.tokenizer, local.ask)
        writers["untrained"] = f"{untrained.name} {untrained.model}, {build.UNTRAINED_TEMPLATE}"
    docs = build.finish_docs(plan, written)
    is_hh = options.source.partition(":")[0] == HH
    facts = {
        "license": options.license or ("mit" if is_hh else "unknown"),
        # of this set's texts alone, so that the same set has the same card
        "cost_usd": round(store.cost_of(keys), 6),
        "note": _OFFLINE_NOTE if options.writer == "offline" and plan.templates else None,
    }
    output.write_set(options.out, docs, plan, written, writers=writers, facts=facts)
    number = len({item.place for item in plan.left_out})
    reasons = f"{number}, with the reasons in synthesis/rejected_rows.jsonl" if number else "none"
    _LOG.info("%d docs; rows left out: %s", len(docs), reasons)
    log_written([options.out], train_command(str(options.out), docs[0].responses))


class _Asker:
    """Asks one writer, collects the key of each answer, and shows faults in the live line."""

    def __init__(self, writer: "AnyWriter", store: Store, limits: Limits, keys: set[str]) -> None:
        self._writer, self._store, self._limits, self._keys = writer, store, limits, keys

    def ask(self, requests: Iterator[Request], total: int) -> Iterator[tuple[Request, Answer]]:
        """Yield every request with its answer, in order."""
        self._progress = Progress(total)
        answers = ask_all(
            requests, self._writer, self._store, self._limits, progress=self._progress
        )
        with contextlib.closing(answers):
            for request, answer in answers:
                self._keys.add(request_key(self._writer, request))
                yield request, answer

    def write_texts(self, plan: build.SetPlan) -> build.Written:
        """Have the texts of a plan written."""

        def note_fault(fault: str) -> None:
            self._progress.failed(fault)  # of the request that is asked now

        try:
            return build.write_texts(plan, self.ask, note_fault)
        except UselessRunError as error:  # the cause may lie in the server, where it can be fixed
            self._store.forget_without_text(self._writer, error.category)
            raise


def _limits(options: SynthRun) -> Limits:
    """Return the limits that the options set."""
    if options.writer == "hf":
        return _local_limits()
    rates = ("concurrency", "requests_per_minute", "tokens_per_minute")
    names = (*rates, "max_cost_usd", "max_wait_s")
    price = parse_price(options.price) if options.price else None
    return Limits(price=price, **{name: getattr(options, name) for name in names})


def _local_limits() -> Limits:
    """Return the limits of a local model: full batches, and no time-out, since a call waits for
    earlier batches."""
    from sft_probe.synth.writers.hf import CONCURRENCY

    return Limits(concurrency=CONCURRENCY, timeout_s=86400.0)


def print_status(directory: Path) -> None:
    """Print the texts written so far, by category, and what they cost."""
    path, manifest = directory / output.STORE, directory / "probe_set.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: `sft-probe synth run` has written nothing in {directory}."
        )
    row = "{:<20}{:<12}{:>8}{:>12}{:>12}{:>12}".format
    lines = [row("category", "status", "texts", "tokens in", "tokens out", "USD")]
    with open_copy(path) as store:
        lines += [row(*count[:-1], f"{count[-1]:.4f}") for count in store.counts()]
        num_lost, lost_usd = store.lost_calls()
        lines.append(
            f"spent: {store.cost_usd():.4f} USD, of it {lost_usd:.4f} for {num_lost} calls without "
            "an answer"
        )
    lines.append("set: not written yet")
    if manifest.is_file():
        counts = read_object(manifest, {"counts": dict})["counts"]
        lines[-1] = f"set: {counts.get('train', 0)} train, {counts.get('heldout', 0)} heldout"
    print("\n".join(lines))  # noqa: T201
