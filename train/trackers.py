"""Probe results in Weights & Biases and Trackio: curves on an axis of their own, docs as tables.

The axis `probe/step` is the step of the model that was scored, so that results which arrive later,
such as those of a sweep, stand at their place.
"""

import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError
from sft_probe.files import find, read_object
from sft_probe.scores import read_scores, read_scores_parquet

log = logging.getLogger(__name__)

TRACKERS = ("wandb", "trackio")
AXIS = "probe/step"
_TABLE = ("doc_id", "category", "split", "logprob", "logprob_eos", "num_tokens", "is_greedy")
_CONFIG = (
    "probe_set",
    "probe_set_sha256",
    "prompt_format",
    "max_length",
    "train_category",
    "model",
)


class Tracker:
    """The run that one of these libraries has open in this process.

    Args:
        name: wandb or trackio.
        manifest: what the probe's manifest says; a part of it becomes the run's config.
        categories: the categories whose curves are drawn.
    """

    def __init__(self, name: str, manifest: dict[str, Any], categories: Iterable[str]) -> None:
        self.name = name
        self.module = importlib.import_module(name)
        config = {f"probe/{key}": manifest[key] for key in _CONFIG if key in manifest}
        self.module.config.update(config, allow_val_change=True)
        if name == "wandb":  # Trackio lets its reader choose any metric as the axis
            self.module.define_metric(AXIS, hidden=True)
            for category in categories:
                self.module.define_metric(f"probe/{category}", step_metric=AXIS)

    def send(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Log the mean log-probs of one step (nats per response), and a table of its docs."""
        values = [[row[name] for name in _TABLE] for row in rows]
        table = self.module.Table(columns=list(_TABLE), data=values)
        means = {f"probe/{category}": mean for category, mean in means_of(rows).items()}
        self.module.log({AXIS: step, **means, "probe/docs": table})


@contextmanager
def muted(trainer: Any, names: Iterable[str]) -> Iterator[None]:
    """Keep what a `transformers.Trainer` logs in the block from these libraries.

    They have it already, on an axis of its own: a second curve would be `train/probe/*`.
    """
    from transformers import integrations

    classes = {"wandb": integrations.WandbCallback, "trackio": integrations.TrackioCallback}
    theirs = tuple(classes[name] for name in names)
    handler = trainer.callback_handler
    everyone = handler.callbacks
    handler.callbacks = [callback for callback in everyone if not isinstance(callback, theirs)]
    try:
        yield
    finally:
        handler.callbacks = everyone


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean log-prob of each category over held-out docs, in nats per response."""
    logprobs: dict[str, list[float]] = {}
    for row in rows:
        if row["split"] == "heldout":
            logprobs.setdefault(row["category"], []).append(row["logprob"])
    return {category: sum(values) / len(values) for category, values in logprobs.items()}


def send_run(run: Path, name: str, project: str) -> int:
    """Send all scores of a run directory, swept or else live, as a new run of a tracker.

    Returns:
        The number of steps sent.

    Raises:
        UserError: the library is not installed, or the directory holds no scores.
    """
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed. Run:  pip install {name}") from error
    source = "sweep" if (run / "sweep/manifest.json").is_file() else "probe"
    if (run / "scores.parquet").is_file():
        table = read_scores_parquet(run / "scores.parquet")
    else:
        table = read_scores(find(run, "probe/step_*.jsonl"))
    rows = table.drop_columns("token_logprobs").to_pylist()
    swept = [row for row in rows if row["source"] == "lm_eval"]
    rows = swept or rows
    if not rows:
        raise UserError(f"{run} holds no scores. Run:  sft-probe sweep {run}")
    path = run / source / "manifest.json"
    manifest = read_object(path) if path.is_file() else {}
    library.init(project=project, name=run.resolve().name)
    tracker = Tracker(name, manifest, dict.fromkeys(row["category"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    for step in steps:
        tracker.send(step, [row for row in rows if row["step"] == step])
    library.finish()
    log.info("sent %d steps of %s to %s, project %s", len(steps), run, name, project)
    return len(steps)
