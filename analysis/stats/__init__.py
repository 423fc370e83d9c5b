"""Score rows to tables of numbers with intervals."""
