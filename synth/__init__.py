"""Making and checking probe sets."""
