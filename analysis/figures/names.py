"""Which figures there are, and in which formats: known without importing what draws them."""

FORMATS = ("png", "svg", "pdf", "html")
DEFAULT_FORMATS = ("png", "pdf")
OF_A_SPLIT = (
    *("data_card", "trajectory", "changes", "levels", "parts"),
    *("squeezing", "kl", "shift", "docs", "tokens", "length"),
)
FIGURES = (
    *OF_A_SPLIT,
    *("comparison", "benchmarks", "forgetting", "generations", "code_length"),
)
