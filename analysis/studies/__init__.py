"""One research question each."""
