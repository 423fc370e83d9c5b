"""Everything that is written about a set: JSONL, manifest, card, and what `probe-set` prints."""

import html
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sft_probe import files
from sft_probe.errors import UserError
from sft_probe.probe_set import SPLITS, Doc, LeftOut, ProbeSet
from sft_probe.synth.asking.store import open_copy
from sft_probe.synth.build import SetPlan, Written
from sft_probe.synth.duplicates import count_words, near_duplicates, prompt_text
from sft_probe.synth.sources import source_files, source_sha256
from sft_probe.synth.splits import RULE
from sft_probe.text_table import text_table

_LOG = logging.getLogger(__name__)
WORK_DIR = "synthesis"
"""Directory beside the set, not part of it: the store of answers and the rows left out."""
STORE = f"{WORK_DIR}/answers.sqlite"
_RULE_FILE = f"{WORK_DIR}/rule.json"
FIGURE = "lengths.png"
_WRITTEN = (*(f"{split}.jsonl" for split in SPLITS), "README.md", "probe_set.json", FIGURE)
_DATA_FILES = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS]
_LEFT_OUT = ("doc_id", "reason", "detail")
SetRow = dict[str, Any]
"""One line of a set's JSONL file."""


def check_directory(out: Path, source: str) -> None:
    """Raise `UserError` where a set in `out` would replace, or include, files of another origin."""
    path = Path(source).expanduser()
    written = {(out / name).resolve() for name in _WRITTEN}
    existing = [name for name in sorted(_WRITTEN) if (out / name).exists()]
    foreign = [path.name for path in files.find(out, "*.jsonl") if path.stem not in SPLITS]
    fault = None
    if path.exists() and not written.isdisjoint(file.resolve() for file in source_files(path)):
        fault = f"the source {source} would be overwritten by the set in {out}"
    elif existing and not (out / STORE).is_file():
        names = ", ".join(existing)
        fault = f"{out} holds {names}, which sft-probe synth has not written and would replace"
    elif foreign:
        fault = f"{out} holds {', '.join(foreign)}, which would count as a part of the set"
    if fault:
        raise UserError(f"{fault}. Choose another --out.")


def rule_of(out: Path) -> int:
    """Return the version of the rule (`splits.RULE`) that a directory was begun with."""
    if (out / _RULE_FILE).is_file():
        return int(files.read_json(out / _RULE_FILE)["rule"])
    if not (out / STORE).is_file():
        return RULE
    with open_copy(out / STORE) as copy:  # so that an estimate writes nothing
        # version 0.1 wrote no rule; its estimates left an empty store
        return 1 if copy.counts() else RULE


def begin_set(out: Path) -> None:
    """Make the directory and record its rule before the first answer is stored."""
    rule = rule_of(out)
    files.make_dir(out / WORK_DIR)
    files.write_json(out / _RULE_FILE, {"rule": rule})


def write_set(
    out: Path,
    docs: list[Doc],
    plan: SetPlan,
    written: Written,
    *,
    writers: dict[str, str],
    facts: dict[str, Any],
) -> None:
    """Write the finished docs of a plan, with a card and a manifest.

    Args:
        out: directory of the set.
        docs: the finished docs.
        plan: what they were made from.
        written: for the counts of the checks.
        writers: category to writer.
        facts: more of the provenance: license, cost, note.

    Raises:
        UserError: the splits overlap.
    """
    overlap = overlap_of(docs)
    if any(overlap.values()):
        raise UserError(
            f"the splits overlap ({overlap}), so the set was not written. This is a defect; please "
            "report it."
        )
    files.remove_leftovers(out)  # the store's lock is held
    provenance = {**_provenance(plan, docs, written), "overlap_of_splits": overlap, **facts}
    (out / "probe_set.json").unlink(missing_ok=True)
    write_docs(out, docs, written)
    write_card(out, docs, writers, plan.options.prompt_format, provenance)
    write_manifest(out, docs, writers, plan.options.prompt_format, provenance)


def _to_row(doc: Doc, meta: dict[str, Any]) -> SetRow:
    """Return the line of a set's JSONL file for a doc."""
    row = {
        "doc_id": doc.doc_id,
        "conversation_id": doc.conversation_id,
        "split": doc.split,
        "messages": list(doc.messages),
        **doc.responses,
        **({"meta": meta} if meta else {}),
    }
    if doc.random_doc_id is not None:  # last
        row |= {"random": row.pop("random"), "random_doc_id": doc.random_doc_id}
    return row


