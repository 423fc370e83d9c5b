"""The training runs of a transfer experiment: one for each row (what is trained on) and data
order."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError, run_command
from sft_probe.files import make_dir, write_text
from sft_probe.probe_set import ProbeSet, load_probe_set

log = logging.getLogger(__name__)

TAGGED = "tagged"
"""A row that is a contrast set: both responses of each doc, each under a tag that says which one is
meant."""
HALVES = ("half_1", "half_2")
"""Rows that are disjoint halves of the chosen responses, by conversations: the noise floor of
omega."""
_TAGS = {"chosen": "Give the better answer.", "rejected": "Give the worse answer."}


def train_rows(
    rows: Sequence[str],
    folder: Path,
    *,
    recipe: str | Path,
    num_orders: int,
    shard: tuple[int, int],
    extra: Sequence[str],
) -> list[str]:
    """Train what is missing and return `ROW=RUN` for the runs of this shard, in
    `folder/<row>-order<k>`.

    A run that is complete is left alone, one that was interrupted resumes. All categories are
    probed at `log2` and the last step, unless the recipe or `extra` says otherwise.

    Args:
        rows: categories as for `--train_category`, data files as for `--train_data`, `tagged`,
            `half_1`, `half_2`.
        folder: of all runs.
        recipe: of `sft-probe train`, a file or a name.
        num_orders: how many data orders (`--data_seed 0, 1, ...`) each row is trained in.
        shard: (i, n): every n-th run, from the i-th.
        extra: more flags of `sft-probe train`.

    Raises:
        UserError: a row is a mixture, which has no target; or a run failed; what is complete stays.
    """
    make_dir(folder)
    if mixed := [row for row in rows if ":" in row and not _is_file(row)]:
        raise UserError(
            f"the mixture {mixed[0]} has no one category as its target; write it as a data file."
        )
    runs = [(row, order) for order in range(num_orders) for row in rows]
    trained = []
    for row, order in runs[shard[0] - 1 :: shard[1]]:
        name = (
            Path(row).name.split(".")[0]
            if _is_file(row)
            else row.replace(":", "-").replace(",", "+")
        )
        directory = folder / f"{name}-order{order}"
        log.info("run %s", directory)
        flags = [
            "--config",
            str(recipe),
            "--probe_steps",
            "log2,last",
            *extra,
            *_data_flags(row, folder, recipe, extra),
        ]
        flags += ["--data_seed", str(order), "--output_dir", str(directory)]
        with (folder / f"{directory.name}.log").open("w") as output:
            code = run_command(["train", *flags], output)
        if code:
            raise UserError(
                f"training on {row} ended with code {code}: "
                f"{_last_line(folder / f'{directory.name}.log')}"
            )
        trained.append(f"{name}={directory}")
    return trained


def _is_file(row: str) -> bool:
    return row.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _data_flags(row: str, folder: Path, recipe: str | Path, extra: Sequence[str]) -> list[str]:
    if row == TAGGED or row in HALVES:
        path = folder / f"{row}.jsonl"
        probe_set = load_probe_set(_probe_set_of(recipe, extra))
        lines = (
            contrast_rows(probe_set) if row == TAGGED else half_rows(probe_set, HALVES.index(row))
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if not path.exists() or path.read_text("utf-8") != text:
            write_text(path, text)
        return ["--train_data", str(path)]
    return ["--train_data", row] if _is_file(row) else ["--train_category", row]


def _probe_set_of(recipe: str | Path, extra: Sequence[str]) -> str:
    from sft_probe.train.options import recipe_flags

    flags = [*recipe_flags(recipe), *extra]
    if "--probe_set" not in flags:
        raise UserError(f"{recipe} names no probe_set, from which a row could be made.")
    return flags[len(flags) - flags[::-1].index("--probe_set")]


def contrast_rows(probe_set: ProbeSet) -> list[dict[str, Any]]:
    """Yield chat rows of the train split: each prompt twice, asking for the better or the worse
    answer.

    A model that fits this set has to tell chosen from rejected; one that learns "responses in
    general" cannot.

    Raises:
        UserError: the set has not both categories.
    """
    if missing := _TAGS.keys() - set(probe_set.categories):
        raise UserError(
            f"the row `{TAGGED}` needs the category {', '.join(sorted(missing))} in "
            f"{probe_set.source}."
        )
    rows = []
    for doc in probe_set.of_split("train"):
        for category, tag in _TAGS.items():
            *before, last = doc.messages
            asked = {**last, "content": f"{last['content']}\n\n{tag}"}
            messages = [*before, asked, {"role": "assistant", "content": doc.responses[category]}]
            rows.append(
                {"messages": messages, "source_doc_id": doc.doc_id, "source_category": category}
            )
    return rows


def half_rows(probe_set: ProbeSet, half: int) -> list[dict[str, Any]]:
    """Yield chat rows of the chosen responses of every other conversation of the train split, from
    the `half`-th (0 or 1)."""
    docs = probe_set.of_split("train")
    conversations = list(dict.fromkeys(doc.conversation_id for doc in docs))
    own = set(conversations[half::2])
    return [
        {
            "messages": [*doc.messages, {"role": "assistant", "content": doc.responses["chosen"]}],
            "source_doc_id": doc.doc_id,
            "source_category": "chosen",
        }
        for doc in docs
        if doc.conversation_id in own
    ]


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no word of it")
