"""Every causal LM of transformers, tiny and random, against its own float64 forward: what
`docs/models.md` lists."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sft_probe.errors import UserError
from sft_probe.scoring.head import no_cache
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import Score, choose_mode, score
from sft_probe.train.examples import Example, PadRight
from sft_probe.train.model import disable_dropout
from sft_probe.train.trainer import SftTrainer

VOCAB = 97
WINDOW = 16
LONGEST = 80
TERMINATOR = 5
LARGEST_ERROR = 2e-3
"""Of a summed log-prob, in nats."""
LARGEST_LOSS_ERROR = 1e-5
"""Of the mean training loss, relative."""
LARGEST_NOISE = 1e-4
"""Of the loss of a token in training passes, in nats."""

Array = npt.NDArray[np.float64]
WIDTHS = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "emb_dim", "attention_hidden_size", "embedding_size"), 32
)
TINY: dict[str, int] = {
    **WIDTHS,
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"), 64
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    **dict.fromkeys(
        (
            "head_dim",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "dim_head",
            "rotary_dim",
        ),
        8,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "state_size", "ssm_state_size"), 8
    ),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    "index_topk": WINDOW,
    "index_n_heads": 32,  # with few, many keys have the same score, and rounding chooses among them
    **dict.fromkeys(
        ("hidden_size_per_layer_input", "dim_ff", "ffn_hidden_size", "ple_embed_dim"), 32
    ),
    "vocab_size_per_layer_input": VOCAB,
    "vocab_size": VOCAB,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len"), 256
    ),
    "sliding_window": WINDOW,
}
"""Sizes by the names that configs give them, where a config has the name."""
BERTS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in BERTS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "intermediate_size": [64, 64],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "num_buckets": 4,
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Besides, or instead, by `model_type`."""
UNTESTED: dict[str, str] = {
    "blt": "reads bytes in patches of its own making",
    "dots3_note": "images, sound and text; its text part is dots3_note_text",
    "fuyu": "images and text; its text part is persimmon",
    "gemma3n": "its image part wants the package timm; its text part is gemma3n_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts for another model, whose hidden states it reads",
    ),
    "got_ocr2": "images to text; its text part is qwen2",
    "moss_transcribe_diarize": "sound to text",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes sound, not text"),
}
"""Architectures that cannot be tried here, and why."""


def tiny_config(model_type: str) -> Any:
    """Return a config of two or so layers."""
    return _shrink(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}))


def _shrink(config_class: Any, exceptions: dict[str, Any]) -> Any:
    values = config_class().to_dict()
    small: dict[str, Any] = {
        name: TINY[name] for name in values if name in TINY and values[name] is not None
    }
    if "kv_lora_rank" in values:  # such attention has no groups
        small["num_key_value_heads"] = 4
    for name, value in values.items():  # one past the vocabulary cannot be looked up
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCAB:
            small[name] = VOCAB - 1
    for name, part in config_class.sub_configs.items():
        if hasattr(part, "sub_configs"):
            small[name] = _shrink(part, exceptions.get(name, {}))
    return config_class(
        **{**small, **{k: v for k, v in exceptions.items() if k not in config_class.sub_configs}}
    )


def make_model(model_type: str, attention: str | None = None, **changes: Any) -> Any:
    """Return the model in float32 and eval mode, with weights so large that every part of it
    matters."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and name.endswith(("weight", "_proj", "experts")):
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@cache
def make_items() -> list[Continuation]:
    """Docs longer than a window, with continuations that share a start, repeat, or are one
    token."""
    random = np.random.default_rng(1)
    items = []
    for length in (40, 3, 1, 25):
        prefix = random.integers(10, VOCAB - 1, size=length).tolist()
        stem = random.integers(10, VOCAB - 1, size=4).tolist()
        conts = [stem + random.integers(10, VOCAB - 1, size=n).tolist() for n in (1, 30, 7)]
        items += [Continuation(prefix, cont, TERMINATOR) for cont in [*conts, stem[:1], conts[0]]]
    return items


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one architecture."""

    model_type: str
    class_name: str
    result: str
    """right, right (plain way), refused, untested or WRONG."""
    note: str = ""
    error_nats: float = 0.0
    """The largest error of a summed log-prob."""
    loss_error: float = 0.0
    """Of the mean training loss, relative."""


def architecture_row(model_type: str) -> Row:
    """Score and train one architecture, under each attention that it has."""
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if model_type in UNTESTED:
        return Row(
            model_type=model_type, class_name=name, result="untested", note=UNTESTED[model_type]
        )
    rows = [_row(model_type, name, attention) for attention in attentions(model_type)]
    order = ["WRONG", "refused", "right (one at a time)", "right (plain way)", "right"]
    return min(rows, key=lambda row: (order.index(row.result), -row.error_nats))


