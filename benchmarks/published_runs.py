"""Downloads every published run of the list and prints what its import gives.

Run: python benchmarks/published_runs.py
"""

from sft_probe.analysis.stats.imports.choose import import_runs
from sft_probe.analysis.stats.imports.published import download, published_runs


def main() -> None:
    """Print a line for each run, and the notes of its import."""
    for run in published_runs():
        if not run.files:
            continue
        folder = download(run)
        (found,) = import_runs(folder, folder / run.texts if run.texts else None)
        table = found.benchmarks if found.means is None else found.means
        steps = table["step"].nunique() if table is not None else 0
        print(f"{run.name}: {steps} steps, {found.form}; {'; '.join(found.taken[:1])}")
        print("".join(f"  ! {note}\n" for note in found.notes), end="")


if __name__ == "__main__":
    main()
