"""The probe inside training: log-probs of held-out docs in the model that is being trained, for any
`Trainer`."""

import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from sft_probe.errors import UserError
from sft_probe.files import make_dir, read_object, remove_leftovers, write_json, write_jsonl
from sft_probe.models import check_window
from sft_probe.probe_set import DEFAULT_PROBE_SET, load_probe_set
from sft_probe.prompts import (
    EncodedDoc,
    PromptFormat,
    encode_probe_set,
    first_visible,
    resolve_format,
    terminator_id,
)
from sft_probe.scores import score_row
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import FittingScorer, Score, default_max_tokens
from sft_probe.train.model import (
    inner_model,
    name_of,
    num_virtual_tokens,
    score_adapted,
    weights_dtype,
)
from sft_probe.train.schedule import resolve_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)

_SAMPLE_SEED = 0
_MAX_NAMED = 5


class ProbeCallback(TrainerCallback):
    """Scores a probe set at chosen steps of any `transformers.Trainer` and writes
    `probe/step_000000.jsonl` and so on.

    Each file is whole or absent and holds score rows with `source: live`; `sft-probe plot` draws
    them. A run that is resumed at step r removes the files of later steps; one that starts at step
    0 begins anew. Set `trainer`, and the mean log-prob of each category is reported beside the
    loss.

    Args:
        probe_set: path, hub id or embedded name.
        out: the run directory.
        steps: when; the grammar of `train/schedule.py`.
        num_train: besides the held-out docs, score a fixed sample of this many of the train split.
        prompt_format: hh, chat, plain or a Jinja file; default: the probe set's own. It must be
        that of the training. max_length: tokens of prompt, response and terminator; docs with a
        longer response are left out and named. tokenizer: default: the trainer's
        `processing_class`. max_tokens: the budget of one forward pass; default: by device.
        columns: of the score rows, where the trainer knows more: `run`, `model`, `train_category`,
        `order_seed`.

    Raises:
        UserError: at the start of training: the probe set, the format or the steps are unusable, or
        FSDP is used, where
            a rank alone cannot score; under ZeRO-3 also where memory runs out, since ranks cannot
            each choose another budget.
    """

    trainer: "Trainer | None" = None
    totals: "Callable[[], dict[str, int]] | None" = None
    """Gives `examples_seen` and `tokens_seen`, where somebody counts."""

    def __init__(
        self,
        probe_set: str = DEFAULT_PROBE_SET,
        *,
        out: str | Path,
        steps: str = "log2",
        num_train: int = 0,
        prompt_format: str | None = None,
        max_length: int = 1024,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_tokens: int | None = None,
        columns: dict[str, Any] | None = None,
    ) -> None:
        self.probe_set = load_probe_set(probe_set)
        self.folder = make_dir(Path(out) / "probe")
        self.asked_steps = steps
        self.num_train = num_train
        self.prompt_format_name = prompt_format or self.probe_set.prompt_format
        self.max_length = max_length
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.columns = {
            "run": Path(out).resolve().name,
            "model": None,
            "train_category": None,
            "order_seed": None,
        }
        self.columns |= columns or {}
        self.steps: list[int] = []
        self.docs: list[_ProbeDoc] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Prepares docs and steps, removes what a resumed run will write again, scores the first
        step."""
        if PartialState().distributed_type == DistributedType.FSDP:
            raise UserError(
                "ProbeCallback does not work under FSDP. Use DDP or DeepSpeed, or sweep the "
                "checkpoints."
            )
        self.steps = resolve_steps(
            self.asked_steps,
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
        self.columns["model"] = (
            self.columns["model"] or model.config._name_or_path or type(model).__name__
        )
        self._encode(
            tokenizer,
            str(model.dtype).removeprefix("torch."),
            is_main=state.is_world_process_zero,
            is_resumed=state.global_step > 0,
        )
        self.scorer = FittingScorer(
            self.max_tokens or default_max_tokens(str(model.device)),
            self.max_length,
            may_shrink=not is_deepspeed_zero3_enabled(),
        )
        if state.is_world_process_zero:
            remove_leftovers(self.folder)
            for path in self.folder.glob("*_*.jsonl"):  # steps and their faults
                if int(path.stem.rpartition("_")[2]) > state.global_step or state.global_step == 0:
                    path.unlink()
        if state.global_step == 0 and 0 in self.steps:  # a resumed step was scored when it ended
            self._probe(args, state, whole)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Scores if this step is asked for."""
        if state.global_step in self.steps:
            self._probe(args, state, kwargs["model"])

    def _path(self, state: TrainerState) -> Path:
        return self.folder / f"step_{state.global_step:06d}.jsonl"

    def _encode(
        self, tokenizer: "PreTrainedTokenizerBase", dtype: str, *, is_main: bool, is_resumed: bool
    ) -> None:
        """Token ids of all docs; what is left out is named and, with the rest, noted in
        `probe/manifest.json`."""
        path = self.folder / "manifest.json"
        recorded = (
            read_object(path).get("prompt_format_source") if path.exists() and is_resumed else None
        )
        found = resolve_format(self.prompt_format_name, tokenizer, self.probe_set.docs, recorded)
        (source,) = broadcast_object_list([found.source])  # each rank may have read another time
        prompt_format = PromptFormat(source, tokenizer)
        kept, dropped = encode_probe_set(self.probe_set, prompt_format, tokenizer, self.max_length)
        train = [doc for doc in kept if doc.doc.split == "train"]
        sample = random.Random(_SAMPLE_SEED).sample(train, min(self.num_train, len(train)))  # noqa: S311
        chosen = [doc for doc in kept if doc.doc.split == "heldout"] + sample
        if not chosen:
            raise UserError(
                f"no doc of {self.probe_set.source} can be scored; {len(dropped)} were left out."
            )
        end_id = terminator_id(prompt_format.name, tokenizer)
        self.docs = [_ProbeDoc(doc, prompt_format.name, tokenizer, end_id) for doc in chosen]
        if not is_main:
            return
        for drop in dropped:
            log.warning("not probed: %s: %s", drop.doc_id, drop.reason)
        manifest = {
            **self.columns,
            "probe_set": self.probe_set.name,
            "probe_set_source": self.probe_set.absolute_source,
            "probe_set_sha256": self.probe_set.sha256,
            "prompt_format": prompt_format.name,
            "prompt_format_source": prompt_format.source,
            "terminator_id": end_id,
            "max_length": self.max_length,
            "dtype": dtype,
            "categories": list(self.probe_set.categories),
            "steps": self.steps,
            "doc_ids": [doc.doc_id for doc in self.docs],
            "dropped": [vars(drop) for drop in dropped],
        }
        write_json(path, manifest)

    def _probe(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Each rank scores its share of the docs; the first one writes.

        Under ZeRO-3 a forward pass is a collective, so each rank scores all docs: the same passes
        in the same order.
        """
        is_shared = not is_deepspeed_zero3_enabled()
        mine = self.docs[args.process_index :: args.world_size] if is_shared else self.docs
        with _evaluating(model):
            found = dict(
                score_adapted(self.scorer, model, [item for doc in mine for item in doc.items])
            )
        scores = iter([found[index] for index in range(len(found))])
        columns = self._step_columns(args, state, model)
        rows = [row for doc in mine for row in doc.rows(columns, scores)]
        rows = gather_object(rows) if is_shared else rows
        if not state.is_world_process_zero:
            return
        order = {doc.doc_id: number for number, doc in enumerate(self.docs)}
        rows.sort(key=lambda row: order[row["doc_id"]])
        scored: list[dict[str, Any]] = []
        faults: list[dict[str, Any]] = []
        for row in rows:
            (scored if math.isfinite(row["logprob"] + row["logprob_eos"]) else faults).append(row)
        if faults:
            names = ", ".join(f"{row['doc_id']} {row['category']}" for row in faults[:_MAX_NAMED])
            log.error(
                "step %d: %d logits are NaN or infinite: %s", state.global_step, len(faults), names
            )
            keys = ("step", "split", "category", "doc_id")
            notes = [{**{key: row[key] for key in keys}, "reason": "NaN or inf"} for row in faults]
            write_jsonl(self.folder / f"faults_{state.global_step:06d}.jsonl", notes)
        write_jsonl(self._path(state), scored)
        self._report(scored)

    def _step_columns(
        self, args: TrainingArguments, state: TrainerState, model: Any
    ) -> dict[str, Any]:
        per_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        seen: dict[str, Any] = {"examples_seen": state.global_step * per_step, "tokens_seen": None}
        if self.totals is not None:
            seen |= self.totals()
        return {
            **self.columns,
            **seen,
            "step": state.global_step,
            "epoch": state.epoch or 0.0,
            "weights_dtype": weights_dtype(model),
            "compute_dtype": name_of(inner_model(model).dtype),
            "source": "live",
        }

    def _report(self, rows: list[dict[str, Any]]) -> None:
        heldout = [row for row in rows if row["split"] == "heldout"]
        means = {
            category: sum(row["logprob"] for row in heldout if row["category"] == category)
            / sum(row["category"] == category for row in heldout)
            for category in dict.fromkeys(row["category"] for row in heldout)
        }
        if self.trainer is not None and means:
            from transformers import Trainer

            should_log = self.trainer.control.should_log
            # not the trainer's own `log`: TRL's averages its metrics there and starts them again
            # from nothing
            Trainer.log(
                self.trainer,
                {f"probe/{category}": round(mean, 4) for category, mean in means.items()},
            )
            self.trainer.control.should_log = (
                should_log  # else the loss of this step, a collective, is left out
            )


class _ProbeDoc:
    """One doc: its items, and the rows that their scores become."""

    def __init__(
        self,
        encoded: EncodedDoc,
        format_name: str,
        tokenizer: "PreTrainedTokenizerBase",
        end_id: int,
    ) -> None:
        self.doc_id = encoded.doc.doc_id
        self.items = [
            Continuation(encoded.prompt_ids, ids, end_id)
            for ids in encoded.continuation_ids.values()
        ]
        self._columns = [
            {
                "category": category,
                "split": encoded.doc.split,
                "doc_id": self.doc_id,
                "conversation_id": encoded.doc.conversation_id,
                "prompt_format": format_name,
                "num_bytes": len(response.encode()),
            }
            for category, response in encoded.doc.responses.items()
        ]
        self._first = [first_visible(tokenizer, ids) for ids in encoded.continuation_ids.values()]

    def rows(self, columns: dict[str, Any], scores: Iterator[Score]) -> list[dict[str, Any]]:
        """Takes as many scores as there are items."""
        mine = itertools.islice(scores, len(self.items))
        return [
            score_row(
                columns,
                doc,
                logprob=score.logprob,
                token_logprobs=score.token_logprobs.tolist(),
                first=first,
                logprob_eos=score.logprob_eos,
                is_greedy=score.is_greedy,
            )
            for doc, first, score in zip(self._columns, self._first, mine, strict=True)
        ]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in eval mode for the length of a block, computing in its own dtype, and each as
    it was afterwards.

    Under mixed precision (`bf16`, `fp16`) accelerate has put an autocast into the model's forward,
    unlike a sweep's.
    """
    modes = {module: module.training for module in model.modules()}
    own = vars(model)
    forward = own.get("forward")
    model.eval()
    if "_original_forward" in own:
        own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        if "_original_forward" in own:
            own["forward"] = forward
        for module, mode in modes.items():
            module.training = mode
