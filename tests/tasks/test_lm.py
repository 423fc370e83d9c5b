"""The probe LM beside stock `hf` and float64, through lm-eval's own interfaces."""

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Run, blimp_task, make_docs, needs_shared, reads_task_index, user_error
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe.errors import UserError
from sft_probe.scoring import score as scoring
from sft_probe.tasks.discovery import PACKAGED_TASKS_DIR
from sft_probe.tasks.lm import NonFiniteError, ProbeLM

WriteSet = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    return HFLM(
        pretrained=str(tiny_model),
        dtype="float32",
        device="cpu",
        batch_size=4,
        softmax_dtype="float32",
    )


@pytest.fixture
def probe(tiny_model: Path) -> Any:
    return ProbeLM(pretrained=str(tiny_model), dtype="float32", device="cpu")


def ask(context: str, continuation: str, task: str = "some_task", **doc: Any) -> Any:
    doc = {"doc_id": "d7", "prompt_format": "hh", **doc}
    return Instance("loglikelihood", doc, (context, continuation), 0, metadata=(task, 0, 1))


REQUESTS = [
    ask("The cat sat on", " the mat."),
    ask("The cat sat on", " the moon, which was far."),
    ask("The cat sat", " on the mat."),
    ask("The cat sat on the", " mat."),
    ask("", "A sentence without a context."),
    ask("", "A sentence"),
    ask("Ends in white space \n", "and goes on."),
    ask("x" * 3000, " is cut on the left."),
    ask("The cat sat on", " the mat."),
]


