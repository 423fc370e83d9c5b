"""Checkpoints to score rows."""
