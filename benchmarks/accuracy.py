"""Measures the error of bfloat16: summed log-probs of real docs against stock lm-eval in float32.

Stock is run with its default softmax, in the model's dtype, and with `softmax_dtype=float32`. By default the error
includes that of rounding the weights to bfloat16; with `--rounded_weights` the float32 reference has the same rounded
weights, and what is left is the arithmetic.
Run: python benchmarks/accuracy.py
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from common import hflm, instances, load_docs, parser, probe_lm, table
from lm_eval.models.huggingface import HFLM

from sft_probe.malloc import keep_freed_memory
from sft_probe.models import EMBEDDED_MODEL, load_model, load_tokenizer


def sums(lm: HFLM, requests: list[Any]) -> npt.NDArray[np.float64]:
    """Summed log-prob of each request."""
    return np.array([result[0] for result in lm.loglikelihood(requests, disable_tqdm=True)])


def main() -> None:
    """One table."""
    flags = parser(__doc__, num_docs=40)
    flags.add_argument("--rounded_weights", action="store_true")
    args = flags.parse_args()
    keep_freed_memory()
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    requests = instances(load_docs(args.data, args.num_docs, 6, tokenizer))
    reference = load_model(EMBEDDED_MODEL, "bfloat16" if args.rounded_weights else "float32").float()
    expected = sums(hflm(reference, tokenizer, 8), requests)
    model = load_model(EMBEDDED_MODEL, "bfloat16")
    sides = {
        "hf, default softmax": hflm(model, tokenizer, 8, softmax_dtype=None),
        "hf, softmax_dtype=float32": hflm(model, tokenizer, 8),
        "sft_probe": probe_lm(model, tokenizer),
    }
    errors = {name: np.abs(sums(lm, requests) - expected) for name, lm in sides.items()}
    stock = errors["hf, default softmax"]
    print(f"bfloat16, {len(requests)} sums of log-probs in nats, mean {expected.mean():.0f}:\n")
    table(
        [
            {
                "side": name,
                "median error": float(np.median(error)),
                "RMS error": rms(error),
                "largest error": float(error.max()),
                "hf / this, median": float(np.median(stock) / np.median(error)),
                "hf / this, RMS": rms(stock) / rms(error),
            }
            for name, error in errors.items()
        ]
    )
    print("hf at batch 8; the weights of the reference are " + ("rounded too." if args.rounded_weights else "float32."))


def rms(error: npt.NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(error**2)))


if __name__ == "__main__":
    main()
