"""Asking a writer: in order, once, within rate and budget."""
