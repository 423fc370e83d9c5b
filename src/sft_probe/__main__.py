"""Run as: python -m sft_probe (the same as `sft-probe`)."""

from sft_probe.cli import main

if __name__ == "__main__":
    main()
