"""Runs that were trained and scored elsewhere, one file for each form."""