def reference(model_dir: Path, context: str, continuation: str, *, end: bool = False) -> float:
    """Ten lines of float64 for texts whose context is a prefix in tokens too."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    ids = [*tokenizer.encode(context + continuation), tokenizer.eos_token_id]
    start = len(ids) - 1 if end else len(tokenizer.encode(context))
    stop = len(ids) if end else len(ids) - 1
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, stop))


def test_scores_equal_those_of_the_stock_hf_model(stock: Any, probe: Any) -> None:
    stock.logits_cache = False  # its one-token cache is wrong on split points
    expected = stock.loglikelihood(REQUESTS, disable_tqdm=True)
    results = probe.loglikelihood(REQUESTS, disable_tqdm=True)
    for (logprob, is_greedy), result in zip(expected, results, strict=True):
        assert result[0] == pytest.approx(logprob, abs=2e-3)
        assert result[1] == is_greedy
        assert len(result) == 2
        assert result.num_tokens == len(result.token_logprobs)
        assert sum(result.token_logprobs) == pytest.approx(result[0], abs=1e-4)
        assert result.logprob_eos is None
    strings = [
        Instance("loglikelihood_rolling", {}, ("word " * n,), 0, ("t", 0, 1)) for n in (3, 700)
    ]
    rolling = stock.loglikelihood_rolling(strings, disable_tqdm=True)
    assert probe.loglikelihood_rolling(strings, disable_tqdm=True) == pytest.approx(
        rolling, abs=2e-3
    )


def test_requests_that_differ_only_in_their_split_point_are_scored_apart(
    tiny_model: Path, probe: Any
) -> None:
    splits = [
        ("The cat sat", " on the mat."),
        ("The cat sat on", " the mat."),
        ("The cat sat on the", " mat."),
    ]
    results = probe.loglikelihood([ask(*split) for split in splits], disable_tqdm=True)
    for split, result in zip(splits, results, strict=True):
        assert result[0] == pytest.approx(reference(tiny_model, *split), abs=1e-3)


def test_the_terminator_is_scored_for_probe_tasks_alone(tiny_model: Path, probe: Any) -> None:
    mine, other = probe.loglikelihood(
        [ask("Hello", " there.", "sft_probe_chosen"), ask("Hello", " there.", "arc_easy")],
        disable_tqdm=True,
    )
    assert mine.logprob_eos == pytest.approx(
        reference(tiny_model, "Hello", " there.", end=True), abs=1e-3
    )
    assert other.logprob_eos is None
    assert mine[0] == pytest.approx(other[0], abs=1e-5)
    chat = probe.loglikelihood(
        [ask("Hello", " there.", "sft_probe_x", prompt_format="chat")], disable_tqdm=True
    )
    assert chat[0].logprob_eos != pytest.approx(mine.logprob_eos, abs=1e-3)


def test_every_metric_of_lm_eval_and_its_samples(stock: Any, probe: Any, tiny_model: Path) -> None:
    metadata = {"pretrained": str(tiny_model)}
    manager = TaskManager(
        include_defaults=False, include_path=str(PACKAGED_TASKS_DIR), metadata=metadata
    )
    names = ["sft_probe_chosen", "sft_probe_train_random"]
    expected, results = (
        evaluate(lm, manager.load(names), bootstrap_iters=0) for lm in (stock, probe)
    )
    for name in names:
        assert results["results"][name] == pytest.approx(
            expected["results"][name], abs=2e-3, nan_ok=True
        )
        for sample in results["samples"][name]:
            score = sample["resps"][0][0]
            assert score.num_tokens == sample["doc"]["num_tokens"]
            assert score is sample["filtered_resps"][0]
            assert math.isfinite(score.logprob_eos)


def test_cached_results_keep_everything(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask("Hello", " there.", "sft_probe_chosen")
    (first,) = CachingLM(probe, str(tmp_path / "cache.db")).loglikelihood([request])
    monkeypatch.setattr(scoring, "score", None)  # whatever scores now fails
    (second,) = CachingLM(probe, str(tmp_path / "cache.db")).loglikelihood([request])
    assert first == second
    assert vars(first) == vars(second)


def test_out_of_memory_halves_the_budget(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = probe.loglikelihood(REQUESTS, disable_tqdm=True)
    calls = []

    def score(*arguments: Any, max_tokens: int, **more: Any) -> Any:
        calls.append(max_tokens)
        for number, pair in enumerate(original(*arguments, max_tokens=max_tokens, **more)):
            if max_tokens > 1100 and number == 3:
                raise torch.OutOfMemoryError
            yield pair

    original: Any = vars(scoring)["score"]
    monkeypatch.setattr(scoring, "score", score)
    probe.scorer.max_tokens = 8192
    results = probe.loglikelihood(REQUESTS, disable_tqdm=True)
    assert calls == [8192, 4096, 2048, 1024]
    assert probe.scorer.max_tokens == 1024
    assert [result[0] for result in results] == pytest.approx(
        [result[0] for result in expected], abs=1e-4
    )


def test_a_response_that_does_not_fit_into_memory_is_named(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(scoring, "score", score)
    with pytest.raises(UserError, match="does not fit the memory"):
        probe.loglikelihood([ask("a " * 100, " b" * 100)], disable_tqdm=True)


def test_bad_requests_are_named_before_anything_is_scored(
    probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "score", None)
    requests = [
        ask("Fine", " so far."),
        ask("Bad", ""),
        ask("", "", "t2"),
        ask("Long", " word" * 3000, "t3"),
    ]
    with pytest.raises(UserError) as caught:
        probe.loglikelihood(requests)
    message = str(caught.value)
    assert "3 of 4 requests cannot be scored" in message
    assert "some_task, doc d7: no token is left" in message
    assert "t2, doc d7: no token is left" in message
    assert "t3, doc d7: " in message
    assert "over max_length 1024" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_named_after_the_others_are_scored(
    probe: Any, value: float, tmp_path: Path
) -> None:
    (bad_id,) = probe.tok_encode("\x07")
    with torch.no_grad():
        probe.model.model.embed_tokens.weight[bad_id] = value
        probe.model.lm_head.weight = torch.nn.Parameter(
            probe.model.lm_head.weight.nan_to_num(0.1, 0.1)
        )
    caching = CachingLM(probe, str(tmp_path / "cache.db"))
    requests = [
        ask("Fine", " so far.", "t1"),
        ask("Bad\x07", " so far.", "t2"),
        ask("Good", " so far.", "t3"),
    ]
    with pytest.raises(NonFiniteError, match="1 of 3 requests") as caught:
        caching.loglikelihood(requests)
    assert "t2, doc d7: NaN or infinite logits" in str(caught.value)
    assert {request.task_name for request, _ in caught.value.scored} == {"t1", "t3"}
    assert len(caching.dbdict) == 2


def test_mixed_precision_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="use hf"):
        ProbeLM(pretrained=str(tiny_model), device="cpu", mixed_precision_dtype="bfloat16")


def test_a_peft_adapter_is_scored_through_model_args(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload().double()
    probe = ProbeLM(pretrained=str(tiny_model), peft=str(tmp_path), dtype="float32", device="cpu")
    (result,) = probe.loglikelihood([ask("Hello", " there.")], disable_tqdm=True)
    ids = probe.tok_encode("Hello there.")
    start = len(probe.tok_encode("Hello"))
    with torch.no_grad():
        logprobs = merged(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert result[0] == pytest.approx(expected, abs=1e-3)


def run_cli(
    sft_probe: Run, model: str, model_dir: object, task: object, out: Path, *more: object
) -> Any:
    result = sft_probe(
        "lm-eval",
        "run",
        "--model",
        model,
        "--model_args",
        f"pretrained={model_dir},dtype=float32",
        "--device",
        "cpu",
        "--batch_size",
        8,
        "--tasks",
        task,
        "--output_path",
        out,
        "--log_samples",
        *more,
        process=True,
    )
    assert result.returncode == 0, result.stderr
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


@reads_task_index
@pytest.mark.slow
def test_the_lm_eval_command_gives_the_accuracy_of_the_stock_hf_model(
    tiny_model: Path, tmp_path: Path, sft_probe: Run
) -> None:
    stock = run_cli(sft_probe, "hf", tiny_model, "sft_probe", tmp_path / "hf")
    probe = run_cli(sft_probe, "sft_probe", tiny_model, "sft_probe", tmp_path / "probe")
    assert set(stock) == set(probe)
    for name, metrics in stock.items():
        assert probe[name] == pytest.approx(metrics, abs=2e-3, nan_ok=True), name


@reads_task_index
@pytest.mark.slow
def test_the_lm_eval_command_reports_bad_requests_with_one_message(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path, sft_probe: Run
) -> None:
    task = tmp_path / "short.yaml"
    task.write_text(
        "task: short\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        f"{write_set(make_docs())}\n"
        "test_split: train\noutput_type: loglikelihood\ndoc_to_text: other\ndoc_to_target: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    result = sft_probe(
        "lm-eval",
        "run",
        "--model",
        "sft_probe",
        "--model_args",
        f"pretrained={tiny_model}",
        "--device",
        "cpu",
        "--tasks",
        task,
        process=True,
    )
    assert "short, doc d0: no token is left of the continuation" in user_error(result)


@needs_shared
@pytest.mark.slow
def test_accuracy_of_a_real_model_on_blimp_is_the_same(tmp_path: Path) -> None:
    from sft_probe.models import EMBEDDED_MODEL, resolve_model

    task = blimp_task(tmp_path)
    arguments: dict[str, Any] = {
        "pretrained": resolve_model(EMBEDDED_MODEL),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 32,
    }
    manager = TaskManager(include_defaults=False)
    accuracies = [
        evaluate(model(**arguments), manager.load([str(task)]), limit=200, bootstrap_iters=0)[
            "results"
        ]
        for model in (HFLM, ProbeLM)
    ]
    (stock, probe) = (result["blimp_adjunct_island"]["acc,none"] for result in accuracies)
    assert stock == probe
    assert 0.5 < stock < 1


@pytest.mark.slow
def test_accuracy_of_a_real_model_on_multiple_choice_is_the_same(tmp_path: Path) -> None:
    """Which of the six responses goes with a prompt: long shared contexts, answers that start
    alike."""
    from sft_probe.models import EMBEDDED_MODEL, resolve_model

    lines = (
        (resources.files("sft_probe.data") / "helpful-mini/heldout.jsonl")
        .read_text("utf-8")
        .splitlines()[:8]
    )
    rows = [json.loads(line) for line in lines]
    data = [
        {
            "question": row["messages"][0]["content"],
            "choices": [row[name] for name in ("chosen", "random", "variant")],
        }
        for row in rows
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    task = tmp_path / "choice.yaml"
    task.write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: "
        "choices\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    arguments: dict[str, Any] = {
        "pretrained": resolve_model(EMBEDDED_MODEL),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 8,
    }
    manager = TaskManager(include_defaults=False)
    stock, probe = (
        evaluate(model(**arguments), manager.load([str(task)]), bootstrap_iters=0)
        for model in (HFLM, ProbeLM)
    )
    assert stock["results"] == probe["results"]
    for one, other in zip(stock["samples"]["choice"], probe["samples"]["choice"], strict=True):
        for left, right in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert right[0] == pytest.approx(left[0], abs=2e-3)
