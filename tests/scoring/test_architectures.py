"""Architectures: right by value, in scoring and training, or refused with one message."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    LARGEST_NOISE,
    LONGEST,
    Row,
    architecture_row,
    float64,
    item_errors,
    make_items,
    make_model,
    tiny_config,
    training_loss_error,
)
from helpers import SHARED, Run, needs_shared
from torch.nn.modules import module as hooks_of_all_modules
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sft_probe.errors import UserError
from sft_probe.models import load_model
from sft_probe.scoring.attention import ALONE, PLAIN
from sft_probe.scoring.head import HeadRows
from sft_probe.scoring.score import choose_mode, score
from sft_probe.train.model import disable_dropout
from sft_probe.train.trainer import SftTrainer

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
QUICK = {
    "bart": "right (plain way)",  # its body is not its `base_model`
    "cohere2": "right",  # scaled logits
    "gemma3n_text": "right",  # soft caps, and a window of its own
    "gpt_neo": "right (plain way)",  # local layers
    "llama4_text": "right (plain way)",  # its `base_model` is the model itself
    "mamba2": "right (plain way)",
    "mixtral": "right",
    "opt": "right",
    "roberta": "right (plain way)",  # a head of several layers
    "whisper": "right",
    "xlnet": "refused",
}


def listed() -> dict[str, str]:
    """Results by name, as the page has them."""
    return dict(re.findall(r"^\| `([\w.-]+)` \| \w+ \| ([^|]+?) \|", PAGE.read_text("utf-8"), re.M))


@pytest.mark.parametrize("model_type", QUICK)
def test_some_architectures_are_scored_right_or_refused_as_the_docs_say(model_type: str) -> None:
    row = architecture_row(model_type)
    assert row.result == QUICK[model_type], row
    assert listed()[model_type] == row.result, "run benchmarks/model_matrix.py"


@pytest.mark.full
@pytest.mark.parametrize("model_type", [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_every_architecture_is_scored_right_or_refused_as_the_docs_say(model_type: str) -> None:
    row = architecture_row(model_type)
    assert row.result != "WRONG", row
    assert row.error_nats < 5e-4, row
    assert listed().get(model_type, row.result) == row.result, "run benchmarks/model_matrix.py"


def test_the_docs_list_at_least_90_architectures_as_right_and_none_as_wrong() -> None:
    results = list(listed().values())
    assert sum(result.startswith("right") for result in results) >= 90
    assert "WRONG" not in results


@pytest.mark.parametrize("model_type", ["opt", "llama4_text", "bert", "gpt2", "bloom"])
def test_scoring_that_is_broken_off_leaves_no_hook_on_the_model(model_type: str) -> None:
    model = make_model(model_type)
    way = choose_mode(model, LONGEST)
    next(score(model, make_items(), max_tokens=64, mode=way, head_rows=2))  # left in mid-way
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert not hooks_of_all_modules._global_forward_hooks
    assert not hooks_of_all_modules._global_forward_pre_hooks
    with torch.no_grad():
        assert model(torch.arange(10)[None]).logits.shape[:2] == (1, 10)


def test_the_body_runs_once_and_the_head_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("opt")
    num_runs, num_rows = 0, []
    layer, head = model.model.decoder.layers[0], model.lm_head
    run_layer, run_head = layer.forward, head.forward

    def count_layer(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        return run_layer(*args, **kwargs)

    def count_head(hidden: torch.Tensor) -> torch.Tensor:
        num_rows.append(hidden.shape[:-1].numel())
        out: torch.Tensor = run_head(hidden)
        return out

    monkeypatch.setattr(layer, "forward", count_layer)
    monkeypatch.setattr(head, "forward", count_head)
    dict(score(model, make_items()[:3], max_tokens=1024, mode=PLAIN, head_rows=8))
    assert num_runs == 1
    assert len(num_rows) > 1
    assert max(num_rows) == 8


def wrong_cut(self: HeadRows, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Rows that are off by one."""
    if self._rows is None:
        return None
    self._num_cuts += 1
    return (args[0].flatten(0, 1)[(self._rows - 1).clamp(min=0)][None],)


