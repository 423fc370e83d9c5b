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
        self._bar = tqdm(total=total, unit="text", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
        self._started_s = self._logged_s = time.monotonic()
        self._num_stored = 0
        self._statuses: Counter[str] = Counter()

    def stored(self) -> None:
        """One text that the store had already."""
        self._num_stored += 1
        self._bar.update()

    def answered(self, status: str, cost_usd: float | None) -> None:
        """One text that was asked for; `cost_usd` is what all runs cost so far."""
        self._statuses[status] += 1
        self._bar.set_postfix_str(_cost(cost_usd), refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._logged_s > _LOG_INTERVAL_S:
            self._logged_s = time.monotonic()
            _LOG.info("%s", self.line(cost_usd))

    def line(self, cost_usd: float | None) -> str:
        """The same in words, with the answers by status."""
        asked = self._statuses.total()
        rate = asked / max(time.monotonic() - self._started_s, 1e-9)
        done = self._num_stored + asked
        parts = [f"{done} texts done ({self._num_stored} from the store)"]
        if self._total is not None:
            left = self._total - done
            parts.append(f"{left} left" + (f", {tqdm.format_interval(left / rate)} to go" if left and asked else ""))
        parts.append(f"{rate:.1f} a second")
        parts.append(_cost(cost_usd))
        parts += [f"{count} {status}" for status, count in sorted(self._statuses.items()) if status != "ok"]
        return "; ".join(parts)

    def close(self, cost_usd: float | None) -> None:
        """Ends the line."""
        self._bar.close()
        if self._statuses:
            _LOG.info("%s", self.line(cost_usd))


def _cost(cost_usd: float | None) -> str:
    return "cost unknown" if cost_usd is None else f"${cost_usd:.4f} so far"
