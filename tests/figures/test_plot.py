"""Figures: drawn, complete, of the width asked for, and honest about what they show."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import SHARED, Run, needs_shared, user_error
from score_files import CURVES, write_run

from sft_probe.analysis.figures.figure import COLORS, Style, colors_of
from sft_probe.analysis.figures.plot import figures_of
from sft_probe.analysis.stats.analyze import analyze
from sft_probe.probe_set import CATEGORIES

NAMES = (
    *("changes", "data_card", "docs", "length", "levels", "parts", "squeezing", "tokens"),
    "trajectory",
)


def test_plot_draws_every_figure_of_a_run_and_writes_its_numbers(
    swept_run: Path, sft_probe: Run, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(swept_run, run)
    tasks = [
        ("t", "none"),
        ("g", "strict"),
        ("g", "flexible"),
        *((f"m{n}", "none") for n in range(10)),
    ]
    benchmarks = [
        {"run": "tiny", "step": step, "task": task, "metric": "acc", "filter": name, "value": 0.5}
        for step in (0, 4)
        for task, name in tasks
    ]
    pd.DataFrame(benchmarks).assign(stderr=0.1, n=9).to_csv(run / "benchmarks.csv", index=False)
    row = {
        "run": "tiny",
        "category": "chosen",
        "split": "train",
        "num_tokens": 40,
        "num_bytes": 160,
    }
    lines = [
        {**row, "step": 1 + n // 4, "doc_id": f"t{n}", "loss_sum": 100.0 - n, "order": n}
        for n in range(16)
    ]
    (run / "first_epoch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = sft_probe("plot", run, "--format", "svg")
    assert result.returncode == 0, result.stderr
    figures = run / "figures"
    expected = {f"{name}_heldout" for name in NAMES} | {"code_length"}
    expected |= {"benchmarks", "benchmarks_against_probe"}
    assert (
        {path.stem for path in figures.glob("*.svg")}
        == expected
        == {path.stem for path in figures.glob("*.csv")}
    )
    svg = (figures / "trajectory_heldout.svg").read_text()
    for words in (
        *CATEGORIES,
        "nats per response",
        "optimizer step",
        "32 held-out prompts",
        "no evidence",
        "training noise",
    ):
        assert words in svg, words
    assert pd.read_csv(figures / "benchmarks.csv")["name"].nunique() == 13
    panels = (figures / "benchmarks.svg").read_text()
    assert "g, acc, strict" in panels
    assert "non_response" in panels, "the probes stand above"
    assert "1 more are in the CSV alone: m9, acc" in panels
    tokens = pd.read_csv(figures / "tokens_heldout.csv")
    assert tokens["token"].notna().any(), "the run's own tokenizer gives the texts"
    card = pd.read_csv(figures / "data_card_heldout.csv").set_index("category")
    assert card.loc["chosen", "leading_space"] == 0
    code = pd.read_csv(figures / "code_length.csv")
    last = code[code["kind"] == "prequential, so far"]["bits"].iloc[-1]
    assert last == pytest.approx(sum(100 - n for n in range(16)) / (16 * 160) / math.log(2))
    for path in figures.glob("*.svg"):
        assert "<path" in path.read_text(), path


def test_plot_writes_each_format_at_the_width_that_was_asked_for(
    sft_probe: Run, tmp_path: Path
) -> None:
    source = tmp_path / "means.csv"
    rows = [
        f"{step},{name},{curve(step) - 100}\n"
        for name, curve in CURVES.items()
        for step in (0, 1, 4, 8)
    ]
    source.write_text("step,category,logprob\n" + "".join(rows))
    (tmp_path / "labels.yaml").write_text("chosen: trained on y^+ or y_{i}\n")
    flags = [
        "--width",
        "3.25in",
        "--font-size",
        "8",
        "--labels",
        tmp_path / "labels.yaml",
        "--categories",
        "chosen,rejected",
    ]
    result = sft_probe(
        "plot", source, *flags, "--format", "png,svg,pdf,html", "--out", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert (out / "changes_heldout.png").read_bytes().startswith(b"\x89PNG")
    pdf = (out / "changes_heldout.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    svg = (out / "changes_heldout.svg").read_text()
    assert "trained on y⁺ or yᵢ" in svg
    assert "non_response" not in svg
    assert 'width="234pt' in svg
    page = (out / "changes_heldout.html").read_text()
    assert "vegaEmbed" in page
    assert not re.search(r'(src|href)="http', page), "it opens offline"
    table = pd.read_csv(out / "changes_heldout.csv")
    assert set(table["category"]) == {"chosen", "rejected"}
    assert {"change", "band_low", "band_high", "num_docs"} <= set(table.columns)


def _page_widths(folder: Path) -> dict[str, float]:
    boxes = {
        path.stem: re.search(rb"MediaBox \[0 0 ([\d.]+)", path.read_bytes())
        for path in folder.glob("*.pdf")
    }
    return {name: float(box[1]) for name, box in boxes.items() if box}


@pytest.mark.parametrize(
    ("width", "points"),
    [
        ("3.25in", 234),
        pytest.param("12cm", 340.157, marks=pytest.mark.full),
        pytest.param("7in", 504, marks=pytest.mark.full),
    ],
)
def test_pages_have_the_width_asked_for(
    sft_probe: Run, tmp_path: Path, width: str, points: float
) -> None:
    long = "a_category_of_forty_letters_and_a_few_more"
    curves = {**CURVES, long: lambda step: -float(step)}
    one = write_run(tmp_path / "one", curves=curves, argmax=float)
    two = write_run(tmp_path / "two", seed=1)
    flags = ["--width", width, "--font-size", 8, "--format", "pdf", "--out", tmp_path / "out"]
    for runs in ([one], [one, two]):
        result = sft_probe("plot", *runs, *flags)
        assert result.returncode == 0, result.stderr
    found = _page_widths(tmp_path / "out")
    assert set(found) == {f"{name}_heldout" for name in (*NAMES, "comparison")}
    assert all(size == pytest.approx(points, abs=0.01) for size in found.values()), found


def test_a_figure_for_a_paper(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out = tmp_path / "out"
    flags = ["--figures", "changes,parts", "--no-title", "--out", out]
    result = sft_probe("plot", f"ours={run}", *flags, "--format", "svg")
    assert result.returncode == 0, result.stderr
    names = ("changes_heldout", "parts_heldout")
    suffixes = ("csv", "svg", "txt")
    assert {path.name for path in out.iterdir()} == {f"{n}.{s}" for n in names for s in suffixes}
    assert set(pd.read_csv(out / "changes_heldout.csv")["run"]) == {"ours"}
    svg, caption = ((out / f"changes_heldout.{suffix}").read_text() for suffix in ("svg", "txt"))
    assert caption.startswith("Change of log p(response | prompt) while fine-tuning on chosen. ")
    assert "training noise." in caption
    assert "while fine-tuning" not in svg
    lines = re.findall(r'<path aria-label="[^"]*"[^>]*fill="none"[^>]*>', svg) or re.findall(
        r"<path[^>]*stroke-dasharray[^>]*>", svg
    )
    dashes = {re.sub(r'.*stroke-dasharray="([^"]*)".*', r"\1", line) for line in lines}
    assert len(dashes) >= len(CURVES), "lines are told apart without colour"
    again = sft_probe("plot", run, "--figures", "levels,benchmarks", "--out", out)
    assert "nothing to draw of these runs: benchmarks" in again.stderr
    assert {path.suffix for path in out.glob("levels*")} == {".csv", ".pdf", ".png", ".txt"}


def test_bands_of_levels_end_at_certainty(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", curves={"chosen": lambda step: 120.2 if step else 0.0})
    result = sft_probe("plot", run, "--figures", "levels", "--format", "svg")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(run / "figures/levels_heldout.csv")
    assert (table["level"] + table["band_high"] - table["change"]).max() > 0, "it would be above"
    assert table["level_high"].max() == 0
    assert (table["level_low"] <= table["level_high"])[1:].all()


def test_control_characters_are_drawn_as_a_sign(sft_probe: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", train_category="a\x00b\x0cc")
    result = sft_probe("plot", run, "--format", "svg", process=True)
    assert result.returncode == 0, result.stderr
    assert "a\ufffdb" in (run / "figures/changes_heldout.svg").read_text()


def test_a_category_has_the_same_colour_in_every_figure() -> None:
    assert colors_of(["random", "mine"])["mine"] == colors_of(["mine", "other", "chosen"])["mine"]
    assert colors_of(["random"])["random"] == colors_of(["chosen", "random"])["random"]
    assert len(set(colors_of([f"c{n}" for n in range(12)]).values())) == 12


@pytest.mark.parametrize("color", ["run", "order_seed", "train_category", "model"])
def test_several_runs_are_told_apart_by_colour(sft_probe: Run, tmp_path: Path, color: str) -> None:
    runs = [
        write_run(tmp_path / f"r{seed}", seed=seed, model=f"m{seed}", train_category=c)
        for seed, c in ((0, "chosen"), (7, "random"))
    ]
    result = sft_probe(
        "plot", *runs, "--color", color, "--out", tmp_path / "out", "--format", "svg"
    )
    assert result.returncode == 0, result.stderr
    assert (runs[0] / "scores.parquet").is_file(), "training writes no tables"
    svg = (tmp_path / f"out/changes_heldout_by_{color}.svg").read_text()
    expected = {
        "run": ("r0", "r7"),
        "order_seed": ("0", "7"),
        "train_category": ("chosen", "random"),
        "model": ("m0", "m7"),
    }
    for words in (*expected[color], *CURVES, "2 runs"):
        assert words in svg, words
    if color == "train_category":
        assert COLORS["random"] in svg
        assert COLORS["rejected"] not in svg


@needs_shared
def test_published_means_are_drawn_without_intervals(sft_probe: Run, tmp_path: Path) -> None:
    result = sft_probe(
        "plot",
        SHARED / "reference/qwen1.5-1.8b_sft_extend.csv",
        "--out",
        tmp_path,
        "--format",
        "svg",
    )
    assert result.returncode == 0, result.stderr
    svg = (tmp_path / "changes_heldout.svg").read_text()
    for words in ("irr_train", "training examples", "no intervals"):
        assert words in svg, words


def test_plot_refuses_what_cannot_be_drawn_with_one_message(sft_probe: Run, tmp_path: Path) -> None:
    assert "sft-probe sweep" in user_error(sft_probe("plot", tmp_path))
    run = write_run(tmp_path / "known")
    assert "Use one of png, svg, pdf, html" in user_error(sft_probe("plot", run, "--format", "gif"))
    (tmp_path / "labels.yaml").write_text("- chosen\n")
    assert "must map categories" in user_error(
        sft_probe("plot", run, "--labels", tmp_path / "labels.yaml")
    )
    assert "no length like 3.25in" in user_error(sft_probe("plot", run, "--width", "wide"))
    assert "Did you mean changes?" in user_error(sft_probe("plot", run, "--figures", "change"))
    assert "not among the fonts" in user_error(sft_probe("plot", run, "--font", "No Such Font"))
    (tmp_path / "labels.yaml").write_text("chosen: y^{@}\n")
    assert "no @ above a line" in user_error(
        sft_probe("plot", run, "--labels", tmp_path / "labels.yaml")
    )


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys, sft_probe.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "quickstart" in result.stdout
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize("num_runs", [1, 2])
@pytest.mark.parametrize(
    ("num_docs", "text"),
    [(8, "Too few prompts for bands (under 10 effective clusters)"), (24, "Bands: 95 %")],
)
def test_a_caption_speaks_of_bands_where_there_are_some(
    num_runs: int, num_docs: int, text: str, tmp_path: Path
) -> None:
    runs = [
        write_run(tmp_path / str(seed), seed=seed, num_docs=num_docs) for seed in range(num_runs)
    ]
    figures = {figure.name: figure for figure in figures_of(analyze(runs), Style())}
    caption = figures["changes_heldout"].caption
    assert text in caption
    assert ("Bands" in caption) == (num_docs == 24)
