"""The one scorer: packing, masks, the head, and log-probs of continuations."""
