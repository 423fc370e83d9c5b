"""The commands that read scores: analyze, plot, report, simplicity, transfer. Heavy imports wait
until one runs."""

import argparse
import logging
import re
import shlex
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.options import names, positive, shard

log = logging.getLogger(__name__)


def add_analysis_commands(commands: Any) -> None:
    """Adds them to the sub-parsers of `sft-probe`."""
    _add_analyze(
        commands.add_parser(
            "analyze", help="how much each category moved: a table and a sentence each"
        )
    )
    _add_plot(
        commands.add_parser("plot", help="figures of runs (PNG, SVG, PDF, HTML) and their numbers")
    )
    _add_report(
        commands.add_parser(
            "report", help="one HTML file with tables, figures and a browser of single docs"
        )
    )
    _add_simplicity(
        commands.add_parser("simplicity", help="code lengths of the training sets of runs")
    )
    _add_transfer(
        commands.add_parser("transfer", help="what training on one category moves in the others")
    )


def _add_analyze(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN|FILE",
        help="runs, score rows, lm-eval outputs, CSVs of means",
    )
    command.add_argument(
        "--include-eos", "--include_eos", action="store_true", help="count the terminator in"
    )
    command.add_argument("--categories", type=names, metavar="A,B", help="default: all")
    command.add_argument(
        "--out", type=Path, help="where the tables go; default: RUN/analysis for one run"
    )
    command.set_defaults(command=_analyze)


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument(
        "--figures",
        type=names,
        metavar="A,B",
        help="which figures, as changes,parts; default: all that the runs allow",
    )
    command.add_argument(
        "--color",
        default="category",
        choices=("category", "run", "order_seed", "train_category", "model"),
    )
    command.add_argument("--categories", type=names, metavar="A,B", help="default: all")
    command.add_argument(
        "--include-eos", "--include_eos", action="store_true", help="count the terminator in"
    )
    command.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.yaml",
        help="a map of categories to labels, as `chosen: y^+`",
    )
    command.add_argument(
        "--title",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the title in the figure; it stands in NAME.txt in any case",
    )
    command.add_argument("--width", type=_points, help="width of the page: 3.25in, 8cm or 234pt")
    command.add_argument("--font", metavar="NAME", help="font of all text; default: DejaVu Sans")
    command.add_argument(
        "--font-size", "--font_size", type=float, default=10, help="in points; default: 10"
    )
    command.add_argument(
        "--format", type=names, default=("png", "pdf"), help="png, svg, pdf, html; default: png,pdf"
    )
    command.add_argument(
        "--out", type=Path, help="default: RUN/figures, or figures for several runs"
    )
    command.set_defaults(command=_plot)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument("--format", default="html", choices=("html", "md"))
    command.add_argument("--categories", type=names, metavar="A,B", help="default: all")
    command.add_argument(
        "--include-eos", "--include_eos", action="store_true", help="count the terminator in"
    )
    command.add_argument(
        "--out", type=Path, help="default: RUN/report.html, or report.html for several runs"
    )
    command.set_defaults(command=_report)


