"""Whether a run is worth its money: it ends early where nothing that comes back can be used."""

from collections import Counter

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer

NUM_WITHOUT_TEXT = 20
"""Answers without any text, whatever their category, after which a run ends if there never was
one."""
NUM_WITHOUT_USE = 50
"""Answers of one category, none of which passes the checks, after which a run ends."""
_CURES = {
    "truncated": "The output limit is too low for the text: shorten what the template asks for.",
    "blocked": "The server blocks these prompts or answers: try another model or another source.",
    "judged": "The writer turns its own texts down (--judge): look at them in the store, then "
    "change the template.",
    "no verdict": "The model says neither yes nor no: take a larger one, or leave --judge out.",
    "refused": "The model refuses: change the template (--templates) or the model.",
    "invalid": "The server sends no text: check the model and the address, and the request that it "
    "complains about.",
}
_THOUGHTS_CURE = (
    "The model spends its output on thoughts: take one that does not think or turn its thinking "
    "off at the server, or "
    "leave room with --thinking-tokens N, which raises the output limit of every text (and what it "
    "may cost)."
)
_CHECK_CURE = (
    "Look at these texts in the store, then change the template (--templates) or take a larger "
    "model."
)


class UselessRunError(UserError):
    """Nothing that comes back can be used: of any category, or of one."""

    def __init__(self, message: str, category: str | None = None) -> None:
        super().__init__(message)
        self.category = category


class Trial:
    """Counts what can be used of the first answers of each category."""

    def __init__(self) -> None:
        self._faults: dict[str, Counter[str]] = {}
        self._proven: set[str] = set()
        self._without_text: Counter[str] = Counter()
        self._has_text = False

    def note(self, category: str, answer: Answer, fault: str | None) -> None:
        """Count one answer, with what is wrong with it.

        Raises:
            UselessRunError: no answer so far has a text, or none of this category passes.
        """
        self._has_text = self._has_text or answer.status == "ok"
        if fault is None:
            self._proven.add(category)
        if category in self._proven:
            return
        faults = self._faults.setdefault(category, Counter())
        faults[_shown(answer, fault)] += 1
        if not answer.is_turned_down:  # those are counted where they are asked for
            self._without_text[_shown(answer, fault)] += 1
        if not self._has_text and self._without_text.total() >= NUM_WITHOUT_TEXT:
            raise useless(
                f"of the first {NUM_WITHOUT_TEXT} answers none has a text", self._without_text
            )
        if faults.total() >= NUM_WITHOUT_USE:
            raise useless(
                f"none of the first {faults.total()} answers for `{category}` can be used",
                faults,
                category,
            )


def _shown(answer: Answer, fault: str | None) -> str:
    return f"{fault}: {answer.reason}" if answer.reason else str(fault)


def useless(what: str, faults: Counter[str], category: str | None = None) -> UselessRunError:
    """Return the error that ends a useless run, with the most common faults and what to do."""
    reasons = "; ".join(f"{fault} ({count})" for fault, count in faults.most_common(3))
    worst = faults.most_common(1)[0][0]
    cure = (
        _THOUGHTS_CURE if "thoughts" in worst else _CURES.get(worst.partition(":")[0], _CHECK_CURE)
    )
    return UselessRunError(
        f"{what}: {reasons}. So the run ends here; the next one asks for what has no text again. "
        f"{cure}",
        category,
    )
