"""Forms of adapters as PEFT saves them, and what a load of each gives: the same tensors as PEFT's
own, or a refusal."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from helpers import make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sft_probe.adapters import load_adapter
from sft_probe.errors import UserError

Q_UP = ["q_proj", "up_proj"]


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(
        **{"r": 4, "target_modules": Q_UP, "task_type": "CAUSAL_LM", **options}
    )


def other(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(
        **{"target_modules": Q_UP, "task_type": "CAUSAL_LM", **options}
    )


def prompt(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(**{"task_type": "CAUSAL_LM", **options})


FORMS: dict[str, Callable[[], Any]] = {
    "LoRA": lora(),
    "LoRA, all-linear": lora(target_modules="all-linear"),
    "LoRA, regular expression": lora(target_modules=r".*layers\.1.*\.(v|o)_proj"),
    "LoRA, exclude_modules": lora(exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "LoRA, rslora": lora(use_rslora=True),
    "LoRA, DoRA": lora(use_dora=True),
    "LoRA, lora_bias": lora(lora_bias=True),
    "LoRA, bias all": lora(bias="all"),
    "LoRA, bias lora_only": lora(bias="lora_only"),
    "LoRA, rank_pattern and alpha_pattern": lora(
        rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 32}
    ),
    "LoRA, layers_to_transform": lora(layers_to_transform=[1], layers_pattern="layers"),
    "LoRA, layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "LoRA, target lm_head": lora(target_modules=["q_proj", "lm_head"]),
    "LoRA, target embed_tokens": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA, target embed_tokens and lm_head": lora(target_modules=["embed_tokens", "lm_head"]),
    "LoRA, target tied embed_tokens (ensure_weight_tying)": lora(
        target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    "LoRA, modules_to_save embed_tokens": lora(modules_to_save=["embed_tokens"]),
    "LoRA, modules_to_save lm_head": lora(modules_to_save=["lm_head"]),
    "LoRA, modules_to_save both": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA, modules_to_save tied (ensure_weight_tying)": lora(
        modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "LoRA, modules_to_save norm": lora(modules_to_save=["norm"]),
    "LoRA, trainable_token_indices": lora(trainable_token_indices=[1, 5, 300]),
    "LoRA, trainable_token_indices of lm_head": lora(
        trainable_token_indices={"lm_head": [1, 5], "embed_tokens": [7]}
    ),
    "LoRA, target_parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "LoRA, init gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, init pissa": lora(init_lora_weights="pissa"),
    "LoRA, init pissa_niter_4": lora(init_lora_weights="pissa_niter_4"),
    "LoRA, init olora": lora(init_lora_weights="olora"),
    "LoRA, init orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, QALoRA": lora(use_qalora=True, qalora_group_size=8),
    "activated LoRA": lora(alora_invocation_tokens=[1, 2]),
    "AdaLoRA": other("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "AdaMSS": other("AdamssConfig", r=8, num_subspaces=2),
    "BEFT": other("BeftConfig", target_modules=["v_proj"]),
    "BOFT": other("BOFTConfig"),
    "C3A": other("C3AConfig", block_size=16),
    "DEFT": other("DeftConfig", r=4),
    "DeLoRA": other("DeloraConfig", r=4),
    "FourierFT": other("FourierFTConfig", n_frequency=50),
    "FRoD": other("FrodConfig", progressbar=False),
    "GLoRA": other("GloraConfig", r=4),
    "GraLoRA": other("GraloraConfig", r=4),
    "HiRA": other("HiraConfig", r=4),
    "HRA": other("HRAConfig", r=4),
    "IA3": other(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "IA3, modules_to_save lm_head": other(
        "IA3Config", target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]
    ),
    "LayerNorm tuning": other("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "Lily": other("LilyConfig", r=4),
    "LoHa": other("LoHaConfig", r=4),
    "LoKr": other("LoKrConfig", r=4),
    "MiSS": other("MissConfig", r=8),
    "OFT": other("OFTConfig", oft_block_size=8),
    "OSF": other("OSFConfig", effective_rank=8),
    "PEANuT": other("PeanutConfig", r=4),
    "Poly": other("PolyConfig", r=4),
    "PSOFT": other("PsoftConfig", r=4),
    "PVeRA": other("PveraConfig", r=8),
    "PVeRA, sample_at_inference": other("PveraConfig", r=8, sample_at_inference=True),
    "RandLoRA": other("RandLoraConfig", r=4),
    "RoAd": other("RoadConfig", group_size=8),
    "Shadow": other("ShadowConfig", r=4),
    "SHiRA": other("ShiraConfig", r=4),
    "SuperTuning": other("SupertuningConfig"),
    "TinyLoRA": other("TinyLoraConfig"),
    "trainable tokens": other(
        "TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[1, 5, 300]
    ),
    "UniLoRA": other("UniLoraConfig"),
    "VB-LoRA": other("VBLoRAConfig", vector_length=16, num_vectors=16),
    "VB-LoRA, save_only_topk_weights": other(
        "VBLoRAConfig", vector_length=16, num_vectors=16, save_only_topk_weights=True
    ),
    "VeRA": other("VeraConfig", r=8),
    "VeRA, save_projection False": other("VeraConfig", r=8, save_projection=False),
    "WaveFT": other("WaveFTConfig", n_frequency=50),
    "X-LoRA": lora(),
    "adaption prompt": prompt("AdaptionPromptConfig", adapter_len=4, adapter_layers=1),
    "prompt tuning": prompt("PromptTuningConfig", num_virtual_tokens=3),
    "multitask prompt tuning": prompt(
        "MultitaskPromptTuningConfig", num_virtual_tokens=3, num_tasks=2
    ),
    "prefix tuning": prompt("PrefixTuningConfig", num_virtual_tokens=3),
    "P-tuning": prompt("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
    "CPT": prompt("CPTConfig", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "cartridge": prompt("CartridgeConfig", num_virtual_tokens=3),
}


def save_adapter(form: str, base: Path, folder: Path, *, seed: int = 0, **options: Any) -> None:
    """Save an adapter of one form, trained in that every tensor that can be trained has moved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), FORMS[form]()
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(str(folder), **options)
    if (
        form == "X-LoRA"
    ):  # which PEFT makes only from other adapters; the config alone is what counts
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "XLORA"}))


