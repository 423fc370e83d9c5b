"""The pages: every one can be reached, no link is dead, and the tutorials do what they say."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Run, blimp_task, make_checkpoint, reads_task_index

from sft_probe.probe_set import load_probe_set

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs/tutorials"
NAMED_MODEL = re.compile(r"Qwen/Qwen2\.5-0\.5B(?:-Instruct)?")
"""What the tutorials train; a tiny model takes its place here."""


def pages() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "tasks/README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and the anchor of each link of a page that leads to a file."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} is missing"
        assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            waiting += [(page.parent / path).resolve() for path, _ in links(page) if path]
    assert set(pages()) <= seen


def commands(page: Path) -> list[list[str]]:
    """Return the `sft-probe` commands of a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    found = [line[1:] for line in words if line and line[0] == "sft-probe"]
    assert found
    return found


def run_all(page: str, sft_probe: Run, swaps: dict[str, list[str]], training: list[str]) -> str:
    """Run the commands of a tutorial in order and return all that they printed.

    Words that are a key of `swaps` are replaced; `training` is appended to `train`.
    """
    printed = ""
    for words in commands(TUTORIALS / page):
        command = [new for word in words for new in swaps.get(word, [word])]
        result = sft_probe(*command, *(training if command[0] == "train" else []))
        assert result.returncode == 0, (command, result.stderr)
        printed += result.stdout + result.stderr
    return printed


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def mini_rows() -> list[dict[str, Any]]:
    """Docs of the embedded set as the lines of a bare JSONL probe set."""
    docs = [doc for doc in load_probe_set("helpful-mini").docs if len(doc.messages) == 1][:48]
    return [
        {
            "doc_id": doc.doc_id,
            "conversation_id": doc.conversation_id,
            "split": doc.split,
            "messages": list(doc.messages),
            "chosen": doc.responses["chosen"],
            "rejected": doc.responses["rejected"],
        }
        for doc in docs
    ]


@pytest.mark.slow
def test_the_tutorial_on_own_data_ends_in_a_figure_a_table_and_a_report(
    mini_rows: list[dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sft_probe: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "good", "bad"])
        writer.writerows(
            [row["messages"][0]["content"], row["chosen"], row["rejected"]] for row in mini_rows
        )
    short = "--max_steps 2 --snapshot_steps 0,last --deepspeed none --max_length 1024"
    swaps = {"Qwen/Qwen2.5-0.5B": [str(tiny_model)]}
    printed = run_all("own-data.md", sft_probe, swaps, shlex.split(short))
    assert "\\begin{tabular}" in printed
    assert Path("runs/mine/report.html").exists()
    assert list(Path("runs/mine/figures").glob("changes*.pdf"))
    assert not list(Path("runs/mine/figures").glob("*.svg"))


@pytest.mark.slow
def test_the_tutorial_on_own_trainers_ends_in_a_report(
    mini_rows: list[dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sft_probe: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("my-set.jsonl"), mini_rows)
    answers = [
        [*row["messages"], {"role": "assistant", "content": row["chosen"]}] for row in mini_rows
    ]
    write_jsonl(Path("train.jsonl"), [{"messages": messages} for messages in answers])
    page = (TUTORIALS / "own-trainer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = NAMED_MODEL.sub(str(tiny_model), code)
    code = code.replace("max_steps=64", "max_steps=2, report_to='none', use_cpu=True")
    exec(compile(code, "own-trainer.md", "exec"), {})  # noqa: S102
    run_all("own-trainer.md", sft_probe, {}, [])
    assert Path("runs/trl/report.html").exists()


@pytest.mark.slow
@reads_task_index
def test_the_tutorial_on_own_checkpoints_scores_all_of_them_and_a_benchmark(
    mini_rows: list[dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sft_probe: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("my-set.jsonl"), mini_rows)
    shutil.copytree(tiny_model, "base")
    for step in (2, 4):
        make_checkpoint(Path(f"out/checkpoint-{step}"), tiny_model, seed=step)
    pair = {"sentence_good": "Who has he seen?", "sentence_bad": "Who he has seen?"}
    write_jsonl(Path("pairs.jsonl"), [pair] * 4)
    swaps = {
        "my-set": ["my-set.jsonl"],
        "blimp_adjunct_island": [str(blimp_task(tmp_path, Path("pairs.jsonl").resolve()))],
    }
    printed = run_all("own-checkpoints.md", sft_probe, swaps, [])
    assert {"0", "2", "4"} <= set(re.findall(r"\b\d\b", printed))
    assert Path("theirs/report.html").exists()
    assert Path("theirs/benchmarks.csv").exists()