def _meta(doc: Doc, written: Written) -> dict[str, Any]:
    num_words = count_words(doc.responses["chosen"])
    return {
        **(doc.place._asdict() if doc.place else {}),
        "length_ratio": {
            category: round(count_words(text) / num_words, 3)
            for category, text in doc.responses.items()
            if category not in ("chosen", "random")
        },
        "sample_index": written.sample_index.get(doc.doc_id, {}),
    }


def write_docs(out: Path, docs: Sequence[Doc], written: Written | None = None) -> None:
    """Write one JSONL file for each split, with `meta` where its texts were written."""
    for split in SPLITS:
        own = (doc for doc in docs if doc.split == split)
        rows = (_to_row(doc, _meta(doc, written) if written else {}) for doc in own)
        files.write_jsonl(out / f"{split}.jsonl", rows)


def write_manifest(
    out: Path,
    docs: Sequence[Doc],
    writers: dict[str, str],
    prompt_format: str,
    provenance: dict[str, Any],
    *,
    name: str | None = None,
) -> None:
    """Write `probe_set.json`, last of all, so that it stands for a complete set."""
    counts = Counter(doc.split for doc in docs)
    manifest = {
        "name": name or out.resolve().name,
        "counts": {split: counts[split] for split in SPLITS},
        "categories": writers,
        "prompt_format": prompt_format,
        "sha256": {path.name: files.sha256_file(path) for path in files.find(out, "*.jsonl")},
        "provenance": provenance,
    }
    files.write_json(out / "probe_set.json", manifest)


def write_left_out(out: Path, left_out: Sequence[LeftOut]) -> None:
    """Write the rows and docs that are left out, also where the run fails."""
    rows = (
        {
            **(item.place._asdict() if item.place else {}),
            **{name: value for name in _LEFT_OUT if (value := getattr(item, name))},
        }
        for item in left_out
    )
    files.write_jsonl(out / WORK_DIR / "rejected_rows.jsonl", rows)


def overlap_of(docs: Sequence[Doc]) -> dict[str, int]:
    """Count the conversations, near-duplicate prompts, responses and partners of `random` that the
    splits share."""
    split_of = {doc.doc_id: doc.split for doc in docs}
    pairs = near_duplicates([prompt_text(doc.messages) for doc in docs])
    partners = [(doc, doc.random_doc_id) for doc in docs if doc.random_doc_id]
    return {
        "conversations": _num_in_both((doc.conversation_id, doc.split) for doc in docs),
        "near_duplicate_prompts": sum(docs[i].split != docs[j].split for i, j in pairs),
        "responses": _num_shared_responses(docs),
        "random_partners": sum(split_of[partner] != doc.split for doc, partner in partners),
    }


def _num_shared_responses(docs: Sequence[Doc]) -> int:
    return _num_in_both((text, doc.split) for doc in docs for text in doc.responses.values())


def _num_in_both(values: Iterable[tuple[str, str]]) -> int:
    """Return how many values, given with their splits, are in several splits."""
    return sum(count > 1 for count in Counter(value for value, _ in set(values)).values())


def _provenance(plan: SetPlan, docs: Sequence[Doc], written: Written) -> dict[str, Any]:
    options = plan.options
    left_out = {item.place: item.reason for item in reversed(plan.left_out)}
    is_local = Path(options.source).expanduser().exists()
    return {
        "source": Path(options.source).name if is_local else options.source,
        "source_sha256": source_sha256(options.source),
        "source_revision": plan.revision,
        "seed": options.seed,
        "limit": options.limit,
        "heldout_frac": options.heldout_frac,
        "rule": plan.rule,
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
        **({"opinions": dict(sorted(written.opinions.items()))} if options.judge else {}),
    }


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (category, fault), count in sorted(counts.items()):
        nested[category][fault] = count
    return dict(nested)


