"""`sft-probe synth`: from preference pairs to a probe set. Nothing heavy is imported before the command runs."""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft_probe import flags
from sft_probe.errors import UserError

if TYPE_CHECKING:
    from sft_probe.synth.batch import BatchWriter
    from sft_probe.synth.build import Obtain, Plan
    from sft_probe.synth.limits import Limits
    from sft_probe.synth.requests import Answer, Named, Request, Writer
    from sft_probe.synth.store import Store
    from sft_probe.synth.writers.hf import HfWriter

    AnyWriter = Writer | BatchWriter

_log = logging.getLogger(__name__)
WRITERS = ("gemini", "gemini-legacy", "gemini-batch", "openai", "hf", "offline")
_GEMINI = "gemini-3.5-flash-lite"
_MODELS = {
    "hf": "smollm2-135m-instruct-q4_1",
    "gemini": _GEMINI,
    "gemini-legacy": _GEMINI,
    "gemini-batch": _GEMINI,
}

_OFFLINE_NOTE = (
    "The texts of the writer `offline` are sentences of the embedded set, drawn by a hash. They have the length that "
    "is asked for and do not mean what their category says: this set is for trying things out."
)


def add_synth(command: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of `synth` and of `synth status`."""
    actions = command.add_subparsers(metavar="status", required=False)
    status = actions.add_parser("status", help="texts written so far, by category, and what they cost")
    status.add_argument("directory", type=Path, metavar="DIR")
    status.set_defaults(command=_status)
    command.add_argument("--source", help="a .jsonl, .jsonl.gz or .parquet file, a directory of them, or ID[:DATA_DIR] "
                         "on the hub (Anthropic/hh-rlhf is read as its helpful-base)")  # fmt: skip
    command.add_argument("--out", type=Path, metavar="DIR", help="directory of the set; the same one resumes")
    command.add_argument("--writer", choices=WRITERS)
    command.add_argument("--model", help="of the writer; default: gemini-3.5-flash-lite, for hf the embedded model")
    command.add_argument("--base-url", help="of the server; openai: needed but for OpenAI's own")
    command.add_argument("--dry-run", action="store_true", help="print calls, tokens and cost, and ask nothing")
    contents = command.add_argument_group("what the set holds")
    contents.add_argument("--categories", type=flags.names, default=None, metavar="A,B", help="beside chosen and "
                          "rejected; default: paraphrase,variant,random,non_response; also chosen_paraphrase, "
                          "format_flip, permuted, untrained")  # fmt: skip
    contents.add_argument("--untrained-model", help="whose own answer `untrained` is; default: the embedded model")
    contents.add_argument("--templates", type=Path, metavar="DIR", help="your prompts, named CATEGORY.txt")
    contents.add_argument("--prompt-format", default="hh", help="hh, chat, plain or a Jinja file; default: hh")
    contents.add_argument("--heldout-frac", type=flags.fraction, help="default: the source's own splits, else 0.2")
    contents.add_argument("--limit", type=flags.positive, help="docs at most, drawn at random")
    contents.add_argument("--seed", type=int, default=0)
    contents.add_argument("--license", help="of the source, for the card; default: mit for Anthropic/hh-rlhf")
    limits = command.add_argument_group("rates and money")
    limits.add_argument("--requests-per-minute", type=flags.rate)
    limits.add_argument("--tokens-per-minute", type=flags.rate, help="of prompts")
    limits.add_argument("--concurrency", type=flags.positive, default=16, help="calls in flight; default: 16")
    limits.add_argument("--max-cost-usd", type=flags.amount, help="of all runs on this directory; never passed")
    limits.add_argument("--price", metavar="INPUT,OUTPUT", help="USD per million tokens, in place of the price table")
    command.set_defaults(command=_synth)


def _synth(options: argparse.Namespace) -> None:
    from sft_probe.synth.build import (
        UNTRAINED_TEMPLATE,
        Settings,
        make_docs,
        make_plan,
        write_texts,
        write_untrained,
    )
    from sft_probe.synth.categories import DEFAULT_KINDS, KINDS
    from sft_probe.synth.output import STORE, begin_set, check_directory, rule_of, write_rejected, write_set
    from sft_probe.synth.sources import Rejected
    from sft_probe.synth.store import Store

    if not options.source or not options.writer or not options.out:
        raise UserError("synth needs --source, --writer and --out; or: sft-probe synth status DIR.")
    kinds = options.categories or DEFAULT_KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--categories: {', '.join(unknown)} cannot be made; there are {', '.join(KINDS)}.")
    check_directory(options.out, options.source)
    names = ("source", "templates", "prompt_format", "heldout_frac", "limit", "seed")
    rule = rule_of(options.out) if options.dry_run else begin_set(options.out)
    settings = Settings(kinds=kinds, rule=rule, **{name: getattr(options, name) for name in names})
    # made before anything is paid for: it may not be there, or have no place for a prompt
    untrained = _untrained_writer(options) if "untrained" in kinds and not options.dry_run else None
    store = Store(options.out / STORE)
    rejected = Rejected()
    try:
        plan = make_plan(settings, rejected, untrained.tokenizer if untrained else None)
        _log.info("%d rows read, %d docs to be written, %d texts", plan.num_rows, len(plan.pairs), plan.num_requests)
        limits = _limits(options)
        if options.dry_run:  # needs neither key nor package
            _print_estimate(plan, _named(options), store, limits)
            return
        writer = _writer(options)
        keys: set[str] = set()
        written = write_texts(plan, _obtain(writer, store, limits, keys))
        writers = _written_by(plan, writer)
        if untrained:
            write_untrained(plan, written, untrained.tokenizer, _obtain(untrained, store, _local_limits(), keys))
            writers["untrained"] = f"{untrained.name} {untrained.model}, {UNTRAINED_TEMPLATE}"
        docs = make_docs(plan, written)
        # of the texts of this set alone, whatever else was asked or lost: the same set has the same card
        facts = {
            "license": _license(options),
            "cost_usd": round(store.cost_of(keys), 6),
            "note": _OFFLINE_NOTE if options.writer == "offline" and plan.templates else None,
        }
        write_set(options.out, docs, plan, written, writers=writers, facts=facts)
    finally:
        store.close()
        if rejected.rows and not options.dry_run:
            write_rejected(options.out, rejected)
    _log.info("wrote %s: %d docs; rows left out: %s", options.out, len(docs), _left_out(plan))


def _left_out(plan: "Plan") -> str:
    number = len({(row["file"], row["line"]) for row in plan.rejected.rows})
    return f"{number}, with the reasons in synthesis/rejected_rows.jsonl" if number else "none"


def _status(options: argparse.Namespace) -> None:
    from sft_probe.files import read_object
    from sft_probe.synth.output import STORE
    from sft_probe.synth.store import Store

    path = options.directory / STORE
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing was written in {options.directory} by `sft-probe synth`.")
    store = Store(path)
    try:
        lines = [f"{'category':<20}{'status':<12}{'texts':>8}{'tokens in':>12}{'tokens out':>12}{'USD':>12}"]
        for count in store.counts():
            lines.append(
                f"{count.category:<20}{count.status:<12}{count.num_answers:>8}{count.num_prompt_tokens:>12}"
                f"{count.num_output_tokens:>12}{count.cost_usd:>12.4f}"
            )
        num_lost, lost_usd = store.lost_calls()
        lines.append(f"spent: {store.cost_usd():.4f} USD, of it {lost_usd:.4f} for {num_lost} calls without an answer")
    finally:
        store.close()
    manifest = options.directory / "probe_set.json"
    counts = read_object(manifest, {"counts": dict})["counts"] if manifest.is_file() else None
    sizes = [f"{counts.get(split, 0)} {split}" for split in ("train", "heldout")] if counts else ["not written yet"]
    lines.append(f"set: {', '.join(sizes)}")
    print("\n".join(lines))  # noqa: T201


@dataclass
class _Unasked:
    """A remote writer by name alone."""

    name: str
    model: str
    api_version: str


def _named(options: argparse.Namespace) -> "Named":
    if options.writer in ("hf", "offline"):
        return _writer(options)
    return _Unasked(options.writer, _model(options), "v1" if options.writer == "openai" else "v1beta")


def _model(options: argparse.Namespace) -> str:
    model = options.model or _MODELS.get(options.writer)
    if model is None and options.writer != "offline":
        raise UserError(f"--writer {options.writer} needs --model.")
    return str(model)


def _writer(options: argparse.Namespace) -> "AnyWriter":
    try:
        return _make_writer(options.writer, _model(options), options.base_url)
    except ImportError as error:
        extra = options.writer.replace("gemini-batch", "gemini")
        raise UserError(
            f"--writer {options.writer} needs more packages ({error}). Run:  pip install 'sft-probe[{extra}]'"
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
        from sft_probe.synth.writers.gemini_batch import GeminiBatchWriter

        return GeminiBatchWriter(model, base_url=base_url)
    from sft_probe.synth.writers.openai import OpenAIWriter

    return OpenAIWriter(model, base_url=base_url)


def _obtain(writer: "AnyWriter", store: "Store", limits: "Limits", keys: set[str]) -> "Obtain":
    """Asks a writer, and notes the key of each answer."""
    from sft_probe.synth.run import obtain
    from sft_probe.synth.store import request_key

    def noted(requests: "Iterator[Request]", total: int) -> "Iterator[tuple[Request, Answer]]":
        for request, answer in obtain(requests, writer, store, limits, total=total):
            keys.add(request_key(writer, request))
            yield request, answer

    return noted


def _limits(options: argparse.Namespace) -> "Limits":
    from sft_probe.synth.limits import Limits
    from sft_probe.synth.prices import parse_price

    if options.writer == "hf":
        return _local_limits()
    return Limits(
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        tokens_per_minute=options.tokens_per_minute,
        max_cost_usd=options.max_cost_usd,
        price=parse_price(options.price) if options.price else None,
    )


def _local_limits() -> "Limits":
    """Of a local model: full batches, and no time-out, since a call waits for the batches before it."""
    from sft_probe.synth.limits import Limits
    from sft_probe.synth.writers.hf import CONCURRENCY

    return Limits(concurrency=CONCURRENCY, timeout_s=86400.0)


def _untrained_writer(options: argparse.Namespace) -> "HfWriter":
    from sft_probe.synth.writers.hf import HfWriter

    return HfWriter(options.untrained_model or _MODELS["hf"], is_chat=False)


def _written_by(plan: "Plan", writer: "AnyWriter") -> dict[str, str]:
    fixed = {"random": "derangement of chosen within the split", "permuted": "words of chosen, shuffled"}
    names = {"chosen": "source", "rejected": "source"}
    for kind in plan.settings.kinds:
        template = plan.templates.get(kind)
        made_by = "sentences of the embedded set" if writer.name == "offline" else template.name if template else ""
        names[kind] = f"{writer.name} {writer.model}, {made_by}" if template else fixed.get(kind, "")
    return names


def _license(options: argparse.Namespace) -> str:
    is_hh = str(options.source).partition(":")[0] == "Anthropic/hh-rlhf"
    return str(options.license or ("mit" if is_hh else "unknown"))


def _print_estimate(plan: "Plan", writer: "Named", store: "Store", limits: "Limits") -> None:
    from sft_probe.synth.run import estimate

    guess = estimate(plan.requests(), writer, store, limits.price)
    cost = "unknown" if guess.cost_usd is None else f"{guess.cost_usd:.4f} USD, at most {guess.max_cost_usd:.4f}"
    lines = [
        f"docs: {len(plan.pairs)}; rows left out so far: {len(plan.rejected.rows)}",
        f"calls: {guess.calls} ({guess.num_stored} texts are stored), and one more for each text that fails a check",
        f"tokens, by a guess: {guess.prompt_tokens} in, {guess.output_tokens} out",
        f"cost: {cost}",
    ]
    print("\n".join(lines))  # noqa: T201
