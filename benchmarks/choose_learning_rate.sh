#!/usr/bin/env bash
# The learning rate of the demo: the one with the highest held-out log p of `chosen` (lowest loss) after the last step.
# Run as: benchmarks/choose_learning_rate.sh OUT_DIR   (about 15 minutes on 2 cores)
set -euo pipefail
out=$1
for rate in 5e-6 1e-5 2e-5 4e-5; do
  run="$out/lr_$rate"
  sft-probe train --config recipes/quickstart.yaml --learning_rate "$rate" --snapshot_steps last --output_dir "$run"
  sft-probe lm-eval run --model hf --tasks sft_probe_chosen --batch_size 8 --output_path "$run/chosen" \
    --model_args "pretrained=$run/weights/step_000032,dtype=float32,softmax_dtype=float32"
done
grep -H '"logprob,none"' "$out"/lr_*/chosen/*/results_*.json
