"""What lm-eval's `hf` does to weights and ours does not: tie those that a file holds apart, cut a
vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_forms import differing_tensors, load_reference, make_base, save_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sft_probe.errors import UserError
from sft_probe.tasks.lm import ProbeLM


@pytest.fixture
def own_head(tmp_path: Path) -> Path:
    """A model whose config ties the head to the embeddings and whose file holds another one."""
    folder = make_base(tmp_path / "own head", tied=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_untied_head_is_kept_as_saved(own_head: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(own_head)
    assert (
        differing_tensors(
            ProbeLM(pretrained=str(own_head), dtype="float32", device="cpu").model, reference
        )
        == []
    )
    model: Any = AutoModelForCausalLM.from_pretrained(own_head)
    handed = ProbeLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(own_head))
    assert handed.model is model
    assert differing_tensors(model, reference) == []
    assert ProbeLM(pretrained=model).tokenizer.get_vocab() == handed.tokenizer.get_vocab()


FORMS = (
    "LoRA",
    "LoRA, modules_to_save embed_tokens",
    "LoRA, modules_to_save lm_head",
    "LoRA, target lm_head",
    "LoRA, trainable_token_indices",
    "trainable tokens",
)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_loaded_as_its_file_holds_it(form: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    save_adapter(form, base, tmp_path / "adapter")
    reference = load_reference(base, tmp_path / "adapter")
    lm = ProbeLM(
        pretrained=str(base), peft=str(tmp_path / "adapter"), dtype="float32", device="cpu"
    )
    assert differing_tensors(lm.model, reference) == []
    handed = ProbeLM(pretrained=load_reference(base, tmp_path / "adapter"), tokenizer=lm.tokenizer)
    assert differing_tensors(handed.model, reference) == []


def test_a_vocabulary_larger_than_that_of_the_tokenizer_is_scored(tmp_path: Path) -> None:
    """As that of Pythia and Qwen, padded to a round number: every id takes part in the softmax."""
    base = make_base(tmp_path / "base", tied=True)
    config = LlamaConfig.from_pretrained(base)
    config.vocab_size = 640
    LlamaForCausalLM(config).save_pretrained(base)
    save_adapter("LoRA", base, tmp_path / "adapter")
    lm = ProbeLM(
        pretrained=str(base), peft=str(tmp_path / "adapter"), dtype="float32", device="cpu"
    )
    assert differing_tensors(lm.model, load_reference(base, tmp_path / "adapter")) == []
    assert lm.model(torch.tensor([[1, 2]])).logits.shape[-1] == 640


@pytest.mark.parametrize("form", ["prompt tuning", "activated LoRA", "Lily"])
def test_adapters_that_cannot_be_scored_are_refused(form: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    save_adapter(form, base, tmp_path / "adapter")
    with pytest.raises(UserError, match="cannot be scored"):
        ProbeLM(pretrained=str(base), peft=str(tmp_path / "adapter"), dtype="float32", device="cpu")
    with pytest.raises(UserError, match="cannot be scored"):
        ProbeLM(
            pretrained=load_reference(base, tmp_path / "adapter"),
            tokenizer=AutoTokenizer.from_pretrained(base),
        )