def trainer_of(model: Any) -> SftTrainer:
    arguments = TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], save_strategy="no"
    )
    return SftTrainer(model=model, args=arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_a_head_that_runs_on_the_wrong_rows_is_refused_in_scoring_and_training(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(model_type).to(dtype)
    assert choose_mode(model, LONGEST).shared
    trainer_of(model).try_model()
    monkeypatch.setattr(HeadRows, "_cut", wrong_cut)
    with pytest.raises(
        UserError, match="cannot be scored: beside the model's own plain forward pass"
    ):
        choose_mode(model, LONGEST)
    with pytest.raises(
        UserError, match="cannot be trained here: the losses of labelled tokens are off"
    ):
        trainer_of(model).try_model()


def test_where_a_batch_changes_a_row_each_item_runs_alone() -> None:
    """Phi-3's long context: the longest text of a batch chooses the frequencies of all of its
    rows."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.0, 1.1, 1.2],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    }
    model = make_model(
        "phi3",
        rope_parameters=rope,
        original_max_position_embeddings=32,
        max_position_embeddings=128,
    )
    assert choose_mode(model, longest=31).shared
    way = choose_mode(model, LONGEST)
    assert way == ALONE
    found = dict(score(model, make_items(), max_tokens=256, mode=way))
    exact = float64(model)
    assert (
        max(item_errors(model, exact, item, found[i])[0] for i, item in enumerate(make_items()))
        < 2e-4
    )


REFUSED = {
    "bert": "reads ahead: what follows a token changes its logits",
    "roberta": "reads ahead",
    "electra": "reads ahead",
    "xlnet": "reads ahead",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_read_ahead_are_refused(model_type: str) -> None:
    model = make_model(model_type, is_decoder=False)
    with pytest.raises(UserError, match=REFUSED[model_type]):
        choose_mode(model, LONGEST)
    with pytest.raises(UserError, match=REFUSED[model_type]):
        trainer_of(model).try_model()


def no_language_models() -> dict[str, Callable[[], Any]]:
    llama = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        num_labels=1,
    )
    t5 = T5Config(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    untied = LlamaConfig.from_dict({**llama.to_dict(), "tie_word_embeddings": False})
    return {
        "reward": lambda: LlamaForSequenceClassification(llama),
        "reward, untied": lambda: LlamaForSequenceClassification(untied),
        "body, untied": lambda: LlamaModel(untied),
        "encoder-decoder": lambda: T5ForConditionalGeneration(t5),
    }


@pytest.mark.parametrize("kind", [*no_language_models()])
def test_checkpoints_that_are_no_causal_language_models_are_refused(
    kind: str, tmp_path: Path
) -> None:
    no_language_models()[kind]().save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path), "float32")
    assert "\n" not in str(caught.value)
    assert re.search(r"lm_head.weight|score.weight|T5Config|decoder-only", str(caught.value))


NOISY: dict[str, dict[str, Any]] = {
    "opt": {},
    "xglm": {},
    "biogpt": {},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5},
    "gemma2": {"attention_dropout": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
    "whisper": {"decoder_layerdrop": 0.5, "dropout": 0.5, "activation_dropout": 0.5},
    "bart": {"decoder_layerdrop": 0.5},
    "dbrx": {"resid_pdrop": 0.5},
}


@pytest.mark.parametrize("model_type", NOISY)
def test_every_kind_of_dropout_is_off_in_training(model_type: str) -> None:
    model = make_model(model_type, **NOISY[model_type])
    items = make_items()[:3]
    trainer = trainer_of(model)
    assert trainer._noise(items) > LARGEST_NOISE, "there was none to begin with"
    error, noise = training_loss_error(model, float64(make_model(model_type, **NOISY[model_type])))
    assert noise == 0
    assert error < 1e-5
    assert not model.config.to_dict().get("attention_dropout")


def test_noise_that_cannot_be_turned_off_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """PhiMoE draws its experts in training."""
    model = make_model("phimoe")
    disable_dropout(model.train())
    trainer = trainer_of(model)
    with caplog.at_level(logging.WARNING):
        trainer.try_model()
    assert trainer.noise_nats is not None
    assert trainer.noise_nats > LARGEST_NOISE
    assert "PhimoeForCausalLM: two training passes over the same tokens differ" in caplog.text


def test_trying_a_model_changes_neither_weights_nor_random_state() -> None:
    model = make_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trainer.try_model()
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_test_models_are_tiny() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert model.num_parameters() < 100_000
    assert math.isfinite(Row(model_type="", class_name="", result="").error_nats)


@needs_shared
def test_opt_whose_body_is_not_its_base_model_trains_on_the_right_loss(
    sft_probe: Run, tmp_path: Path
) -> None:
    """As many labelled tokens as a row has places: rows of the wrong kind went unnoticed here."""
    case = tmp_path / "case"
    shutil.copytree(SHARED / "cases/opt_body_bypassed", case)
    flags = (
        "--prompt_format plain --max_length 256 --deepspeed none --max_steps 1 "
        "--per_device_train_batch_size 2"
    )
    result = sft_probe(
        "train",
        "--model_name_or_path",
        case / "ck/checkpoint-1",
        "--probe_set",
        case / "silent.jsonl",
        *flags.split(),
        "--use_cpu",
        "true",
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    loss = json.loads((tmp_path / "run/losses.jsonl").read_text())["loss"]
    assert loss == pytest.approx(6.824088, abs=5e-6)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["noise_nats"] == 0
