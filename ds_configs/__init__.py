"""DeepSpeed configurations. `auto` values are filled in by the Trainer from its own flags."""

from pathlib import Path


def available() -> list[str]:
    """Names that `--deepspeed NAME` takes, beside `none` and the path of a JSON file."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def path_of(name: str) -> Path:
    """The file of a shipped configuration."""
    return Path(__file__).parent / f"{name}.json"
