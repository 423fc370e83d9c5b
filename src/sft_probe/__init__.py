"""sft-probe: what a language model is really learning during supervised fine-tuning."""

__version__ = "0.1.0"
