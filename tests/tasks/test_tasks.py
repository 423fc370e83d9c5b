"""The lm-eval plug-in through lm-eval's own front doors."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run, make_docs, reads_task_index, user_error
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from processes import run_forked, run_lm_eval
from tokenizer_matrix import MEMBERS, save_model, write_mixed_set
from transformers import AutoModelForCausalLM

from sft_probe.errors import UserError
from sft_probe.probe_set import CATEGORIES
from sft_probe.tasks.discovery import PACKAGED_TASKS_DIR
from sft_probe.tasks.lm import ProbeLM

NAMES = [f"sft_probe_{prefix}{category}" for prefix in ("", "train_") for category in CATEGORIES]
WriteSet = Callable[[list[dict[str, Any]]], Path]


def load(names: list[str], **metadata: Any) -> dict[str, Any]:
    manager = TaskManager(
        include_defaults=False, include_path=str(PACKAGED_TASKS_DIR), metadata=metadata
    )
    loaded: dict[str, Any] = manager.load(names)
    return loaded


def test_every_task_and_the_group_are_indexed() -> None:
    manager = TaskManager(include_defaults=False, include_path=str(PACKAGED_TASKS_DIR))
    assert manager.all_subtasks == sorted(NAMES)
    assert manager.all_groups == ["sft_probe"]
    assert sorted(manager.match_tasks(["sft_probe_*"])) == sorted(NAMES)
    assert list(load(["sft_probe"])["tasks"]) == [
        f"sft_probe_{category}" for category in CATEGORIES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_docs_are_fit_for_the_harness(name: str, tiny_model: Path) -> None:
    """What lm-eval's own tests/tasks/test_tasks.py asks of a new task."""
    task = load([name], pretrained=str(tiny_model))["tasks"][name]
    split = "train" if "_train_" in name else "heldout"
    docs = list(task.test_docs())
    assert len(docs) == {"train": 64, "heldout": 32}[split]
    assert not task.has_training_docs()
    assert not task.has_validation_docs()
    task.build_all_requests(limit=10, rank=0, world_size=1)
    assert len(task.instances) == 10
    for doc, instance in zip(docs, task.instances, strict=False):
        context, continuation = instance.args
        assert context == task.doc_to_text(doc) == doc["prompt"]
        assert context == context.rstrip()
        assert continuation == task.doc_to_target(doc) == doc["continuation"]
        assert continuation[0] == " "
        assert instance.request_type == "loglikelihood"
        assert doc["split"] == split
        assert doc["num_tokens"] > 0
    assert task.VERSION == 1.0
    assert set(task.aggregation()) == {"logprob", "num_tokens", "num_bytes", "logprob_per_byte"}
    assert task.dump_config()["metadata"]["version"] == 1.0


def test_metrics_of_a_doc_and_their_aggregates() -> None:
    task = load(["sft_probe_chosen"])["tasks"]["sft_probe_chosen"]
    metrics = [
        task.process_results({"num_bytes": num_bytes, "num_tokens": None}, [(logprob, False)])
        for logprob, num_bytes in ((-10.0, 20), (-1000.0, 980))
    ]
    assert metrics[0] == {"logprob": -10.0, "num_bytes": 20, "logprob_per_byte": (-10.0, 20)}
    aggregation = task.aggregation()
    assert (
        aggregation["logprob_per_byte"]([metric["logprob_per_byte"] for metric in metrics])
        == -1010 / 1000
    )
    assert aggregation["logprob"]([metric["logprob"] for metric in metrics]) == -505.0


def test_a_response_that_looks_like_a_list_stays_text(write_set: WriteSet) -> None:
    docs = make_docs()
    docs[0]["chosen"] = "[1, 2]"
    task = load(["sft_probe_chosen"], probe_set=str(write_set(docs)))["tasks"]["sft_probe_chosen"]
    assert task.doc_to_target(next(iter(task.test_docs()))) == " [1, 2]"


