"""How often the printed intervals and bands hold the truth, and how often a printed sentence is
wrong, by simulation.

    python benchmarks/coverage.py [--sets 1000] [--only means,bands,...] [--csv coverage.csv]

A set is one simulated experiment. Docs carry noise of variance 1, half of which their cluster
shares. A cell is the coverage in percent, `w` behind it where most sets carry a printed warning,
`-` where the band is withheld in most.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sft_probe.analysis.stats.changes import change_table
from sft_probe.analysis.stats.clusters import Ints
from sft_probe.analysis.stats.contrasts import MIN_PAIR_CLUSTERS
from sft_probe.analysis.stats.intervals import (
    MAX_CLUSTER_SHARE,
    MIN_CLUSTERS,
    Bools,
    Estimate,
    Floats,
    estimate,
    over_runs_and_docs,
    pair_mean,
    slope,
)
from sft_probe.analysis.stats.measures import MEASURES
from sft_probe.analysis.stats.runs import Recording
from sft_probe.analysis.stats.verdict import verdict_table
from sft_probe.analysis.studies.transfer_maths import Cell, delta, difference, omega, ratio

NOISES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "t3": lambda generator, shape: generator.standard_t(3, size=shape) / np.sqrt(3),
    "exponential": lambda generator, shape: generator.exponential(size=shape) - 1,
    "lognormal": lambda generator, shape: (
        (np.exp(generator.normal(size=shape)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    ),
}
"""Mean 0, variance 1"""
CLUSTERS = ("alone", "pairs", "Zipf", "half in one", "30 % missing", "80 % missing")
NUM_DOCS = (24, 32, 100, 500)
RUNS = (1, 2, 3, 5, 8, 12)
SPREAD_OF_RUNS = {"runs": 10.0, "runs_alike": 1.0}
"""Table to the variance of the mean over runs, in variances of the mean over docs"""


@dataclass(frozen=True)
class Design:
    """Docs of one simulated experiment."""

    noise: str
    num_docs: int
    kind: str

    @property
    def clusters(self) -> Ints:
        """[docs]; where scores are missing, docs are clusters of their own."""
        docs = np.arange(self.num_docs)
        if self.kind == "pairs":
            return docs // 2
        if self.kind == "half in one":
            return np.maximum(docs - self.num_docs // 2 + 1, 0)
        if self.kind == "Zipf":  # the k-th cluster has 1/k of the docs of the first
            share = 1 / np.arange(1, self.num_docs // 4 + 1)
            edges = np.cumsum(np.maximum(1, np.round(share / share.sum() * self.num_docs)))
            return np.unique(np.searchsorted(edges, docs, side="right"), return_inverse=True)[1]
        return docs

    @property
    def missing(self) -> float:
        """Share of scores that are missing."""
        return float(self.kind.split()[0]) / 100 if "missing" in self.kind else 0.0

    def draw(self, generator: np.random.Generator, *points: int) -> Floats:
        """Draw [docs, *points]; half of the variance is of the cluster."""
        clusters = self.clusters
        of_clusters = NOISES[self.noise](generator, (int(clusters.max()) + 1, *points))[clusters]
        if len(set(clusters.tolist())) == self.num_docs:
            return of_clusters
        values: Floats = np.sqrt(0.5) * (
            of_clusters + NOISES[self.noise](generator, (self.num_docs, *points))
        )
        return values

    def hide(self, values: Floats, generator: np.random.Generator) -> Floats:
        """Replace the missing share of values by NaN, of each point another."""
        return np.where(generator.random(values.shape) < self.missing, np.nan, values)


def flagged(found: Estimate) -> Bools:
    """Where a warning is printed beside the interval."""
    return (found.effective_clusters < MIN_CLUSTERS) | (found.largest_cluster > MAX_CLUSTER_SHARE)


def held(found: Estimate, truth: float = 0.0) -> Bools:
    """Where the interval holds the truth."""
    return (found.low <= truth) & (truth <= found.high)


def means(design: Design, num_sets: int, generator: np.random.Generator) -> dict[str, float]:
    """Intervals of a mean change of one run."""
    found = estimate(
        design.hide(design.draw(generator, num_sets), generator),
        design.clusters,
        num_resamples=1000,
    )
    return _summary(held(found), flagged(found))


def _summary(inside: Bools, warned: Bools) -> dict[str, float]:
    return {"coverage": float(inside.mean()), "warned": float(warned.mean())}


def bands(design: Design, num_sets: int, generator: np.random.Generator) -> dict[str, float]:
    """Bands of random walks of 8 steps of two categories, the other one with docs alone."""
    inside, withheld, warned = [], [], []
    clusters = np.stack([design.clusters, np.arange(design.num_docs)], axis=1)
    for _ in range(num_sets):
        own, other = (
            item.draw(generator, 8)
            for item in (design, Design(design.noise, design.num_docs, "alone"))
        )
        values = design.hide(np.stack([own, other], axis=1).cumsum(axis=2), generator)
        found = estimate(values, clusters, band=True, num_resamples=500)
        known = ~np.isnan(found.band_low)
        inside.append(bool(((found.band_low <= 0) & (found.band_high >= 0))[known].all()))
        withheld.append(not known.any())
        warned.append(bool(flagged(found).any()))
    shown = ~np.array(withheld)
    coverage = float(np.array(inside)[shown].mean()) if shown.any() else np.nan
    return {
        "coverage": coverage,
        "warned": float(np.mean(warned)),
        "withheld": float(1 - shown.mean()),
    }


def runs(
    design: Design,
    num_sets: int,
    generator: np.random.Generator,
    num_runs: int,
    ratio_of_variances: float,
) -> dict[str, float]:
    """Intervals over runs and prompts; the mean over runs has so many times the variance of the
    mean over docs."""
    kept = generator.permutation(design.num_docs)[: round(design.num_docs * (1 - design.missing))]
    kept.sort()
    clusters = np.unique(design.clusters[kept], return_inverse=True)[1]
    sizes = np.bincount(clusters)
    shared = 0.5 if len(sizes) < len(clusters) else 0.0
    variance = (shared * (sizes**2).sum() / len(kept) + 1 - shared) / len(kept)
    docs = design.draw(generator, num_sets)[kept]
    spread = np.sqrt(ratio_of_variances * variance * num_runs)
    of_runs = generator.normal(0, spread, size=(num_runs, 1, num_sets)) * (num_runs > 1)
    both = 0.5 * NOISES[design.noise](generator, (num_runs, len(kept), num_sets)) * (num_runs > 1)
    found = over_runs_and_docs(docs + of_runs + both, clusters)
    return _summary(held(found), flagged(found))


def ratios(
    design: Design, num_sets: int, generator: np.random.Generator, num_runs: int
) -> dict[str, float]:
    """Intervals of share, difference and omega of two rows, over runs and prompts; coverage: the
    mean of the three."""
    clusters, scale = design.clusters, 1 / np.sqrt(design.num_docs)
    tokens = np.ceil(np.exp(generator.normal(3.5, 0.6, size=design.num_docs)))
    truths = {"ii": 1.0, "ij": 0.6, "ji": 0.5, "jj": 0.8}
    docs = design.draw(generator, num_sets)
    cells = {}
    for name, truth in truths.items():
        own = design.draw(generator, num_sets)
        run = generator.normal(0, 0.1 * scale * np.sqrt(num_runs), size=(num_runs, 1, num_sets)) * (
            num_runs > 1
        )
        per_token = truth + 0.1 * (docs + own) + 0.7 * run
        cells[name] = Cell(
            change=tokens[:, None] * np.broadcast_to(per_token, (num_runs, *docs.shape)),
            tokens=tokens,
            clusters=clusters,
            order_seeds=[str(seed) for seed in range(num_runs)],
        )
    share, gap = ratio(cells["ji"], cells["ii"]), difference(cells["ji"], cells["ii"])
    value = omega(*(cells[name].value for name in ("ii", "ij", "ji", "jj")))
    slope_of = 1 / (cells["ii"].value + cells["jj"].value)
    slopes = [(cells[name], (1 - value) * slope_of) for name in ("ii", "jj")]
    slopes += [(cells[name], -slope_of) for name in ("ij", "ji")]
    of_omega = delta(value, slopes)
    known = (
        (share, truths["ji"] / truths["ii"]),
        (gap, truths["ji"] - truths["ii"]),
        (of_omega, float(omega(*(np.array(truth) for truth in truths.values())))),
    )
    rates = [float(held(found, truth)[~np.isnan(found.low)].mean()) for found, truth in known]
    names = dict(zip(("share", "difference", "omega"), rates, strict=True))
    return {"coverage": float(np.mean(rates)), **names, "warned": float(flagged(of_omega).mean())}


def pmi(design: Design, num_sets: int, generator: np.random.Generator) -> dict[str, float]:
    """Intervals of the mean of quantities that belong to two docs: a text under its own prompt and
    under another's.

    The two docs' effects are one and the same, independent, or opposite; the lowest coverage of the
    three.
    """
    num_docs, clusters = design.num_docs, design.clusters
    borrower = (np.arange(num_docs) + 1 + num_docs // 3) % num_docs
    own, apart = design.draw(generator, num_sets), design.draw(generator, num_sets)
    of_quantity = 0.5 * NOISES[design.noise](generator, (num_docs, num_sets))
    found = [
        pair_mean(own + 0.5 * other[borrower] + of_quantity, clusters, clusters[borrower])
        for other in (own, apart, -own)
    ]
    coverage = min(float(held(item).mean()) for item in found)
    return {
        "coverage": coverage,
        "warned": float((found[0].effective_clusters < MIN_PAIR_CLUSTERS).mean()),
    }


def slopes(design: Design, num_sets: int, generator: np.random.Generator) -> dict[str, float]:
    """Intervals of the slope of a change with response length."""
    lengths = np.ceil(np.exp(generator.normal(3.5, 0.6, size=design.num_docs)))
    values = 0.1 * lengths[:, None] + design.draw(generator, num_sets)
    found = slope(lengths, design.hide(values, generator), design.clusters)
    return _summary(held(found, 0.1), flagged(found))


TRUTHS = {
    "flat": lambda step: 0.0 * step,
    "plateau": lambda step: 3.0 * np.minimum(step, 3) / 3,
    "rising": lambda step: 3.0 * step / 9,
}


def recording_of(values: Floats, clusters: Ints) -> Recording:
    """Return a run whose log-probs are `values`, [docs, categories, steps]."""
    doc, category, step = (index.ravel() for index in np.indices(values.shape))
    rows = pd.DataFrame({"step": step, "category": [f"c{number}" for number in category]})
    rows["doc_id"] = [f"d{number:04d}" for number in doc]
    rows["conversation_id"] = clusters[doc]
    rows = rows.assign(run="simulated", source="live", split="heldout", examples_seen=0, epoch=0.0)
    rows = rows.assign(**dict.fromkeys((*MEASURES, "num_tokens", "num_bytes"), np.nan)).assign(
        logprob=values.ravel()
    )
    return Recording(name="simulated", path=Path(), rows=rows)


def sentences(
    design: Design, num_sets: int, generator: np.random.Generator, truth: str
) -> dict[str, float]:
    """Share of experiments (3 categories, 10 steps) in which any sentence tells of a move or a turn
    that is none."""
    wrong_turn, wrong_move = 0, 0
    curve = TRUTHS[truth](np.arange(10.0))
    for number in range(num_sets):
        noise = np.stack([design.draw(generator, 10) for _ in range(3)], axis=1)
        noise = (
            noise.cumsum(axis=2) / 3 if number % 2 else noise
        )  # random walks, and noise around the curve
        changes = change_table(recording_of(curve + noise, design.clusters))
        table = verdict_table(changes)
        turned = table["sentence"].str.contains(", then ")
        wrong_turn += bool(turned.any())
        wrong_move += bool((table["moved"] & ((table["change"] < 0) | (truth == "flat"))).any())
    return {"turn": wrong_turn / num_sets, "move": wrong_move / num_sets}


def cells(
    name: str, num_sets: int, num_docs: tuple[int, ...] = NUM_DOCS, seed: int = 0
) -> Iterator[dict[str, object]]:
    """Simulate every cell of one table."""
    simulate = {"means": means, "bands": bands, "pmi": pmi, "slopes": slopes}
    for noise in NOISES:
        for size in num_docs:
            for kind in CLUSTERS:
                design = Design(noise, size, kind)
                generator = np.random.default_rng([seed, size, *map(ord, noise + kind)])
                names = {"noise": noise, "docs": size, "clusters": kind, "sets": num_sets}
                if name in simulate:
                    if name != "pmi" or not design.missing:
                        yield {**names, **simulate[name](design, num_sets, generator)}
                elif name == "ratios" and not design.missing:
                    for count in RUNS:
                        yield {**names, "runs": count, **ratios(design, num_sets, generator, count)}
                elif name in SPREAD_OF_RUNS:
                    for count in RUNS:
                        found = runs(design, num_sets, generator, count, SPREAD_OF_RUNS[name])
                        yield {**names, "runs": count, **found}


def sentence_cells(
    num_sets: int, num_docs: tuple[int, ...] = (24, 100), seed: int = 0
) -> Iterator[dict[str, object]]:
    """Simulate the error rates of sentences."""
    for truth in TRUTHS:
        for noise in NOISES:
            for size in num_docs:
                generator = np.random.default_rng([seed, size, *map(ord, noise + truth)])
                names = {"truth": truth, "noise": noise, "docs": size, "sets": num_sets}
                yield {
                    **names,
                    **sentences(Design(noise, size, "alone"), num_sets, generator, truth),
                }


def markdown(table: pd.DataFrame, columns: str) -> str:
    """Return coverage in percent: a row per noise and number of docs, a column per value of
    `columns`."""
    table = table.assign(
        cell=[
            "-"
            if row.get("withheld", 0) > 0.5
            else f"{100 * row['coverage']:.1f}" + "w" * (row["warned"] > 0.5)
            for _, row in table.iterrows()
        ]
    )
    order = list(dict.fromkeys(table[columns]))
    wide = table.pivot_table(
        index=["noise", "docs"], columns=columns, values="cell", aggfunc="first", sort=False
    )
    lines = [
        "| noise | docs | " + " | ".join(map(str, order)) + " |",
        "|---" * (len(order) + 2) + "|",
    ]
    lines += [
        "| " + " | ".join(map(str, (*names, *(row[name] for name in order)))) + " |"
        for names, row in wide.iterrows()
    ]
    return "\n".join(lines)


def worst_over_clusters(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cell with the coverage furthest from 95 % over the kinds of clusters that carry no
    warning."""
    calm = table[table["warned"] <= 0.5]
    rank = (calm["coverage"] - 0.95).abs()
    return (
        calm.assign(rank=rank)
        .sort_values("rank")
        .drop_duplicates(["noise", "docs", "runs"], keep="last")
        .sort_index()
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sets", type=int, default=1000, help="simulated experiments per cell; default: 1000"
    )
    parser.add_argument("--only", default="means,bands,runs,runs_alike,ratios,pmi,slopes,sentences")
    parser.add_argument("--docs", default=",".join(map(str, NUM_DOCS)))
    parser.add_argument(
        "--csv", type=Path, help="every cell, also of the kinds of clusters that a table sums up"
    )
    options = parser.parse_args()
    num_docs = tuple(map(int, options.docs.split(",")))
    tables = []
    for name in options.only.split(","):
        if name == "sentences":
            table = pd.DataFrame(sentence_cells(options.sets))
            print(f"\n{name}, {options.sets} sets\n\n{table.to_string(index=False)}", flush=True)
        else:
            table = pd.DataFrame(cells(name, options.sets, num_docs))
            by_runs = "runs" in table
            shown = markdown(
                worst_over_clusters(table) if by_runs else table, "runs" if by_runs else "clusters"
            )
            print(f"\n{name}, {options.sets} sets\n\n{shown}", flush=True)
        tables.append(table.assign(table=name))
    if options.csv:
        pd.concat(tables, ignore_index=True).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
