"""The command `sweep`: what a sweep scores, and how. Imports nothing heavy before it runs."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from sft_probe.analysis.sweep.checkpoints import (
    Checkpoint,
    checkpoints_matching,
    hub_revisions,
    snapshots_of_run,
)
from sft_probe.command_line import config_of, log_written, write_config
from sft_probe.errors import UserError, check_names
from sft_probe.files import read_object
from sft_probe.options import Names, Positional, Positive, Replayable, Shard
from sft_probe.probe_set import check_source
from sft_probe.prompts import check_format

log = logging.getLogger(__name__)

CONTEXTS = ("none", "far", "near", "own")
"""From the least to the most that a context has of a doc's own prompt."""
_RUN_MANIFEST = {"prompt_format": str, "prompt_format_source": str, "request": dict}
_RUN_MANIFEST_OPTIONAL = {
    "probe_set": str | None,
    "max_length": int | None,
    "model": str | None,
    "train_category": str | None,
    "order_seed": int | None,
}


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Benchmarks beside the probes"""

    tasks: Names = ()
    """lm-eval tasks, patterns, YAML files, or names given by `sft-probe benchmarks add`."""
    batch_size: Positive = 8
    """Batch size of generation (--generate and generative benchmarks)."""
    num_fewshot: int | None = None
    """Examples in each prompt of --tasks. Default: what the task says."""
    limit: Annotated[float | None, "N|X"] = None
    """Docs of each task: a number, or a share below 1. Default: all."""
    apply_chat_template: bool = False
    """Put the prompts of --tasks into the model's chat template."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Benchmarks, Replayable):
    """Score every checkpoint of a run, or of foreign checkpoints, and write the trajectory table.

    Each checkpoint scores every response of the probe set; lm-eval benchmarks and generations can
    be added. What is scored already is skipped, so the same command resumes.

    Examples:
        sft-probe sweep runs/mine
        sft-probe sweep runs/mine --tasks arc_easy,blimp --generate 16
        sft-probe sweep out/pythia --model EleutherAI/pythia-70m --revisions step0,main=143000
        sft-probe sweep out/theirs --checkpoints base=0 'out/step-*' --probe-set my-set --dry-run
    """

    directory: Positional[Annotated[Path, "RUN"]]
    """A finished run, or the directory for the results of foreign checkpoints."""
    checkpoints: Annotated[list[str], "GLOB"] = field(default_factory=list)
    """Model directories of Hugging Face form; PATH=STEP where the name tells no step."""
    model: str | None = None
    """A model on the hub, whose --revisions are scored."""
    revisions: Names = ()
    """Revisions of --model, such as step0,step1000,main=2000."""
    splits: Names = ("heldout",)
    """Splits of the probe set: heldout, train, or both."""
    probe_set: str | None = None
    """Probe set: path, hub id or embedded name. Default: the run's."""
    prompt_format: str | None = None
    """hh, chat, plain or a Jinja file. Default: the run's, or the probe set's."""
    max_length: Positive | None = None
    """Tokens of a doc; longer docs are left out. Default: the run's, or 1024."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""
    max_tokens: Positive | None = None
    """Tokens in one forward pass. Default: those of the sweep so far, or what suits the device."""
    device: str | None = None
    """Device, such as cuda:1. Default: a GPU where there is one, else the CPU."""
    shard: Shard = (1, 1)
    """Score every N-th step, starting with the i-th."""
    engine: Literal["local", "ray"] = "local"
    """Score in this process, or on the workers of a Ray cluster."""
    ray_address: str | None = None
    """Address of the Ray cluster. Default: RAY_ADDRESS, else Ray is started here."""
    generate: Positive = 0
    """Also write greedy answers to the first N held-out prompts."""

    contexts: Annotated[Names, "A,B"] = ()
    """Also score the held-out responses under other prompts, for `sft-probe ledger`:
    own,near,far,none."""
    columns: Literal["all", "logprob"] = "all"
    """Columns of each token: log-prob, argmax, entropy, rank and norm, or the log-prob alone."""
    reference: Annotated[str | None, "first|STEP|MODEL"] = None
    """Also give each token its KL from a second model, held in memory; takes about twice as
    long."""
    follow: bool = False
    """Wait for further checkpoints and score each as it appears, until the run has finished."""
    until: Positive | None = None
    """Last step to wait for with --follow; checkpoints of another trainer need it."""
    dry_run: bool = False
    """List the checkpoints with step, size and what is scored already, and end."""

    @property
    def resolved_device(self) -> str:
        """The device asked for, else a GPU where there is one."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def check(self) -> None:
        """Check the options, the checkpoints' names and meta data, and what the run recorded."""
        self._check_options()
        manifest = {}
        if not self.follow:  # which waits for both
            checkpoints, problems = find_checkpoints(self)
            if not checkpoints:
                raise UserError("\n".join(["no checkpoint can be scored:", *problems]))
            manifest = run_manifest(self)
        source = self.probe_set or manifest.get("probe_set")
        if source:
            check_source(source)
        if self.prompt_format:
            check_format(self.prompt_format, "--prompt-format")

    def execute(self) -> None:
        """Score what is not scored yet, and write `RUN/sweep/config.yaml`."""
        if self.dry_run:
            from sft_probe.analysis.sweep.parts import plan

            print(plan(self))  # noqa: T201
            return
        from sft_probe.analysis.sweep.sweep import sweep

        log_written(sweep(self), f"analyze {self.directory}")
        write_config(self.directory / "sweep/config.yaml", "sft-probe sweep", config_of(self))

    def _check_options(self) -> None:
        if bool(self.model) != bool(self.revisions):
            raise UserError("--model and --revisions go together.")
        check_names("--splits", "split", self.splits, ("heldout", "train"))
        check_names("--contexts", "context", self.contexts, CONTEXTS[::-1])
        if self.contexts and ("own" not in self.contexts or len(self.contexts) < 2):
            raise UserError("--contexts compares own with others: own,far or own,near,far,none.")
        for spec in self.tasks:
            if spec.endswith((".yaml", ".yml")) and not Path(spec).is_file():
                raise UserError(f"--tasks: {spec} is missing.")
        self._check_follow()
        names = ("num_fewshot", "limit", "apply_chat_template")
        idle = [name for name in names if getattr(self, name)]
        if idle and not self.tasks:
            raise UserError(
                f"--{idle[0].replace('_', '-')} is for benchmarks (--tasks): probe texts are "
                "rendered by the prompt format alone."
            )

    def _check_follow(self) -> None:
        if self.until is not None and not self.follow:
            raise UserError("--until says where --follow ends: add --follow.")
        if not self.follow:
            return
        if self.model or self.engine == "ray":
            other = "--model" if self.model else "--engine ray"
            raise UserError(f"--follow scores local checkpoints in this process, not {other}.")
        if self.checkpoints and self.until is None:
            raise UserError(
                "--follow needs --until STEP here: checkpoints of another trainer do not say when "
                "its run has finished."
            )


def find_checkpoints(request: SweepRequest) -> tuple[list[Checkpoint], list[str]]:
    """Return what a sweep scores, by step, and what is wrong with what it cannot score.

    Raises:
        UserError: there is nothing, or a name tells no step.
    """
    if request.checkpoints:
        return checkpoints_matching(request.checkpoints)
    if request.model:
        return hub_revisions(request.model, request.revisions), []
    return snapshots_of_run(request.directory)


def run_manifest(request: SweepRequest) -> dict[str, Any]:
    """Return what a run has recorded, one that is followed at its start; nothing of foreign
    checkpoints.

    Raises:
        UserError: the run has not finished, and is not followed.
    """
    if request.checkpoints or request.model:
        return {}
    path = request.directory / "manifest.json"
    if request.follow and not path.exists():
        path = request.directory / "begun.json"  # what the training knows from its start
    if not path.exists():
        raise UserError(
            f"{request.directory} holds no finished run (manifest.json is missing). Run the same "
            "`sft-probe train` command again, or name foreign checkpoints with --checkpoints or "
            "--model."
        )
    return read_object(path, _RUN_MANIFEST, _RUN_MANIFEST_OPTIONAL)
