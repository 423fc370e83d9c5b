"""The lm-eval plug-in: one loglikelihood task per category of response, on held-out and on trained
prompts."""
