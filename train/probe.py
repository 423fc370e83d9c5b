"""The live probe in any `transformers.Trainer`: a callback that scores and records."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_probe.errors import UserError
from sft_probe.files import make_dir, read_object, remove_leftovers, write_json
from sft_probe.models import check_window
from sft_probe.probe_set import DEFAULT_PROBE_SET, load_probe_set
from sft_probe.scoring.score import FittingScorer, default_max_tokens
from sft_probe.train.live import (
    EncodedProbe,
    EncodedTexts,
    dtypes_of,
    fault_of_other_rows,
    name_of_model,
    score_docs,
    write_step,
)
from sft_probe.train.model import (
    inner_model,
    name_of,
    num_virtual_tokens,
)
from sft_probe.train.schedule import resolve_steps
from sft_probe.train.trackers import TRACKERS, Tracker, means_of, muted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)


class ProbeCallback(TrainerCallback):
    """Scores a probe set at chosen steps of any `transformers.Trainer` and writes the rows.

    Each file `OUT/probe/step_000000.jsonl` is complete or absent and holds score rows with
    `source: live`, which `sft-probe analyze`, `plot` and `report` read. A training that resumes at
    step r writes the files of later steps again. Set `trainer`, and the mean log-prob of each
    category is logged beside the loss. With `report_to` wandb or trackio these means have a step
    axis of their own, and each probed step has a table of its docs.

    Args:
        probe_set: path, hub id or embedded name.
        out: the run directory.
        steps: when to score, in the grammar of `--probe_steps`.
        num_train: besides the held-out docs, score a fixed sample of this many of the train split.
        prompt_format: hh, chat, plain or a Jinja file; default: the probe set's own. It must be
            that of the training.
        max_length: tokens of prompt, response and terminator; docs with a longer response are left
            out and named.
        tokenizer: default: the trainer's `processing_class`.
        max_tokens: the token budget of one forward pass; default: by device.
        train_category: the category that is trained on, if it is one of the probe set.
        overwrite: remove the rows of an earlier run in `out`. Default: refuse to start.
        columns: further columns of the score rows: `run`, `model`, `order_seed`.

    Raises:
        UserError: at the start of training: the probe set, the format or the steps are unusable;
            `out` has rows of another run; or FSDP is used, where a rank alone cannot score. Under
            ZeRO-3 also if memory runs out, since ranks cannot each choose another budget.
    """

    trainer: "Trainer | None" = None
    totals: "Callable[[], dict[str, int]] | None" = None
    """Returns `examples_seen` and `tokens_seen`, if the trainer counts them."""

    def __init__(
        self,
        probe_set: str | Path = DEFAULT_PROBE_SET,
        *,
        out: str | Path,
        steps: str = "log2",
        num_train: int = 0,
        prompt_format: str | None = None,
        max_length: int = 1024,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_tokens: int | None = None,
        train_category: str | None = None,
        overwrite: bool = False,
        columns: dict[str, Any] | None = None,
    ) -> None:
        self.probe_set = load_probe_set(str(probe_set))
        self.folder = make_dir(Path(out) / "probe")
        self.requested_steps = steps
        self.num_train = num_train
        self.prompt_format = prompt_format
        self.max_length = max_length
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.overwrite = overwrite
        self.columns = {
            "run": Path(out).resolve().name,
            "model": None,
            "train_category": train_category,
            "order_seed": None,
            **(columns or {}),
        }
        self.steps: list[int] = []
        self.docs: list[EncodedProbe] = []
        self.trackers: list[Tracker] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Encode the docs, resolve the steps, and score step 0 if it is one of them."""
        if PartialState().distributed_type == DistributedType.FSDP:
            raise UserError(
                "ProbeCallback does not work under FSDP. Use DDP or DeepSpeed, or sweep the "
                "checkpoints."
            )
        self.steps = resolve_steps(
            self.requested_steps,
            flag="probe steps",
            args=args,
            state=state,
            dataloader=kwargs["train_dataloader"],
        )
        whole = kwargs["model"]
        model = inner_model(whole)
        check_window(self.max_length + num_virtual_tokens(whole), model)
        tokenizer = self.tokenizer or kwargs["processing_class"]
        if tokenizer is None:
            raise UserError(
                "the trainer has no processing_class: give ProbeCallback the tokenizer."
            )
        self.columns["model"] = self.columns["model"] or name_of_model(model)
        self._begin(args, state, tokenizer, name_of(model.dtype))
        self.scorer = FittingScorer(
            self.max_tokens or default_max_tokens(str(model.device)),
            self.max_length,
            may_shrink=not is_deepspeed_zero3_enabled(),
            with_columns=True,
        )
        if state.global_step == 0 and 0 in self.steps:  # a resumed step was scored when it ended
            self._probe(args, state, whole)

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        tokenizer: "PreTrainedTokenizerBase",
        dtype: str,
    ) -> None:
        """Encode the docs, and let the first rank prepare `probe/` and its manifest."""
        path = self.folder / "manifest.json"
        recorded = read_object(path) if path.exists() and state.global_step else {}
        texts = EncodedTexts(
            self.probe_set,
            tokenizer,
            self.prompt_format,
            self.max_length,
            self.num_train,
            recorded=recorded.get("prompt_format_source"),
            is_collective=True,
        )
        self.docs = texts.docs
        fault = None
        if state.is_world_process_zero:
            texts.report_dropped()
            fault = self._fault_of_earlier_rows(state.global_step, texts.manifest)
        (fault,) = broadcast_object_list([fault])
        if fault:
            raise UserError(fault)
        if state.is_world_process_zero:
            manifest = {**self.columns, "dtype": dtype, "steps": self.steps, **texts.manifest}
            write_json(path, manifest)
            # the Trainer has opened their runs: its own callbacks come first
            names = [name for name in TRACKERS if name in args.report_to]
            categories = self.probe_set.categories
            self.trackers = [Tracker(name, manifest, categories) for name in names]

    def _fault_of_earlier_rows(self, step: int, manifest: dict[str, Any]) -> str | None:
        """Remove the rows that this training writes again; return why it may not."""
        remove_leftovers(self.folder)
        later = [
            path
            for path in self.folder.glob("*_*.jsonl")  # rows of steps, and their faults
            if not step or int(path.stem.rpartition("_")[2]) > step
        ]
        if later and not step and not self.overwrite:
            return (
                f"{self.folder} has rows of an earlier run. Choose another `out`, resume that run "
                "(trainer.train(resume_from_checkpoint=True)), or remove its rows with "
                "ProbeCallback(..., overwrite=True)."
            )
        if step and (fault := fault_of_other_rows(self.folder, manifest)):
            return fault
        if later:
            log.info("%s: rows of %d later steps are written again", self.folder, len(later))
        for path in later:
            path.unlink()
        return None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Score if this is one of the steps."""
        if state.global_step in self.steps:
            self._probe(args, state, kwargs["model"])

    def _probe(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Score a share of the docs on each rank; the first one writes.

        Under ZeRO-3 a forward pass is a collective, so each rank scores all docs: the same passes
        in the same order.
        """
        is_shared = not is_deepspeed_zero3_enabled()
        mine = self.docs[args.process_index :: args.world_size] if is_shared else self.docs
        rows = score_docs(mine, model, self.scorer, self._step_columns(args, state, model))
        rows = gather_object(rows) if is_shared else rows
        if not state.is_world_process_zero:
            return
        order = {doc.doc_id: number for number, doc in enumerate(self.docs)}
        rows.sort(key=lambda row: order[row["doc_id"]])
        scored = write_step(self.folder, state.global_step, rows)
        self._report(scored)
        for tracker in self.trackers:
            tracker.send(state.global_step, scored)

    def _step_columns(
        self, args: TrainingArguments, state: TrainerState, model: Any
    ) -> dict[str, Any]:
        per_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        seen: dict[str, Any] = {"examples_seen": state.global_step * per_step, "tokens_seen": None}
        return {
            **self.columns,
            **seen,
            **(self.totals() if self.totals else {}),
            "step": state.global_step,
            "epoch": state.epoch or 0.0,
            "source": "live",
            **dtypes_of(model),
        }

    def _report(self, rows: list[dict[str, Any]]) -> None:
        means = means_of(rows)
        if self.trainer is not None and means:
            from transformers import Trainer

            should_log = self.trainer.control.should_log
            # not `self.trainer.log`: TRL's averages its own metrics there, and empties them
            logged = {f"probe/{category}": round(mean, 4) for category, mean in means.items()}
            with muted(self.trainer, [tracker.name for tracker in self.trackers]):
                Trainer.log(self.trainer, logged)
            # `log` clears it, and then the loss of this step would not be logged
            self.trainer.control.should_log = should_log