def test_an_over_long_response_costs_the_doc_in_every_category(
    write_set: WriteSet, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    docs = make_docs()
    for doc in docs:
        doc["rejected"] = doc.pop("other")
    docs[2]["rejected"] = "word " * 3000 + "end."
    docs[4]["chosen"] = ""
    path = write_set(docs)
    kept = {}
    for name in ("sft_probe_chosen", "sft_probe_rejected"):
        task = load([name], probe_set=str(path), pretrained=str(tiny_model))["tasks"][name]
        kept[name] = [doc["doc_id"] for doc in task.test_docs()]
    assert kept == {"sft_probe_chosen": ["d0"], "sft_probe_rejected": ["d0"]}
    assert "d2" in caplog.text
    assert "over max_length 1024" in caplog.text
    assert "d4" in caplog.text


def test_tasks_join_prompt_and_response_as_training_and_sweep_do(tmp_path: Path) -> None:
    """lm-eval with our model, on prompts whose last token spans the join; a float64 pass over ids
    made by hand."""
    member = next(member for member in MEMBERS if member.name.startswith("llama3 plain"))
    tokenizer = member.make()
    model = save_model(tokenizer, tmp_path / "model")
    metadata = {"probe_set": str(write_mixed_set(tmp_path / "set.jsonl")), "prompt_format": "plain"}
    task = load(["sft_probe_chosen"], pretrained=str(model), **metadata)
    lm = ProbeLM(pretrained=str(model), dtype="float32", device="cpu")
    samples = evaluate(lm, task, bootstrap_iters=0)["samples"]["sft_probe_chosen"]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    assert len(samples) == 4
    for sample in samples:
        doc, score = sample["doc"], sample["resps"][0][0]
        assert doc["prompt_format"] == "plain+in_use"
        context = tokenizer.encode(doc["prompt"] + "\n\n")
        response = tokenizer.encode(doc["continuation"].strip(), add_special_tokens=False)
        assert doc["num_tokens"] == score.num_tokens == len(response)
        with torch.no_grad():
            logprobs = reference(torch.tensor([context + response])).logits[0].log_softmax(-1)
        expected = sum(
            float(logprobs[len(context) + i - 1, token]) for i, token in enumerate(response)
        )
        assert score[0] == pytest.approx(expected, abs=1e-3)


def test_without_a_tokenizer_a_join_that_does_not_exist_is_named(tmp_path: Path) -> None:
    member = next(member for member in MEMBERS if member.name.startswith("llama3 plain"))
    model = save_model(member.make(), tmp_path / "model")
    task = load(
        ["sft_probe_chosen"],
        probe_set=str(write_mixed_set(tmp_path / "set.jsonl")),
        prompt_format="plain",
    )
    lm = ProbeLM(pretrained=str(model), dtype="float32", device="cpu")
    with pytest.raises(
        UserError, match=r"2 of 4 requests cannot be scored:\n.* doc d3: .*name the tokenizer"
    ):
        evaluate(lm, task, bootstrap_iters=0)


def test_a_category_the_set_lacks_is_named(write_set: WriteSet) -> None:
    with pytest.raises(UserError, match="no category 'variant'; it has chosen, other"):
        load(["sft_probe_variant"], probe_set=str(write_set(make_docs())))


def lm_eval(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run_forked(*arguments, target=run_lm_eval)


def model_flags(model: Path, out: Path) -> list[str]:
    return [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--output_path",
        str(out),
        "--log_samples",
    ]


def scored(out: Path) -> dict[str, int]:
    (path,) = out.rglob("results_*.json")
    return {task: n["effective"] for task, n in json.loads(path.read_text())["n-samples"].items()}


HELDOUT = {f"sft_probe_{category}": 32 for category in CATEGORIES}


@reads_task_index
@pytest.mark.slow
def test_lm_eval_finds_the_tasks_by_include_path(
    tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    directory = sft_probe("tasks-dir").stdout.strip()
    result = lm_eval(
        "run",
        "--include_path",
        directory,
        "--tasks",
        "sft_probe",
        *model_flags(tiny_model, tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert scored(tmp_path) == HELDOUT
    assert "logprob_per_byte" in result.stdout


@pytest.fixture
def linked(sft_probe: Run, task_index: None) -> Iterator[None]:
    assert sft_probe("link-tasks").returncode == 0
    yield
    assert sft_probe("link-tasks", "--remove").returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("linked")
def test_lm_eval_finds_the_tasks_by_links_in_its_package(tiny_model: Path, tmp_path: Path) -> None:
    result = lm_eval("--tasks", "sft_probe_*", *model_flags(tiny_model, tmp_path))
    assert result.returncode == 0, result.stderr
    assert scored(tmp_path) == HELDOUT | {
        f"sft_probe_train_{category}": 64 for category in CATEGORIES
    }


@reads_task_index
@pytest.mark.slow
def test_the_lm_eval_command_of_sft_probe_finds_the_tasks(
    tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    flags = model_flags(tiny_model, tmp_path)
    result = sft_probe(
        "lm-eval",
        "run",
        "--tasks",
        "sft_probe_variant,sft_probe_train_random",
        *flags,
        process=True,
    )
    assert result.returncode == 0, result.stderr
    assert scored(tmp_path) == {"sft_probe_variant": 32, "sft_probe_train_random": 64}


def test_the_lm_eval_command_takes_no_second_include_path(sft_probe: Run, tmp_path: Path) -> None:
    assert "link-tasks" in user_error(
        sft_probe("lm-eval", "run", "--include_path", tmp_path, "--tasks", "x")
    )


@reads_task_index
def test_removing_the_links_leaves_lm_evals_package_as_it_was(sft_probe: Run) -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "sft_probe"
    assert sft_probe("link-tasks").returncode == 0
    stub = (folder / "sft_probe_chosen.yaml").read_text()
    assert stub.startswith("include: ")
    assert len(stub.splitlines()) == 1
    assert sft_probe("link-tasks", "--remove").returncode == 0
    assert not folder.exists()


@reads_task_index
@pytest.mark.slow
def test_a_set_of_ones_own_has_tasks_for_its_own_categories(
    write_set: WriteSet, tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    directory = sft_probe(
        "tasks-dir", "--probe-set", write_set(make_docs()), "--out", tmp_path / "tasks"
    ).stdout.strip()
    flags = model_flags(tiny_model, tmp_path / "out")
    result = lm_eval("run", "--include_path", directory, "--tasks", "sft_probe_*", *flags)
    assert result.returncode == 0, result.stderr
    names = (
        "sft_probe_chosen",
        "sft_probe_other",
        "sft_probe_train_chosen",
        "sft_probe_train_other",
    )
    assert scored(tmp_path / "out") == dict.fromkeys(names, 3)


@reads_task_index
@pytest.mark.slow
def test_a_set_of_ones_own_is_named_by_metadata_or_environment(
    write_set: WriteSet, tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    path = str(write_set(make_docs(8)))
    flags = ["lm-eval", "run", "--tasks", "sft_probe_chosen"]
    metadata = ["--metadata", json.dumps({"probe_set": path})]
    first = sft_probe(*flags, *model_flags(tiny_model, tmp_path / "a"), *metadata, process=True)
    second = sft_probe(*flags, *model_flags(tiny_model, tmp_path / "b"), SFT_PROBE_SET=path)
    assert first.returncode == second.returncode == 0, first.stderr
    assert scored(tmp_path / "a") == scored(tmp_path / "b") == {"sft_probe_chosen": 4}
