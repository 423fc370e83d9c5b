"""The SFT driver: training on one category, with weights-only snapshots at chosen steps."""
