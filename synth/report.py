"""What `sft-probe probe-set` prints: counts, lengths, duplicates, overlap of the splits, and each
fault."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from datasketch import MinHash

from sft_probe.probe_set import SPLITS, ProbeSet
from sft_probe.synth.checks.words import count_words, words

NEAR_DUPLICATE_JACCARD = 0.7
_SHINGLE_WORDS = 3
_NUM_PERMUTATIONS, _NUM_BANDS, _NUM_ROWS = 128, 14, 9
# the bands that weigh false and missed pairs alike at a similarity of 0.7

_MAX_RECENT = 2**16


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Links between texts whose word trigrams have a Jaccard similarity of about 0.7 or more
    (MinHash).

    Each text is linked to the first text with which it shares a band, at most one link for each
    band: what is linked, directly or through others, is what is alike, in a number of steps that
    grows with the texts and not with their square. `(i, j)` has i < j.
    """
    first_of: dict[str, int] = {}
    links = [(first_of.setdefault(text, number), number) for number, text in enumerate(texts)]
    numbers = np.array(
        list(first_of.values()), dtype=np.int64
    )  # equal texts are compared with others once
    values = np.empty((len(first_of), _NUM_BANDS), dtype=np.uint64)
    for row, text in enumerate(first_of):
        values[row] = _band_values(text)
    for band in values.T:
        _, first, place = np.unique(band, return_index=True, return_inverse=True)
        links += zip(numbers[first[place]].tolist(), numbers.tolist(), strict=True)
    return sorted({(first, second) for first, second in links if first != second})


class NearDuplicates:
    """An index of texts by the MinHash of their word trigrams: texts with an equal band are
    near-duplicates.

    It finds what `MinHashLSH` of datasketch finds in a fraction of the memory: 112 bytes for each
    text.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> None:
        """Makes `text` findable."""
        self._recent.update(_band_values(text))
        if len(self._recent) > _MAX_RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent = set()

    def holds(self, text: str) -> bool:
        """Whether a text was added whose Jaccard similarity to this one is about 0.7 or more."""
        values = _band_values(text)
        if not self._recent.isdisjoint(values):
            return True
        places = np.searchsorted(self._sorted, np.array(values, dtype=np.uint64))
        found = zip(places.tolist(), values, strict=True)
        return any(
            place < len(self._sorted) and self._sorted[place] == value for place, value in found
        )


@lru_cache(maxsize=1)
def _band_values(text: str) -> list[int]:
    """One number for each band of the text's MinHash, in which the band's own number takes part."""
    sketch = MinHash(num_perm=_NUM_PERMUTATIONS)
    sketch.update_batch([shingle.encode() for shingle in shingles(text)])
    bands = sketch.hashvalues[: _NUM_BANDS * _NUM_ROWS].reshape(_NUM_BANDS, _NUM_ROWS)
    return [
        int.from_bytes(hashlib.sha256(bytes([number]) + band.tobytes()).digest()[:8])
        for number, band in enumerate(bands)
    ]


def shingles(text: str) -> set[str]:
    """The word trigrams of a text in lower case, or the whole of a shorter one."""
    parts = words(text.lower())
    return {
        " ".join(parts[i : i + _SHINGLE_WORDS])
        for i in range(max(1, len(parts) - _SHINGLE_WORDS + 1))
    }


def report(probe_set: ProbeSet) -> str:
    """A plain-text account of a probe set."""
    counts = {split: len(probe_set.of_split(split)) for split in SPLITS}
    lines = [
        f"probe set {probe_set.name} ({probe_set.source}), prompt format {probe_set.prompt_format}",
        f"docs: {counts['train']} train, {counts['heldout']} heldout; "
        f"{sum(len(doc.messages) > 1 for doc in probe_set.docs)} with several turns; sha256 "
        f"{probe_set.sha256[:16]}",
        "",
        f"{'category':<20}{'words, mean':>12}{'min':>6}{'max':>6}{'bytes, mean':>13}"
        f"{'near-duplicates':>17}",
        *(_category_line(probe_set, category) for category in probe_set.categories),
        "",
        *_prompt_lines(probe_set),
        "",
        *(
            ["faults:", *(f"  {fault}" for fault in probe_set.faults)]
            if probe_set.faults
            else ["no faults"]
        ),
    ]
    return "\n".join(lines)


def _category_line(probe_set: ProbeSet, category: str) -> str:
    texts = [doc.responses[category] for doc in probe_set.docs]
    if not texts:
        return f"{category:<20}{'-':>12}"
    lengths = [count_words(text) for text in texts]
    mean_bytes = sum(len(text.encode()) for text in texts) / len(texts)
    return (
        f"{category:<20}{sum(lengths) / len(lengths):>12.1f}{min(lengths):>6}{max(lengths):>6}"
        f"{mean_bytes:>13.1f}"
        f"{len({second for _, second in near_duplicates(texts)}):>17}"
    )


def _prompt_lines(probe_set: ProbeSet) -> list[str]:
    """Near-duplicate prompts, and texts that the splits share."""
    docs = probe_set.docs
    pairs = near_duplicates([prompt_text(doc.messages) for doc in docs])
    across = [pair for pair in pairs if docs[pair[0]].split != docs[pair[1]].split]
    number = len({second for _, second in pairs})
    lines = [
        f"near-duplicates of an earlier prompt: {number}, of them in the other split: {len(across)}"
    ]
    lines += [f"  {docs[first].doc_id} ~ {docs[second].doc_id}" for first, second in across[:5]]
    splits_of = defaultdict(set)
    for doc in docs:
        for text in doc.responses.values():
            splits_of[text].add(doc.split)
    lines.append(
        "responses that stand in both splits: "
        f"{sum(len(splits) > 1 for splits in splits_of.values())}"
    )
    return lines


def prompt_text(messages: Iterable[dict[str, str]]) -> str:
    """The turns' contents, one after the other."""
    return "\n".join(turn["content"] for turn in messages)
