"""Benchmarks from plain JSONL files: what lm-eval makes of them equals a few lines over logits."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
import torch
from helpers import SHARED, Run, needs_shared
from lm_eval.tasks import TaskManager
from processes import run_forked, run_lm_eval
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.errors import UserError
from sft_probe.tasks.benchmark_files import add_benchmarks

ITEMS: dict[str, list[dict[str, Any]]] = {
    "questions": [
        {"query": "The sky is", "choices": ["blue.", "a kind of fish."], "gold": 0},
        {"query": "Fish live in", "choices": ["trees, mostly.", "water.", "fire."], "gold": 1},
        {"query": "Köln liegt am", "choices": ["Rhein.", "Ännchen."], "gold": 0},
    ],
    "pronouns": [
        {
            "context_options": ["The cat sat since the cat", "The cat sat since the mat"],
            "continuation": "was tired.",
            "gold": 0,
        },
        {
            "context_options": ["The cat sat since the cat", "The cat sat since the mat"],
            "continuation": "was soft.",
            "gold": 1,
        },
    ],
    "endings": [{"context": "Once upon a", "continuation": "time there was a king."}] * 2,
    "sums": [{"context": "Two and two are", "answer": "4"}, {"context": "One:", "answer": "1"}],
}


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(model: Path | str, folder: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Return what lm-eval's own `hf` says of the tasks in a folder, without a network."""
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=manager.all_tasks,
        task_manager=manager,
        bootstrap_iters=0,
        device="cpu",
        **options,
    )
    results: dict[str, dict[str, float]] = found["results"]
    return results


