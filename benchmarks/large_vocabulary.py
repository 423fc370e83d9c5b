"""Measures scoring where the head is large: a Qwen2.5 shape, V = 151,936, random weights and token
ids, K = 7.

Both sides get token ids and run on one model object; stock lm-eval (`hf`) at several batch sizes.
Run: python benchmarks/large_vocabulary.py
Run: python benchmarks/large_vocabulary.py --shape 7b --dtype bfloat16 --device cuda --num_docs 64
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from common import hflm, median_time, probe_lm, table
from flops import floor_flops, matmul_rate, own_shape_rate
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_tokenizer
from sft_probe.scoring.packing import Continuation

VOCAB_SIZE = 151936
NUM_CONTINUATIONS = 7
_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES = {"0.5b": (896, 4864, 24, 14, 2), "7b": (3584, 18944, 28, 28, 4)}

Request = tuple[tuple[str, str], list[int], list[int]]


def build_model(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """Random weights; only the small shape ties its embeddings, as the real ones do."""
    config = Qwen2Config(
        **dict(zip(_NAMES, SHAPES[shape], strict=True)),
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "0.5b",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    return model.eval()


def build_requests(num_docs: int, prompt_tokens: int, response_tokens: int) -> list[Request]:
    """Random token ids, as lm-eval hands them to its models."""
    random = np.random.default_rng(0)
    requests = []
    for doc in range(num_docs):
        prompt = random.integers(VOCAB_SIZE, size=prompt_tokens).tolist()
        for k in range(NUM_CONTINUATIONS):
            requests.append(
                (
                    (str(doc), str(k)),
                    prompt,
                    random.integers(VOCAB_SIZE, size=response_tokens).tolist(),
                )
            )
    return requests


def main() -> None:
    """One table: ours, and stock at each batch size."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--shape", choices=SHAPES, default="0.5b")
    flags.add_argument("--dtype", default="float32")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--num_docs", type=int, default=4)
    flags.add_argument("--prompt_tokens", type=int, default=400)
    flags.add_argument("--response_tokens", type=int, default=60)
    flags.add_argument("--batch_sizes", default="1,4,8", help="of hf")
    flags.add_argument("--repeats", type=int, default=3)
    args = flags.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    model, tokenizer = (
        build_model(args.shape, args.dtype, args.device),
        load_tokenizer(EMBEDDED_MODEL),
    )
    requests = build_requests(args.num_docs, args.prompt_tokens, args.response_tokens)
    lms: dict[str, Any] = {"sft_probe": probe_lm(model, tokenizer)}
    lms |= {
        f"hf, batch {size}": hflm(model, tokenizer, int(size))
        for size in args.batch_sizes.split(",")
    }
    sides = {
        name: partial(lm._loglikelihood_tokens, requests, disable_tqdm=True)
        for name, lm in lms.items()
    }
    median_time(sides, 1)  # warm
    seconds, results = median_time(sides, args.repeats)
    report(args, model, requests, seconds, results)


def report(
    args: Any,
    model: Any,
    requests: list[Request],
    seconds: dict[str, float],
    results: dict[str, list[Any]],
) -> None:
    """Prints the table and what is needed to read it."""
    floor = floor_flops(model, [Continuation(prompt, ids) for _, prompt, ids in requests])
    square, own = matmul_rate(model.dtype, args.device), own_shape_rate(model)
    best = min((name for name in seconds if name != "sft_probe"), key=lambda name: seconds[name])
    print(
        f"Qwen2.5 {args.shape} shape, {args.dtype}, {args.device}: {args.num_docs} docs x "
        f"{NUM_CONTINUATIONS}\n"
    )
    table(
        [
            {
                "side": name,
                f"median of {args.repeats}, s": spent,
                "best hf / this": seconds[best] / spent,
                "floor / this at the matmul rate": floor / square / spent,
                "floor / this at the own-shape rate": floor / own / spent,
            }
            for name, spent in seconds.items()
        ]
    )
    differences = [
        abs(a[0] - b[0]) for a, b in zip(results["sft_probe"], results[best], strict=True)
    ]
    print(
        f"P = {args.prompt_tokens}, R = {args.response_tokens}. Floor: {floor / 1e12:.3g} TFLOP. "
        "Matmul rate: "
        f"{square / 1e9:.0f} GFLOP/s; own-shape rate: {own / 1e9:.0f} GFLOP/s. Each side was run "
        "once before.\n"
        f"On a CPU all sides run with keep_freed_memory(), here on {torch.get_num_threads()} "
        "threads.\n"
        f"Largest difference of a summed log-prob from {best}: {max(differences):.2g} nats."
    )


if __name__ == "__main__":
    main()