def write_card(
    out: Path,
    docs: Sequence[Doc],
    writers: dict[str, str],
    prompt_format: str,
    provenance: dict[str, Any],
) -> None:
    """Write the dataset card `README.md`, with a figure where the extra `report` is installed."""
    from jinja2 import Environment, PackageLoader

    table = length_table(docs, list(writers))
    header = {
        "license": provenance["license"],
        "task_categories": ["text-generation"],
        "tags": ["sft-probe", "preference", "synthetic"],
        "configs": [{"config_name": "default", "data_files": _DATA_FILES}],
    }
    environment = Environment(  # noqa: S701 - Markdown; what is not ours goes through `md`
        loader=PackageLoader("sft_probe.synth", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _markdown, "faults": _fault_counts}
    card = environment.get_template("card.md.jinja").render(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        name=out.resolve().name,
        counts=Counter(doc.split for doc in docs),
        writers=writers,
        prompt_format=prompt_format,
        lengths=table,
        figure=FIGURE if _write_figure(out / FIGURE, table) else None,
        **provenance,
    )
    files.write_text(out / "README.md", card)


def _markdown(value: object) -> str:
    """Escape a value for Markdown: no HTML, table cells, links or code."""
    escapes: dict[str, int | str | None] = {"|": "&#124;", "[": "&#91;", "`": "&#96;", "\n": " "}
    return html.escape(str(value)).translate(str.maketrans(escapes))


def _fault_counts(faults: dict[str, dict[str, int]]) -> str:
    counts = ((kind, *item) for kind, found in faults.items() for item in found.items())
    return ", ".join(f"{kind} {fault} {count}" for kind, fault, count in counts) or "none"


def length_table(docs: Sequence[Doc], categories: Sequence[str]) -> pd.DataFrame:
    """Return words per category: mean, quantiles, and the mean ratio to chosen."""
    words = pd.DataFrame(
        {name: [count_words(doc.responses[name]) for doc in docs] for name in categories}
    )
    ratios = words.div(words["chosen"], axis=0)
    columns = {f"p{round(100 * q):02d}": words.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return pd.DataFrame({"mean": words.mean(), **columns, "ratio": ratios.mean()}).rename_axis(
        "category"
    )


def _write_figure(path: Path, table: pd.DataFrame) -> bool:
    try:
        import altair as alt
        import vl_convert  # noqa: F401 - what altair makes PNG files with
    except ImportError:
        _LOG.warning("the card has no figure: pip install 'sft-probe[report]'")
        path.unlink(missing_ok=True)
        return False
    base = alt.Chart(table.reset_index()).encode(
        y=alt.Y("category:N", sort=list(table.index), title=None)
    )
    axis = alt.X("p05:Q", title="words: 5, 25, 50, 75 and 95 % quantiles")
    chart = alt.layer(
        base.mark_rule().encode(x=axis, x2="p95:Q"),
        base.mark_bar(height=14, color="#56B4E9").encode(x="p25:Q", x2="p75:Q"),
        base.mark_tick(color="black", thickness=2, height=14).encode(x="p50:Q"),
    ).properties(width=480)
    with files.new_file(path) as temporary:
        chart.save(str(temporary), format="png", ppi=144)
    return True


def describe_probe_set(probe_set: ProbeSet) -> str:
    """Return a plain-text description of a probe set: counts, lengths, duplicates, faults."""
    docs = probe_set.docs
    counts = Counter(doc.split for doc in docs)
    pairs = near_duplicates([prompt_text(doc.messages) for doc in docs])
    across = [(docs[i], docs[j]) for i, j in pairs if docs[i].split != docs[j].split]
    faults = [f"  {fault}" for fault in probe_set.faults]
    columns = ("category", "words, mean", "min", "max", "bytes, mean", "near-duplicates")
    rows = [
        (category, *_lengths([doc.responses[category] for doc in docs]))
        for category in probe_set.categories
    ]
    lines = [
        f"probe set {probe_set.name} ({probe_set.source}), prompt format {probe_set.prompt_format}",
        f"docs: {counts['train']} train, {counts['heldout']} heldout; "
        f"{sum(len(doc.messages) > 1 for doc in docs)} with several turns; sha256 "
        f"{probe_set.sha256[:16]}",
        "",
        text_table(columns, rows),
        "",
        f"near-duplicates of an earlier prompt: {len({second for _, second in pairs})}, of them in "
        f"the other split: {len(across)}",
        *(f"  {first.doc_id} ~ {second.doc_id}" for first, second in across[:5]),
        f"responses that stand in both splits: {_num_shared_responses(docs)}",
        "",
        *(["faults:", *faults] if faults else ["no faults"]),
        *_without_chosen(probe_set),
    ]
    return "\n".join(lines)


def _without_chosen(probe_set: ProbeSet) -> list[str]:
    """Return what a set without the category `chosen` cannot do."""
    if "chosen" in probe_set.categories:
        return []
    return [
        "! no category `chosen`: there is no `random` either, which is drawn from it, and training "
        f"needs --train_category {probe_set.categories[0]} or another one"
    ]


def _lengths(texts: Sequence[str]) -> list[object]:
    """Return words (mean, fewest, most), bytes (mean) and near-duplicates of some texts."""
    if not texts:
        return ["-"] * 5
    words = [count_words(text) for text in texts]
    mean_bytes = sum(len(text.encode()) for text in texts) / len(texts)
    num_similar = len({second for _, second in near_duplicates(texts)})
    mean_words = f"{sum(words) / len(words):.1f}"
    return [mean_words, min(words), max(words), f"{mean_bytes:.1f}", num_similar]
