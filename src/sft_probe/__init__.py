"""sft-probe: what a language model is really learning during supervised fine-tuning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_probe.train.probe import ProbeCallback as ProbeCallback

__version__ = "0.1.0"
__all__ = ["ProbeCallback"]


def __getattr__(name: str) -> Any:
    """Import `ProbeCallback` at its first use: it needs torch and the extra `train`."""
    if name != "ProbeCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sft_probe.train.probe import ProbeCallback

    return ProbeCallback
