"""The commands `synth run` and `synth status`. Nothing heavy is imported before one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sft_probe.files import check_exists
from sft_probe.options import (
    Amount,
    Command,
    Fraction,
    Names,
    Positional,
    Positive,
    Rate,
    Replayable,
)
from sft_probe.prompts import check_format

WriterName = Literal["gemini", "gemini-legacy", "gemini-batch", "openai", "hf", "offline"]


@dataclass(frozen=True, kw_only=True)
class Contents(Command):
    """What the set holds"""

    categories: Names | None = None
    """Categories beside chosen and rejected: paraphrase, variant, random, non_response,
    chosen_paraphrase, format_flip, permuted, untrained. Default: the first four."""
    untrained_model: str | None = None
    """Model whose own answer `untrained` is. Default: the embedded model."""
    templates: Annotated[Path | None, "DIR"] = None
    """Directory of your own prompts, named CATEGORY.txt."""
    judge: bool = False
    """Ask the writer whether each text does what was asked; one call more per text."""
    prompt_format: str = "hh"
    """hh, chat, plain or a Jinja file."""
    heldout_frac: Fraction | None = None
    """Share of the docs that is held out. Default: the source's own splits, else 0.2."""
    limit: Positive | None = None
    """Largest number of docs; they are drawn at random. Default: all."""
    seed: int = 0
    """Seed of the draw, the splits and the topics."""
    license: str | None = None
    """License of the source, for the card. Default: mit for Anthropic/hh-rlhf, else unknown."""


@dataclass(frozen=True, kw_only=True)
class Budget(Command):
    """Rates and money"""

    requests_per_minute: Rate | None = None
    """Largest number of requests a minute. Default: no limit."""
    tokens_per_minute: Rate | None = None
    """Largest number of prompt tokens a minute. Default: no limit."""
    concurrency: Positive = 16
    """Calls in flight at one time."""
    max_cost_usd: Amount | None = None
    """Money that all runs on this directory may spend together. Default: no limit."""
    thinking_tokens: Positive | None = None
    """Tokens for thinking, added to the output limit of each text and to its largest cost.
    Default: what the model needs."""
    max_wait_s: Annotated[Rate | None, "SECONDS"] = None
    """Time to wait for batch jobs; the same command reads them later. Default: no limit."""
    price: Annotated[str | None, "INPUT,OUTPUT"] = None
    """USD per million tokens, in place of the price table."""


@dataclass(frozen=True, kw_only=True)
class SynthRun(Contents, Budget, Replayable):
    """Make a probe set from preference pairs, with Gemini or another writer.

    A writer (a language model) writes the categories that the pairs do not have. Every text is
    stored as it arrives, so the same command resumes and nothing is paid for twice.

    Examples:
        sft-probe synth run --source pairs.jsonl --categories random --out sets/mine
        sft-probe synth run --source Anthropic/hh-rlhf --writer gemini --out sets/hh --dry-run
        sft-probe synth run --source Anthropic/hh-rlhf --writer gemini --out sets/hh --limit 500
    """

    source: str
    """Preference pairs: a .jsonl, .jsonl.gz or .parquet file, a directory of them, or ID[:DATA_DIR]
    on the hub (Anthropic/hh-rlhf is read as its helpful-base)."""
    out: Annotated[Path, "DIR"]
    """Directory of the set; the same one resumes."""
    writer: WriterName | None = None
    """Who writes the texts. Keys come from GEMINI_API_KEY or OPENAI_API_KEY. Not needed where
    --categories has only random, permuted or untrained."""
    model: str | None = None
    """Model of the writer. Default: gemini-3.5-flash-lite; for hf the embedded model."""
    base_url: Annotated[str | None, "URL"] = None
    """Address of the server; openai needs it except for OpenAI's own."""
    dry_run: bool = False
    """Print calls, tokens and cost; send and write nothing."""

    def check(self) -> None:
        """Check the source where it is a file, and the prompt format."""
        if self.source.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            check_exists(Path(self.source))
        check_format(self.prompt_format, "--prompt-format")

    def execute(self) -> None:
        """Write the set, or print what it would cost."""
        from sft_probe.synth.command import run_synth

        run_synth(self)


@dataclass(frozen=True, kw_only=True)
class SynthStatus(Command):
    """Show the texts written so far, by category, and what they cost.

    It changes nothing and may be called while a run is writing.

    Examples:
        sft-probe synth status sets/mine
        watch -n 30 sft-probe synth status sets/mine
    """

    directory: Positional[Annotated[Path, "DIR"]]
    """Directory of a set, finished or not."""

    def execute(self) -> None:
        """Print the table."""
        from sft_probe.synth.command import print_status

        print_status(self.directory)
