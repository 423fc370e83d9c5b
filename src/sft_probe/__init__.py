"""sft-probe: what a language model is really learning during supervised fine-tuning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_probe.api import Runs as Runs
    from sft_probe.api import compare as compare
    from sft_probe.api import load as load
    from sft_probe.api import load_probe_set as load_probe_set
    from sft_probe.api import probe_set as probe_set
    from sft_probe.train.live import record as record
    from sft_probe.train.live import score as score
    from sft_probe.train.probe import ProbeCallback as ProbeCallback

__version__ = "0.1.0"
_HOMES = {
    "ProbeCallback": "sft_probe.train.probe",
    **dict.fromkeys(("Runs", "compare", "load", "load_probe_set", "probe_set"), "sft_probe.api"),
    **dict.fromkeys(("record", "score"), "sft_probe.train.live"),
}
"""Public name to the module that has it: torch, pandas and the rest are imported at first use."""
__all__ = ["ProbeCallback", "Runs", "compare", "load", "probe_set", "record", "score"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return also the names that are not imported yet."""
    return sorted({*globals(), *__all__})