def _add_simplicity(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument(
        "--kl", action="store_true", help="also KL from the start; loads every snapshot once"
    )
    command.add_argument("--out", type=Path, help="where tables and a figure go; default: nowhere")
    command.set_defaults(command=_simplicity)


def _add_transfer(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--runs",
        nargs="+",
        metavar="[ROW=]RUN",
        help="finished runs; those of one row are its seeds",
    )
    source.add_argument(
        "--rows",
        type=names,
        metavar="A,B",
        help="train these: categories, data files, tagged (a contrast set), half_1 and half_2 (of "
        "chosen)",
    )
    command.add_argument("--recipe", type=Path, help="of the training of --rows")
    command.add_argument(
        "--order-seeds", "--order_seeds", type=positive, default=3, help="data orders; default: 3"
    )
    command.add_argument(
        "--shard", type=shard, default=(1, 1), metavar="i/N", help="train every N-th run; no tables"
    )
    command.add_argument(
        "--train-flags", "--train_flags", default="", help="more flags of training, in one string"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("transfer"),
        help="runs, tables, figures; default: transfer",
    )
    command.set_defaults(command=_transfer)


def _points(text: str) -> float:
    """A length as points, 1/72 inch."""
    match = re.fullmatch(r"([\d.]+)(in|cm|mm|pt)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no length like 3.25in, 8cm or 234pt")
    points = float(match[1]) * {"in": 72, "cm": 72 / 2.54, "mm": 7.2 / 2.54, "pt": 1}[match[2]]
    if not 120 <= points <= 5000:
        raise argparse.ArgumentTypeError(f"{text} is under 120pt or over 5000pt")
    return points


def _analyze(options: argparse.Namespace) -> None:
    from sft_probe.analysis.stats.analyze import (
        analyze,
        default_folder,
        verdict_text,
        write_analysis,
    )

    analysis = analyze(options.runs, include_eos=options.include_eos, categories=options.categories)
    print(verdict_text(analysis))  # noqa: T201
    if folder := options.out or default_folder(options.runs):
        for path in write_analysis(analysis, folder):
            log.info("wrote %s", path)


def _plot(options: argparse.Namespace) -> None:
    try:
        from sft_probe.analysis.figures.figure import (
            DEFAULT_WIDTH,
            Style,
            font_families,
            read_labels,
        )
        from sft_probe.analysis.figures.plot import plot
    except ImportError as error:
        raise _needs_report(error) from error
    style = Style(
        color=options.color,
        width=options.width or DEFAULT_WIDTH,
        font_size=options.font_size,
        labels=read_labels(options.labels) if options.labels else {},
        titled=options.title,
        **({"font": font_families(options.font)} if options.font else {}),
    )
    for path in plot(
        options.runs,
        style=style,
        figures=options.figures,
        categories=options.categories,
        formats=options.format,
        include_eos=options.include_eos,
        out=options.out,
    ):
        log.info("wrote %s", path)


def _needs_report(error: ImportError) -> UserError:
    return UserError(f"figures need more packages ({error}). Run:  pip install 'sft-probe[report]'")


def _report(options: argparse.Namespace) -> None:
    try:
        from sft_probe.analysis.report.html import report
    except ImportError as error:
        raise _needs_report(error) from error
    for path in report(
        options.runs,
        format_name=options.format,
        include_eos=options.include_eos,
        categories=options.categories,
        out=options.out,
    ):
        log.info("wrote %s", path)


def _simplicity(options: argparse.Namespace) -> None:
    from sft_probe.analysis.report.simplicity_text import simplicity_text
    from sft_probe.analysis.studies.simplicity import simplicity, write_simplicity

    found = simplicity(options.runs, with_kl=options.kl)
    print(simplicity_text(found))  # noqa: T201
    if options.out:
        written = write_simplicity(found, options.out)
        try:
            from sft_probe.analysis.figures.runs import plot_simplicity
        except ImportError as error:
            raise _needs_report(error) from error
        for path in [*written, *plot_simplicity(found, options.out)]:
            log.info("wrote %s", path)


def _transfer(options: argparse.Namespace) -> None:
    from sft_probe.analysis.report.transfer_text import transfer_text
    from sft_probe.analysis.studies.transfer import transfer, write_transfer

    runs = options.runs or _train_rows(options)
    if options.shard[1] > 1:
        return
    found = transfer(runs)
    print(transfer_text(found))  # noqa: T201
    written = write_transfer(found, options.out)
    try:
        from sft_probe.analysis.figures.runs import plot_transfer
    except ImportError as error:
        raise _needs_report(error) from error
    for path in [*written, *plot_transfer(found, options.out)]:
        log.info("wrote %s", path)


def _train_rows(options: argparse.Namespace) -> list[str]:
    from sft_probe.analysis.studies.training_runs import train_rows

    if options.recipe is None:
        raise UserError("--rows needs --recipe, that of `sft-probe train`.")
    return train_rows(
        options.rows,
        options.out,
        recipe=options.recipe,
        num_orders=options.order_seeds,
        shard=options.shard,
        extra=shlex.split(options.train_flags),
    )