class Reference:
    """Log-probs of a text after a context, from the logits of transformers alone."""

    def __init__(self, path: Path | str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def logprob(self, context: str, text: str) -> float:
        ids = self.tokenizer(f"{context} {text}", return_tensors="pt").input_ids
        start = len(self.tokenizer(context).input_ids)
        with torch.no_grad():
            logprobs = self.model(ids).logits[0].double().log_softmax(-1)
        return float(logprobs[:-1].gather(1, ids[0, 1:, None])[start - 1 :].sum())

    def expected(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return bits per byte of the right answer, and with a `gold` the accuracy."""
        right, nats, num_bytes = [], 0.0, 0
        for row in rows:
            if "answer" in row:
                pairs = [(row["context"], row["answer"])]
            elif "choices" in row:
                pairs = [(row["query"], choice) for choice in row["choices"]]
            else:
                pairs = [(context, row["continuation"]) for context in row["context_options"]]
            logprobs = [self.logprob(*pair) for pair in pairs]
            gold = row.get("gold", 0)
            right.append(max(range(len(pairs)), key=logprobs.__getitem__) == gold)
            nats -= logprobs[gold]
            num_bytes += len(pairs[gold][1].encode())
        bits = {"bits_per_byte": nats / num_bytes / math.log(2)}
        return bits if "answer" in rows[0] else {"acc": sum(right) / len(right), **bits}


def test_accuracy_and_bits_per_byte_equal_a_computation_from_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    files = [write(tmp_path, name, rows) for name, rows in ITEMS.items()]
    added = add_benchmarks(files, tmp_path / "tasks")
    assert [(name, num_rows) for name, _, num_rows in added] == [
        (name, len(rows)) for name, rows in ITEMS.items()
    ]
    results = evaluate(tiny_model, tmp_path / "tasks")
    reference = Reference(tiny_model)
    for name in ("questions", "pronouns"):
        for metric, value in reference.expected(ITEMS[name]).items():
            assert results[name][f"{metric},none"] == pytest.approx(value, abs=1e-5)
    answer = "time there was a king."
    bits = -reference.logprob("Once upon a", answer) / len(answer) / math.log(2)
    assert results["endings"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-5)
    assert "acc_norm,none" in results["questions"]
    assert "acc_norm,none" not in results["pronouns"]


def test_plain_lm_eval_reads_the_tasks_and_gives_the_same(tiny_model: Path, tmp_path: Path) -> None:
    names = ("questions", "pronouns")
    add_benchmarks([write(tmp_path, name, ITEMS[name]) for name in names], tmp_path / "tasks")
    result = run_forked(
        *("run", "--model", "hf", "--model_args", f"pretrained={tiny_model},dtype=float32"),
        *("--include_path", tmp_path / "tasks", "--tasks", *names, "--device", "cpu"),
        *("--output_path", tmp_path / "out", "--log_samples"),
        target=run_lm_eval,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text("utf-8"))["results"]
    reference = Reference(tiny_model)
    for name in names:
        for metric, value in reference.expected(ITEMS[name]).items():
            assert results[name][f"{metric},none"] == pytest.approx(value, abs=1e-5)


def test_items_on_one_text_count_as_one_in_a_sweep(
    sft_probe: Run, tiny_model: Path, tmp_path: Path
) -> None:
    """The twins of `pronouns` share their contexts: 3 items in 2 clusters."""
    twins = [*ITEMS["pronouns"], {**ITEMS["pronouns"][0], "context_options": ["A b", "A c"]}]
    add_benchmarks([write(tmp_path, "twins", twins)], tmp_path / "tasks")
    shutil.copytree(tiny_model, tmp_path / "ck/checkpoint-1")
    tasks = tmp_path / "tasks/twins.yaml"
    checkpoints = ("--checkpoints", tmp_path / "ck/*", "--splits", "heldout")
    result = sft_probe("sweep", tmp_path / "run", *checkpoints, "--tasks", tasks)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "run/benchmarks.csv").set_index("metric")
    assert set(table["n"]) == {3}
    assert set(table["clusters"][["acc", "bits_per_byte"]]) == {2}
    for metric, value in Reference(tiny_model).expected(twins).items():
        assert table["value"][metric] == pytest.approx(value, abs=1e-4)
    assert table["stderr"]["bits_per_byte"] > 0


@pytest.mark.full
@needs_shared
@pytest.mark.parametrize("name", ["arc_easy", "copa", "openbook_qa", "winograd_wsc", "svamp"])
def test_real_benchmarks_equal_a_computation_from_logits(name: str, tmp_path: Path) -> None:
    from sft_probe.models import resolve_model

    path = SHARED / f"data/benchmarks/{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:50]]
    add_benchmarks([write(tmp_path, name, rows)], tmp_path / "tasks")
    model = resolve_model("smollm2-135m-instruct-q4_1")
    results = evaluate(model, tmp_path / "tasks")[name]
    for metric, value in Reference(model).expected(rows).items():
        assert results[f"{metric},none"] == pytest.approx(value, abs=1e-4)


def test_few_shot_examples_are_other_items(tiny_model: Path, tmp_path: Path) -> None:
    add_benchmarks([write(tmp_path, "questions", ITEMS["questions"])], tmp_path / "tasks")
    none = evaluate(tiny_model, tmp_path / "tasks")["questions"]
    two = evaluate(tiny_model, tmp_path / "tasks", num_fewshot=2)["questions"]
    assert none["bits_per_byte,none"] != two["bits_per_byte,none"]


FAULTS = {
    "{": "line 1: not valid JSON",
    '{"question": "Why?", "answer": "So."}': "line 1 has the columns question, answer",
    '{"query": "a", "choices": ["b", "c"], "gold": 2}': "'gold' is 2, but there are 2 options",
    '{"query": "a", "choices": ["b", "c"], "gold": -1}': "'gold' is -1",
    '{"query": "a", "choices": ["b", "c"], "gold": true}': "'gold' must be a whole number",
    '{"query": "a", "choices": "bc", "gold": 0}': "'choices' must be a list of texts",
    '{"query": "a", "choices": ["b"], "gold": 0}': "'choices' must hold two texts or more",
    '{"query": "a", "choices": ["b", ""], "gold": 0}': "'choices' must hold two texts or more",
    '{"query": 3, "choices": ["b", "c"], "gold": 0}': "'query' must be a text",
    '{"context": "a", "continuation": " "}': "'continuation' is empty",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_file_that_is_no_benchmark_is_one_message_with_its_line(
    line: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        add_benchmarks([path], tmp_path / "tasks")
    assert str(path) in str(error.value)
    assert FAULTS[line] in str(error.value)
    assert not list((tmp_path / "tasks").glob("*"))


def test_a_later_row_of_another_layout_is_named(tmp_path: Path) -> None:
    rows = [*ITEMS["questions"], *ITEMS["sums"]]
    with pytest.raises(UserError, match=r"line 4: 'query' must be a text"):
        add_benchmarks([write(tmp_path, "mixed", rows)], tmp_path / "tasks")


def test_two_files_of_one_name_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [write(folder, "sums", ITEMS["sums"]) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match="two files would be named 'sums'"):
        add_benchmarks(files, tmp_path / "tasks")
    with pytest.raises(UserError, match="is missing"):
        add_benchmarks([tmp_path / "none.jsonl"], tmp_path / "tasks")
