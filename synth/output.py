"""Writes a finished set: two JSONL files, what was left out, the card, and the manifest last."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.files import find, make_dir, read_json, remove_leftovers, write_json, write_jsonl
from sft_probe.probe_set import SPLITS
from sft_probe.synth.asking.store import open_copy
from sft_probe.synth.build import Plan, Written
from sft_probe.synth.card import FIGURE, write_card
from sft_probe.synth.from_table import write_manifest
from sft_probe.synth.report import near_duplicates, prompt_text
from sft_probe.synth.sources import Rejected, source_files, source_sha256
from sft_probe.synth.splits import RULE

WORK_DIR = "synthesis"
"""Beside the set: the store of answers and the rows left out. No part of the set."""
STORE = f"{WORK_DIR}/answers.sqlite"
_RULE_FILE = f"{WORK_DIR}/rule.json"
_WRITTEN = (*(f"{split}.jsonl" for split in SPLITS), "README.md", "probe_set.json", FIGURE)


def check_directory(out: Path, source: str) -> None:
    """Raises `UserError` where a set in `out` would take in or replace foreign files, or nothing
    can be written."""
    path = Path(source).expanduser()
    written = {(out / name).resolve() for name in _WRITTEN}
    if path.exists() and not written.isdisjoint(file.resolve() for file in source_files(path)):
        raise UserError(
            f"the source {source} would be overwritten by the set in {out}. Choose another --out."
        )
    mine = sorted(name for name in _WRITTEN if (out / name).exists())
    if mine and not (out / STORE).is_file():
        raise UserError(
            f"{out} holds {', '.join(mine)}, which sft-probe synth has not written and would "
            "replace. Choose another --out."
        )
    foreign = [path.name for path in find(out, "*.jsonl") if path.stem not in SPLITS]
    if foreign:
        raise UserError(
            f"{out} holds {', '.join(foreign)}, which would count as a part of the set. Choose "
            "another --out."
        )


def rule_of(out: Path) -> int:
    """The version of the rule of draw, split and topics that a directory was begun with, else the
    newest one."""
    if (out / _RULE_FILE).is_file():
        return int(read_json(out / _RULE_FILE)["rule"])
    return 1 if _holds_answers(out / STORE) else RULE


def _holds_answers(store: Path) -> bool:
    """Whether anything was asked; an estimate of an older version left an empty store."""
    if not store.is_file():
        return False
    with open_copy(store) as copy:  # an estimate writes nothing
        return bool(copy.counts())


def begin_set(out: Path) -> None:
    """Make the directory and note the rule before the first answer is stored."""
    rule = rule_of(out)
    make_dir(out / WORK_DIR)
    write_json(out / _RULE_FILE, {"rule": rule})


def write_set(
    out: Path,
    docs: list[dict[str, Any]],
    plan: Plan,
    written: Written,
    *,
    writers: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Writes the set.

    Args:
        out: directory of the set.
        docs: as `make_docs` gives them.
        plan: what they were made from.
        written: for the counts of the checks.
        writers: category to writer.
        facts: more for the provenance, such as licence and cost.

    Raises:
        UserError: the splits overlap.
    """
    overlap = overlap_of(docs, list(writers))
    if any(overlap.values()):
        raise UserError(
            f"the splits overlap ({overlap}), so the set was not written. This is a defect; please "
            "report it."
        )
    remove_leftovers(out)  # the store's lock is held
    provenance = {**_provenance(plan, docs, written), "overlap_of_splits": overlap, **facts}
    (out / "probe_set.json").unlink(missing_ok=True)
    for split in SPLITS:
        write_jsonl(out / f"{split}.jsonl", [doc for doc in docs if doc["split"] == split])
    write_card(out, docs, writers, plan.settings.prompt_format, provenance)
    write_manifest(out, writers, plan.settings.prompt_format, provenance)


def write_rejected(out: Path, rejected: Rejected) -> None:
    """Writes what is left out, also where no set comes of it."""
    write_jsonl(out / WORK_DIR / "rejected_rows.jsonl", rejected.rows)


def overlap_of(docs: Sequence[dict[str, Any]], categories: Sequence[str]) -> dict[str, int]:
    """What the splits share, by number: conversations, near-duplicate prompts, responses, partners
    of `random`."""
    split_of = {doc["doc_id"]: doc["split"] for doc in docs}
    conversations, responses = defaultdict(set), defaultdict(set)
    for doc in docs:
        conversations[doc["conversation_id"]].add(doc["split"])
        for category in categories:
            responses[doc[category]].add(doc["split"])
    pairs = near_duplicates([prompt_text(doc["messages"]) for doc in docs])
    return {
        "conversations": sum(len(splits) > 1 for splits in conversations.values()),
        "near_duplicate_prompts": sum(docs[i]["split"] != docs[j]["split"] for i, j in pairs),
        "responses": sum(len(splits) > 1 for splits in responses.values()),
        "random_partners": sum(
            split_of[doc["random_doc_id"]] != doc["split"]
            for doc in docs
            if doc.get("random_doc_id")
        ),
    }


def _provenance(plan: Plan, docs: Sequence[dict[str, Any]], written: Written) -> dict[str, Any]:
    settings = plan.settings
    left_out = {(row["file"], row["line"]): row["reason"] for row in reversed(plan.rejected.rows)}
    return {
        "source": Path(settings.source).name
        if Path(settings.source).expanduser().exists()
        else settings.source,
        "source_sha256": source_sha256(settings.source),
        "source_revision": plan.revision,
        "seed": settings.seed,
        "limit": settings.limit,
        "heldout_frac": settings.heldout_frac,
        "rule": settings.rule,
        "rows": {
            "read": plan.num_rows,
            "used": len(docs),
            "not_drawn": plan.num_not_drawn,
            "left_out": len(left_out),
            "reasons": dict(sorted(Counter(left_out.values()).items())),
        },
        "templates": {
            kind: {"name": template.name, "sha256": template.sha256}
            for kind, template in plan.templates.items()
        },
        "failed_checks": {
            "first": _nested(written.first_faults),
            "second": _nested(written.last_faults),
        },
        "model_versions": sorted(written.model_versions),
        **({"opinions": dict(sorted(written.opinions.items()))} if settings.judge else {}),
    }


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (category, fault), count in sorted(counts.items()):
        nested.setdefault(category, {})[fault] = count
    return nested