def load_reference(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return what PEFT's own loader gives for an adapter alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def differing_tensors(model: Any, reference: Any) -> list[str]:
    """Return the names of parameters and buffers that are not the same, non-persistent and tied
    ones included."""
    ours, theirs = (
        {
            **dict(item.named_parameters(remove_duplicate=False)),
            **dict(item.named_buffers(remove_duplicate=False)),
        }
        for item in (model, reference)
    )
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num())
    )


def try_form(form: str, base: Path, folder: Path) -> tuple[str, str]:
    """Return `right`, `refused` or `untested` for one form, and the reason for the latter two.

    Raises:
        AssertionError: tensors or logits are not those of PEFT's own loader.
    """
    try:
        save_adapter(form, base, folder)
    except Exception as error:  # the installed PEFT cannot make this form, or not of this model
        return "untested", f"{type(error).__name__}: {error}".splitlines()[0][:100]
    try:
        model = load_adapter(folder, "float32")
    except UserError as error:
        return "refused", str(error).replace(f"{folder}: ", "").replace(f" {folder}", "")
    reference = load_reference(base, folder)
    assert differing_tensors(model, reference) == []
    ids = torch.tensor([[3, 1, 5, 300, 7, 9, 44]])
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(ids).logits, reference(ids).logits)
    return "right", ""


def make_base(folder: Path, *, tied: bool) -> Path:
    """Save a Llama of two layers with biases, random weights and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        attention_bias=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_rows() -> list[tuple[str, str, str]]:
    """Return form, result and note of every form, each tried on a tiny model with tied and with
    untied embeddings."""
    rows = []
    with TemporaryDirectory() as folder:
        bases = [make_base(Path(folder, kind), tied=kind == "tied") for kind in ("tied", "untied")]
        for number, form in enumerate(FORMS):
            results = [
                try_form(form, base, Path(folder, f"{number}-{base.name}")) for base in bases
            ]
            differ = results[0] != results[1]
            result = " / ".join(result for result, _ in results) if differ else results[0][0]
            note = " / ".join(dict.fromkeys(note for _, note in results if note))
            rows.append((form, f"{result} (tied / untied)" if differ else result, note))
    return rows


if __name__ == "__main__":  # Run as:  PYTHONPATH=tests python tests/adapter_forms.py
    rows = adapter_rows()
    print("| adapter | result | note |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
