"""Embedded data: the probe set `helpful-mini`."""