def attentions(model_type: str) -> Iterator[str | None]:
    """Sdpa and eager, where the architecture knows them."""
    for attention in ("sdpa", "eager"):
        try:
            make_model(model_type, attention)
        except ValueError:
            continue
        yield attention


def _row(model_type: str, name: str, attention: str | None) -> Row:
    model = make_model(model_type, attention)
    exact, notes = float64(model), []
    try:
        _logprobs(exact, [*range(10, 20)])
    except RuntimeError:
        exact = copy.deepcopy(model)
        notes.append("held against transformers' own float32 pass, as its code knows no float64")
    try:
        mode = choose_mode(model, LONGEST)
        found = dict(score(model, make_items(), max_tokens=256, mode=mode))
    except UserError as refusal:
        return Row(model_type=model_type, class_name=name, result="refused", note=str(refusal))
    errors, own_errors = zip(
        *(item_errors(model, exact, i, found[n]) for n, i in enumerate(make_items())), strict=True
    )
    if max(own_errors) > LARGEST_ERROR:
        notes.append(
            "rounding chooses experts or keys: transformers' own float32 is "
            f"{max(own_errors):.2g} nats off"
        )
    loss_error = 0.0
    try:
        loss_error, noise = training_loss_error(model, model if notes else exact)
        if noise > LARGEST_NOISE:
            loss_error = 0.0
            notes.append(
                f"training passes differ by chance, by up to {noise:.2g} nats, and the run says so"
            )
    except UserError as refusal:
        notes.append(f"training refused: {refusal}")
    kind = (
        "right" if mode.shared else "right (one at a time)" if mode.alone else "right (plain way)"
    )
    is_right = max(errors) <= LARGEST_ERROR and loss_error <= LARGEST_LOSS_ERROR
    return Row(
        model_type=model_type,
        class_name=name,
        result=kind if is_right else "WRONG",
        note="; ".join(notes),
        error_nats=max(errors),
        loss_error=loss_error,
    )


def float64(model: Any) -> Any:
    """Return a copy of the model in float64."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the grouped products know no float64
    return exact


def item_errors(model: Any, exact: Any, item: Continuation, found: Score) -> tuple[float, float]:
    """Of the scorer and of transformers' own float32 pass, summed, against float64.

    Where the second is off, experts or keys were chosen by rounding, and the scorer is held against
    the float32 pass.
    """
    ids = [*item.prefix_ids, *item.continuation_ids, TERMINATOR]
    expected, own = (_logprobs(part, ids)[len(item.prefix_ids) - 1 :] for part in (exact, model))
    own_error = _distance(own, expected)
    reference = expected if own_error <= LARGEST_ERROR else own
    return _distance(
        np.append(found.token_logprobs, found.logprob_eos or 0.0), reference
    ), own_error


def _distance(found: Array, expected: Array) -> float:
    """Of a summed log-prob, or, if that is more, of a token's."""
    difference = found - expected
    return float(max(abs(difference[:-1].sum()), np.abs(difference).max()))


def _logprobs(model: Any, ids: list[int]) -> Array:
    """Log-probs of all tokens but the first, by one plain forward of transformers."""
    torch.set_default_dtype(model.dtype)  # what a model makes in passing is in it
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **no_cache(model)).logits[0]
    finally:
        torch.set_default_dtype(torch.float32)
    logprobs = logits.double().log_softmax(-1)[:-1]
    found: Array = logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()
    return found


def training_loss_error(model: Any, reference: Any) -> tuple[float, float]:
    """Relative error of the trainer's loss on a padded batch against the mean NLL of its texts, and
    the noise in nats.

    Raises:
        UserError: the trainer refuses the model.
    """
    reference = copy.deepcopy(reference)
    disable_dropout(model.train())
    arguments = TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = SftTrainer(model=model, args=arguments)
    trainer.try_model()
    items = make_items()[:3]
    examples = [
        Example(
            input_ids=[*item.prefix_ids, *item.continuation_ids, TERMINATOR],
            labels=[*[-100] * len(item.prefix_ids), *item.continuation_ids, TERMINATOR],
            doc_id="",
            category="",
            num_bytes=0,
        )
        for item in items
    ]
    batch = PadRight(0)([[row] for row in enumerate(examples)])
    batch.pop("example_index")
    num_tokens = sum(example.num_tokens for example in examples)
    loss = float(trainer.compute_loss(model, batch, num_items_in_batch=num_tokens))
    nll = [_logprobs(reference, e.input_ids)[-e.num_tokens :] for e in examples]
    expected = -float(np.concatenate(nll).mean())
    return abs(loss - expected) / expected, trainer.noise_nats or 0.0
