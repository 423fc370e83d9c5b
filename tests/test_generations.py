"""What is said of greedy answers: paired changes of known numbers."""

import numpy as np
import pandas as pd
from scipy import stats

from sft_probe.analysis.stats.generations import generations_text


def test_changes_of_answers_have_intervals_and_repetition_counts_docs_with_both_answers() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.integers(180, 256, size=16), generator.integers(20, 90, size=16)
    table = pd.DataFrame(
        [
            {
                "doc_id": f"d{doc}",
                "conversation_id": f"c{doc}",
                "step": step,
                "num_tokens": int(numbers[doc]),
                "ended": bool(step),
                "repetition": None,
                "max_new_tokens": 256,
            }
            for step, numbers in ((0, before), (8, after))
            for doc in range(16)
        ]
    )
    text = generations_text(table)
    interval = stats.ttest_1samp(after - before, 0).confidence_interval()
    low, high = (float(text.split("[")[1].split("]")[0].split(", ")[end]) for end in (0, 1))
    assert low <= round(interval.low), "at least as wide as t"
    assert high >= round(interval.high)
    assert (
        f"{before.mean():.0f} to {after.mean():.0f} ({after.mean() - before.mean():+.0f} [" in text
    )
    assert "ended by themselves 0 to 100 (+100 no interval) %" in text, (
        "16 of 16 are not 100 % of all"
    )
    assert "repeated 4-grams ? to ? %" in text
