"""The live line: done, left, rate, cost and time to go."""

import logging
import sys
import time
from collections import Counter

from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_LOG_INTERVAL_S = 60.0


class Progress:
    """One line on a terminal; elsewhere a line of the log each minute and one at the end."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._bar = tqdm(
            total=total, unit="text", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
        )
        self._started_s = self._logged_s = time.monotonic()
        self._num_stored = 0
        self._statuses: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def stored(self) -> None:
        """Count one text that the store had already."""
        self._num_stored += 1
        self._bar.update()

    def answered(self, status: str, cost_usd: float | None) -> None:
        """Count one text that was asked for; `cost_usd` is what all runs cost so far."""
        self._statuses[status] += 1
        self._bar.set_postfix_str("; ".join([_cost(cost_usd), *self._failures()]), refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged_s > _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            _LOG.info("%s", self.line(cost_usd))

    def failed(self, fault: str) -> None:
        """Count one text that did not pass a check."""
        self._faults[fault] += 1

    def _failures(self) -> list[str]:
        """Return what fails, most often first: answers without a text by status, texts by fault."""
        without_text = Counter(
            {status: count for status, count in self._statuses.items() if status != "ok"}
        )
        return [f"{count} {name}" for name, count in (without_text + self._faults).most_common()]

    def line(self, cost_usd: float | None) -> str:
        """Return the same in words, with what fails."""
        asked = self._statuses.total()
        rate = asked / max(time.monotonic() - self._started_s, 1e-9)
        done = self._num_stored + asked
        parts = [f"{done} texts done ({self._num_stored} from the store)"]
        if self._total is not None:
            left = self._total - done
            parts.append(
                f"{left} left"
                + (f", {tqdm.format_interval(left / rate)} to go" if left and asked else "")
            )
        parts.append(f"{rate:.1f} a second")
        parts.append(_cost(cost_usd))
        return "; ".join(parts + self._failures())

    def close(self, cost_usd: float | None) -> None:
        """End the line."""
        self._bar.close()
        if self._statuses:
            _LOG.info("%s", self.line(cost_usd))


def _cost(cost_usd: float | None) -> str:
    return "cost unknown" if cost_usd is None else f"${cost_usd:.4f} so far"
