"""Flags of lm-eval that would change the prompts of a probe task, or answer for another model or
set."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import Run, make_checkpoint, make_docs, reads_task_index, user_error
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from sft_probe.errors import UserError
from sft_probe.tasks.discovery import write_tasks_dir
from sft_probe.tasks.lm import ProbeLM

REFUSED = {
    "apply_chat_template": True,
    "system_instruction": "Be nice.",
    "cache_requests": True,
}


@pytest.fixture
def manager(tmp_path: Path) -> TaskManager:
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in make_docs(6)))
    folder = write_tasks_dir(str(tmp_path / "set.jsonl"), tmp_path / "tasks")
    return TaskManager(include_defaults=False, include_path=str(folder))


@pytest.mark.parametrize("model", ["hf", "sft_probe"])
def test_flags_that_change_prompts_are_refused_for_any_model(
    manager: TaskManager, tiny_model: Path, model: str
) -> None:
    """As plain `lm_eval` calls it, ours and lm-eval's own model alike."""
    arguments = {
        "model": model,
        "model_args": f"pretrained={tiny_model},dtype=float32",
        "device": "cpu",
    }
    for name, value in REFUSED.items():
        with pytest.raises(UserError, match=f"--{name} cannot be used with sft_probe_chosen"):
            simple_evaluate(
                tasks=["sft_probe_chosen"], task_manager=manager, **arguments, **{name: value}
            )
    few, multiturn, none = (
        simple_evaluate(tasks=["sft_probe_chosen"], task_manager=manager, **arguments, **flags)[
            "results"
        ]
        for flags in (
            {"num_fewshot": 2},
            {"fewshot_as_multiturn": True},
            {"fewshot_as_multiturn": False},
        )
    )
    assert few == multiturn == none, "without few-shot examples these two change nothing"


def test_a_cache_of_answers_belongs_to_one_model(tiny_model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", tiny_model, 1)
    mine, again, theirs = (
        ProbeLM(pretrained=str(path), dtype="float32", device="cpu")
        for path in (tiny_model, tiny_model, other)
    )
    CachingLM(mine, str(tmp_path / "cache.db"))
    CachingLM(again, str(tmp_path / "cache.db"))
    with pytest.raises(UserError, match=r"holds the answers of another model \(weights_sha256\)"):
        CachingLM(theirs, str(tmp_path / "cache.db"))
    caching = CachingLM(theirs, str(tmp_path / "unknown.db"))
    (tmp_path / "unknown.db.model.json").unlink()
    caching.dbdict["key"] = "answer"
    caching.dbdict.commit()
    with pytest.raises(UserError, match="does not say of which model"):
        CachingLM(mine, str(tmp_path / "unknown.db"))


@reads_task_index
@pytest.mark.slow
def test_the_lm_eval_command_refuses_flags_that_another_model_would_not_obey(
    tiny_model: Path, sft_probe: Run, tmp_path: Path
) -> None:
    config = {"use_cache": str(tmp_path / "cache"), "tasks": ["sft_probe_chosen"], "model": "hf"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    flags = ("--model_args", f"pretrained={tiny_model},dtype=float32", "--device", "cpu")
    message = user_error(
        sft_probe("lm-eval", "run", "--config", tmp_path / "config.yaml", *flags, process=True)
    )
    assert "--use_cache cannot be used with sft_probe_chosen and --model hf" in message


def test_flags_of_benchmarks_are_refused_without_a_benchmark(
    swept_run: Path, sft_probe: Run
) -> None:
    for flags in (("--apply_chat_template",), ("--num_fewshot", 5), ("--limit", 5)):
        message = user_error(sft_probe("sweep", swept_run, *flags))
        assert f"{str(flags[0]).replace('_', '-')} is for" in message
