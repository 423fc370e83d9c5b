"""The live probe of adapted models: each row is what the whole PEFT model says, whatever the
adapter adds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import make_docs
from references import live_rows, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_probe import ProbeCallback
from sft_probe.errors import UserError

WriteSet = Callable[[list[dict[str, Any]]], Path]
CAUSAL: Any = {"task_type": "CAUSAL_LM"}
LINEAR: Any = {"target_modules": ["q_proj", "v_proj"], **CAUSAL}


def activated_lora(tokenizer: Any) -> peft.PeftConfig:
    ids = tokenizer.encode("Assistant:")
    return peft.LoraConfig(**LINEAR, r=4, alora_invocation_tokens=ids)


CONFIGS: dict[str, Callable[[Any], peft.PeftConfig]] = {
    "prompt": lambda _: peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "prefix": lambda _: peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "prefix-projection": lambda _: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8, **CAUSAL
    ),
    "p-tuning": lambda _: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=8, **CAUSAL
    ),
    "cpt": lambda _: peft.CPTConfig(
        cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4], cpt_mask=[1, 1, 1], **CAUSAL
    ),
    "alora": activated_lora,
    "lora": lambda _: peft.LoraConfig(r=4, **LINEAR),
    "dora": lambda _: peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "rslora": lambda _: peft.LoraConfig(r=4, use_rslora=True, lora_dropout=0.5, **LINEAR),
    "lora-saved-head": lambda _: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **LINEAR),
    "lora-tokens": lambda _: peft.LoraConfig(r=4, trainable_token_indices=[5, 6, 200], **LINEAR),
    "ia3": lambda _: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "adalora": lambda _: peft.AdaLoraConfig(total_step=20, tinit=1, tfinal=1, **LINEAR),
    "loha": lambda _: peft.LoHaConfig(r=4, **LINEAR),
    "lokr": lambda _: peft.LoKrConfig(r=4, **LINEAR),
    "oft": lambda _: peft.OFTConfig(r=0, oft_block_size=4, **LINEAR),
    "boft": lambda _: peft.BOFTConfig(boft_block_size=4, **LINEAR),
    "vera": lambda _: peft.VeraConfig(r=4, **LINEAR),
    "hra": lambda _: peft.HRAConfig(r=4, **LINEAR),
    "fourier": lambda _: peft.FourierFTConfig(n_frequency=20, **LINEAR),
    "miss": lambda _: peft.MissConfig(r=4, **LINEAR),
    "road": lambda _: peft.RoadConfig(**LINEAR, group_size=4),
    "layer-norms": lambda _: peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "tokens": lambda _: peft.TrainableTokensConfig(token_indices=[5, 6, 200], **CAUSAL),
    "adaption-prompt": lambda _: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, **CAUSAL
    ),
}
QUICK = ("prompt", "prefix", "p-tuning", "alora", "ia3", "dora")


def sharp(folder: Path) -> Any:
    """The tiny model with weights so large that its attention and its logits depend on what it
    reads."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def adapted(name: str, folder: Path, tokenizer: Any) -> Any:
    """The sharp model with an adapter that changes much."""
    torch.manual_seed(0)
    model = peft.get_peft_model(sharp(folder), CONFIGS[name](tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def expected(model: Any, tokenizer: Any, doc: dict[str, Any]) -> float:
    """Float64 log p of the `chosen` response, by the forward pass of the PEFT model itself."""
    prompt = f"\n\nHuman: {doc['messages'][0]['content']}\n\nAssistant:"
    ids = tokenizer.encode(f"{prompt} {doc['chosen']}")
    num_tokens = len(ids) - len(tokenizer.encode(prompt))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval().double()(input_ids=torch.tensor([ids])).logits[0]
    logprobs = logits[-1 - num_tokens : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(ids[-num_tokens:])[:, None]).sum())


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CONFIGS],
)
def test_live_rows_are_those_of_the_adapted_model(
    name: str, tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model = adapted(name, tiny_model, tokenizer)
    before = [expected(model, tokenizer, doc) for doc in make_docs()[::2]]
    assert abs(before[0] - expected(sharp(tiny_model), tokenizer, make_docs()[0])) > 0.05, (
        "an adapter that changes nothing"
    )
    callback = ProbeCallback(
        str(write_set(make_docs())), out=tmp_path / "run", steps="0,last", max_length=512
    )
    make_trainer(model, tokenizer, tmp_path / "out", callback).train()
    after = [expected(model, tokenizer, doc) for doc in make_docs()[::2]]
    rows = live_rows(tmp_path / "run")["logprob"]
    assert list(rows[0, "heldout", "chosen"]) == pytest.approx(before, abs=2e-3)
    assert list(rows[5, "heldout", "chosen"]) == pytest.approx(after, abs=2e-3)
    if name != "alora":  # which the rows of `make_trainer`, without a prompt, do not invoke
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-2, (
            "nothing was trained"
        )


def test_under_autocast_the_whole_model_computes_in_its_own_dtype(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model = adapted("prompt", tiny_model, tokenizer)
    before = [expected(model, tokenizer, doc) for doc in make_docs()[::2]]
    callback = ProbeCallback(
        str(write_set(make_docs())), out=tmp_path / "run", steps="0,1", max_length=512
    )
    make_trainer(model, tokenizer, tmp_path / "out", callback, bf16=True).train()
    assert list(live_rows(tmp_path / "run")["logprob"][0, "heldout", "chosen"]) == pytest.approx(
        before, abs=2e-3
    )


@pytest.mark.parametrize("kind", ["two-active", "mixed", "disabled"])
def test_several_adapters_on_one_model_are_probed_as_active(
    kind: str, tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    """Whatever is active is what is scored."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    one, two = (
        peft.LoraConfig(r=4, init_lora_weights=False, target_modules=[name])
        for name in ("q_proj", "up_proj")
    )
    model = peft.get_peft_model(sharp(tiny_model), one, mixed=kind == "mixed")
    model.add_adapter("other", two)
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.set_adapter(["default", "other"])
    before = [expected(model, tokenizer, doc) for doc in make_docs()[::2]]
    callback = ProbeCallback(
        str(write_set(make_docs())), out=tmp_path / "run", steps="0", max_length=512
    )
    trainer = make_trainer(model, tokenizer, tmp_path / "out", callback)
    trainer.callback_handler.train_dataloader = trainer.get_train_dataloader()
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert list(live_rows(tmp_path / "run")["logprob"][0, "heldout", "chosen"]) == pytest.approx(
        before, abs=2e-3
    )


def test_an_adapter_that_needs_more_than_a_text_is_refused_by_name(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=2, **CAUSAL)
    model = peft.get_peft_model(sharp(tiny_model), config)
    callback = ProbeCallback(
        str(write_set(make_docs())), out=tmp_path / "run", steps="0", max_length=512
    )
    with pytest.raises(
        UserError, match=r"the adapter MULTITASK_PROMPT_TUNING cannot be scored: .*task_ids"
    ):
        make_trainer(model, tokenizer, tmp_path / "out", callback).train()


def test_learned_positions_count_for_the_window(
    tiny_model: Path, write_set: WriteSet, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    callback = ProbeCallback(
        str(write_set(make_docs())), out=tmp_path / "run", steps="0", max_length=1020
    )
    with pytest.raises(UserError, match="1025 is over the model's window of 1024"):
        make_trainer(
            adapted("prompt", tiny_model, tokenizer), tokenizer, tmp_path / "out", callback
        ).train()
