"""Embedded data: the probe set `helpful-mini` and the recipe of the demo."""
