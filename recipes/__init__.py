"""Recipes of `sft-probe train`, found by name: `--config quickstart`."""

from pathlib import Path

from sft_probe.errors import unknown


def available() -> list[str]:
    """Return the names that `--config` takes, beside the path of a YAML file."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that is included.

    Raises:
        UserError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).name.removesuffix(".yaml")
    if stem in available() and name in (stem, f"{stem}.yaml", f"recipes/{stem}.yaml"):
        return Path(__file__).parent / f"{stem}.yaml"
    use = f"Use a YAML file, or one of {', '.join(available())}."
    raise unknown("recipe", name, available(), use=use)
