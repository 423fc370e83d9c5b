"""Scores the parts of one checkpoint: a split of the probe set or a benchmark, each written whole
or not at all."""

import datetime
import logging
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.evaluator import evaluate, simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from sft_probe.analysis.stats.benchmarks import benchmark_rows
from sft_probe.analysis.sweep.benchmarks import BenchmarkTasks
from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.contexts import PLAN, context_plan, score_contexts
from sft_probe.analysis.sweep.generate import generate_answers, generation_docs, max_new_tokens
from sft_probe.analysis.sweep.identity import (
    RECORD,
    Identity,
    check_unchanged,
    check_undamaged,
    identify,
    recorded_of_step,
)
from sft_probe.analysis.sweep.live_model import LiveModel
from sft_probe.analysis.sweep.ownership import (
    StepBusyError,
    owned_step,
    remove_parts,
    stale_parts,
)
from sft_probe.analysis.sweep.parts import (
    ANSWERS,
    OTHER_PROMPTS,
    REFERENCE,
    parts_asked_for,
    step_folder,
)
from sft_probe.analysis.sweep.reference import is_beside, reference_name
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.settings import SweepSettings, record
from sft_probe.errors import UserError, first_few
from sft_probe.files import new_dir, read_jsonl, write_json, write_jsonl, write_text
from sft_probe.models import check_window
from sft_probe.prompts import first_visible, terminator_id
from sft_probe.scores import score_row
from sft_probe.tasks.discovery import task_name, write_tasks_dir
from sft_probe.tasks.lm import NonFiniteError, ProbeLM, ProbeScore

log = logging.getLogger(__name__)

ERROR_LOG = "error.log"
_MAX_NAMED = 5


class Scorer:
    """Task objects and the lm-eval model, built at first need and kept; each checkpoint replaces
    the weights.

    Args:
        request: what to score.
        settings: what all steps share.
        max_tokens: the token budget; lowered, and recorded in the sweep's manifest, where memory
            runs out.
        benchmarks: those of the request.
        reference: the model from which distances are taken.
    """

    def __init__(
        self,
        request: SweepRequest,
        settings: SweepSettings,
        max_tokens: int,
        benchmarks: BenchmarkTasks,
        reference: Checkpoint | None = None,
    ) -> None:
        self.request = request
        self.settings = settings
        self.max_tokens = max_tokens
        self.reference = reference
        self.identity: Identity = {}
        """Of the checkpoint that is being scored."""
        self._reset()
        self.probe_tasks: dict[str, Any] = {}
        self.benchmarks = benchmarks
        self.first_visible = {
            (doc.doc.doc_id, category): first_visible(settings.tokenizer, ids)
            for doc in settings.docs
            for category, ids in doc.continuation_ids.items()
        }

    def _reset(self) -> None:
        request, settings = self.request, self.settings
        self.live = LiveModel(request.dtype, request.resolved_device, settings)
        self.lm: ProbeLM | None = None

    def score(self, checkpoint: Checkpoint, *, wait: bool = True) -> list[str]:
        """Score the parts that are missing, or whose weights have changed; return what is wrong
        with those there are.

        Args:
            checkpoint: the one to score.
            wait: for another process that is scoring it.

        Raises:
            UserError: the checkpoint cannot be scored; after an unforeseen error it names the file
                with the traceback.
            StepBusyError: another process is scoring it.
        """
        folder = step_folder(self.request.directory, checkpoint.step)
        try:
            with owned_step(folder, wait=wait):
                problems = self._score_owned(checkpoint, folder)
                (folder / ERROR_LOG).unlink(missing_ok=True)
                return problems
        except (UserError, StepBusyError):
            raise
        except (
            Exception
        ) as error:  # of whatever library reads this checkpoint; the others are scored
            self._reset()
            where = (
                f"{checkpoint.name}: {type(error).__name__}: {textwrap.shorten(str(error), 200)}"
            )
            raise UserError(f"{where} ({_write_error_log(folder)})") from error

    def _score_owned(self, checkpoint: Checkpoint, folder: Path) -> list[str]:
        request = self.request
        parts = parts_asked_for(request, folder)
        missing = self._prepare(checkpoint, folder, parts)
        problems = []
        for name in missing:
            try:
                if name in request.splits:
                    self._score_probes(checkpoint, name, parts[name])
                elif name == ANSWERS:
                    self._generate(checkpoint, parts[name])
                elif name == OTHER_PROMPTS:
                    self._score_contexts(checkpoint, parts[name])
                else:
                    self._score_benchmark(checkpoint, name, parts[name])
            except (NonFiniteError, FloatingPointError) as error:
                problems.append(f"{name}: {error}")
        return [
            *(fault for split in request.splits for fault in _faults(folder / split)),
            *problems,
        ]

    def _prepare(self, checkpoint: Checkpoint, folder: Path, parts: dict[str, Path]) -> list[str]:
        """Return the names of the parts to score, after loading the weights where there are any."""
        missing = [name for name, path in parts.items() if not path.exists()]
        known = recorded_of_step(folder)
        try:
            self.identity = identify(checkpoint, known)
        except UserError as error:
            if missing:
                raise
            log.warning("step %d: %s What was scored is kept.", checkpoint.step, error)
            return []
        stale = stale_parts(folder, self.identity)
        alone = [path for path in self._scored_alone(parts) if path not in stale]
        missing = [
            name for name, path in parts.items() if name in missing or path in (*stale, *alone)
        ]
        if missing:
            log.info("step %d: scoring %s", checkpoint.step, ", ".join(missing))
            check_undamaged(checkpoint, self.identity)
            self._load(checkpoint)
            check_unchanged(checkpoint, self.identity)
        else:
            log.info("step %d is complete", checkpoint.step)
        for parts_again, why in (
            (stale, f"{checkpoint.name} has changed since %s were scored: removed"),
            (alone, "%s were scored without this reference: removed"),
        ):
            if parts_again:
                names = ", ".join(path.name for path in parts_again)
                log.warning(f"step %d: {why}", checkpoint.step, names)
                remove_parts(self.request.directory, parts_again)
        return missing

    @cached_property
    def _reference_identity(self) -> Identity:
        assert self.reference is not None  # noqa: S101 - the callers' branch
        try:
            identity = identify(self.reference)
            check_undamaged(self.reference, identity)
        except UserError as error:
            raise UserError(f"--reference: {error}") from error
        return identity

    def _scored_alone(self, parts: dict[str, Path]) -> list[Path]:
        """Return the splits that were scored without the reference, or beside another one."""
        if self.reference is None:
            return []
        splits = [parts[name] for name in self.request.splits if parts[name].exists()]
        return [path for path in splits if not is_beside(path, self._reference_identity)]

    @contextmanager
    def _new_part(self, folder: Path) -> Iterator[Path]:
        with new_dir(folder) as temporary:
            yield temporary
            write_json(temporary / RECORD, self.identity)

    def _load(self, checkpoint: Checkpoint) -> None:
        if self.lm is not None:
            self.lm.use(None)  # the old weights may have to go before the next ones come
        model = self.live.load(checkpoint)
        check_window(self.settings.max_length, model)
        if self.lm is not None:
            self.lm.use(model)
            return
        with _quiet("lm_eval"):
            lm = ProbeLM(
                pretrained=model,
                backend="causal",
                tokenizer=self.settings.tokenizer,
                batch_size=self.request.batch_size,
                max_length=self.settings.max_length,
                max_tokens=self.max_tokens,
                token_columns=self.request.columns == "all",
            )
        if self.reference is not None:
            live = LiveModel(self.request.dtype, self.request.resolved_device, self.settings)
            try:
                lm.compare_with(live.load(self.reference, any_config=True))
            except UserError as error:
                raise UserError(f"--reference {self.reference.name}: {error}") from error
        self.lm = lm

    def _score_probes(self, checkpoint: Checkpoint, split: str, folder: Path) -> None:
        if split not in self.probe_tasks:
            self.probe_tasks[split] = self._load_probe_tasks(split)
        results: dict[str, Any] | None = None
        faults: list[dict[str, Any]] = []
        try:
            with _quiet("lm_eval"):
                results = evaluate(
                    lm=self.lm, task_dict=self.probe_tasks[split], bootstrap_iters=1000
                )
            scored = [
                (sample["doc"], sample["resps"][0][0])
                for task in results["samples"].values()
                for sample in task
            ]
        except (
            NonFiniteError
        ) as error:  # lm-eval's means would be of fewer docs, so that its files are left out
            scored = [(request.doc, score) for request, score in error.scored]
            faults = [request.doc for request in error.faults]
        self._keep_max_tokens()
        rows = [self._row(doc, score, checkpoint) for doc, score in scored]
        with self._new_part(folder) as temporary:
            write_jsonl(temporary / "rows.jsonl", rows)
            if self.reference is not None:
                write_json(temporary / REFERENCE, self._reference_identity)
            if results is not None:
                self._write_results(temporary, results, checkpoint)
            if faults:
                write_jsonl(
                    temporary / "faults.jsonl", [_fault(doc, checkpoint.step) for doc in faults]
                )
        if self.reference is not None:
            record(self.request.directory, reference=reference_name(self.reference))

    def _row(
        self, doc: dict[str, Any], score: ProbeScore, checkpoint: Checkpoint
    ) -> dict[str, Any]:
        columns = {
            **self.settings.run_columns,
            "step": checkpoint.step,
            "examples_seen": checkpoint.examples_seen,
            "tokens_seen": checkpoint.tokens_seen,
            "epoch": checkpoint.epoch,
            "weights_dtype": checkpoint.weights_dtype,
            "source": "lm_eval",
        }
        return score_row(
            columns,
            doc,
            logprob=score[0],
            token_logprobs=score.token_logprobs,
            first=self.first_visible[doc["doc_id"], doc["category"]],
            logprob_eos=score.logprob_eos,
            is_greedy=score[1],
            token_columns=score.token_columns,
            distances=score.distances,
        )

    def _load_probe_tasks(self, split: str) -> Any:
        source = self.settings.probe_set.source
        tasks_dir = write_tasks_dir(source, self.request.directory / "sweep" / "tasks")
        tokenizer, revision = self.settings.tokenizer_source
        metadata = {
            "prompt_format": self.settings.prompt_format,
            "tokenizer": tokenizer,
            "revision": revision,
            "max_length": self.settings.max_length,
        }
        with _quiet("lm_eval", "sft_probe.tasks"):
            manager = TaskManager(
                include_defaults=False, include_path=str(tasks_dir), metadata=metadata
            )
            return manager.load(
                [task_name(category, split) for category in self.settings.probe_set.categories]
            )

    def _score_benchmark(self, checkpoint: Checkpoint, spec: str, folder: Path) -> None:
        with _quiet("lm_eval"):
            tasks = self.benchmarks.load(spec)
        with _quiet("lm_eval"):
            results = simple_evaluate(
                model=self.lm,
                tasks=tasks,
                num_fewshot=self.request.num_fewshot,
                limit=self.request.limit,
                apply_chat_template=self.request.apply_chat_template,
                task_manager=TaskManager(
                    include_defaults=False
                ),  # else it reads 14,000 files, at every step
            )
        self._keep_max_tokens()
        rows = benchmark_rows(results, self.settings.run_columns["run"], checkpoint.step)
        with self._new_part(folder) as temporary:
            write_jsonl(temporary / "benchmarks.jsonl", rows)
            self._write_results(temporary, results, checkpoint)

    def _generate(self, checkpoint: Checkpoint, folder: Path) -> None:
        settings = self.settings
        rows = generate_answers(
            self.live.model,
            settings.tokenizer,
            generation_docs(settings.docs, self.request.generate, settings.max_length),
            ends=[
                terminator_id(settings.format_name, settings.tokenizer),
                settings.tokenizer.eos_token_id,
            ],
            limit=max_new_tokens(settings.max_length),
            batch_size=self.request.batch_size,
        )
        columns = {**settings.run_columns, "step": checkpoint.step, "epoch": checkpoint.epoch}
        with self._new_part(folder) as temporary:
            write_jsonl(temporary / "generations.jsonl", [{**columns, **row} for row in rows])

    def _score_contexts(self, checkpoint: Checkpoint, folder: Path) -> None:
        settings = self.settings
        lm: Any = self.lm
        docs = [doc for doc in settings.docs if doc.doc.split == "heldout"]
        path = self.request.directory / "sweep" / PLAN
        if not path.exists() and checkpoint != settings.decided_by:
            context_plan(path, docs, self.live.load(settings.decided_by))
            self._load(checkpoint)
        plan = context_plan(path, docs, self.live.model)
        start = settings.tokenizer.bos_token_id
        rows = score_contexts(
            lm.scorer,
            self.live.model,
            docs,
            plan,
            contexts=self.request.contexts,
            start_id=settings.tokenizer.eos_token_id if start is None else start,
            terminator_id=terminator_id(settings.format_name, settings.tokenizer),
            max_length=settings.max_length,
            first_visible=self.first_visible,
        )
        self._keep_max_tokens()
        if num_left_out := len(docs) - len({row["doc_id"] for row in rows}):
            log.warning("%d docs left out: too long under another prompt", num_left_out)
        columns = {**settings.run_columns, "step": checkpoint.step}
        with self._new_part(folder) as temporary:
            write_jsonl(temporary / "contexts.jsonl", [{**columns, **row} for row in rows])

    def _keep_max_tokens(self) -> None:
        if self.lm is not None and self.lm.scorer.max_tokens != self.max_tokens:
            self.max_tokens = self.lm.scorer.max_tokens
            record(self.request.directory, max_tokens=self.max_tokens)

    def _write_results(self, folder: Path, results: dict[str, Any], checkpoint: Checkpoint) -> None:
        arguments = {
            "pretrained": checkpoint.model,
            "revision": checkpoint.revision,
            "dtype": self.request.dtype,
            "max_length": self.settings.max_length,
            "max_tokens": self.max_tokens,
        }
        with _quiet("lm_eval"):
            _write_lm_eval_files(folder, results, arguments)


def _write_error_log(folder: Path) -> str:
    """Write the traceback of the exception that is being handled; return where it is."""
    try:
        write_text(folder / ERROR_LOG, traceback.format_exc())
    except OSError as error:
        return f"no traceback: {error}"
    return f"traceback: {folder / ERROR_LOG}"


def _fault(doc: dict[str, Any], step: int) -> dict[str, Any]:
    return {
        "step": step,
        **{name: doc[name] for name in ("split", "category", "doc_id")},
        "reason": "NaN or inf",
    }


def _faults(folder: Path) -> list[str]:
    """Return one message about the responses of a part that have no log-prob; none where all have
    one."""
    path = folder / "faults.jsonl"
    if not path.exists():
        return []
    rows = read_jsonl(path)
    names = first_few((f"{row['doc_id']} {row['category']}" for row in rows), _MAX_NAMED)
    return [
        f"{folder.name}: the logits of {len(rows)} responses are NaN or infinite: {names} ({path})"
    ]


def _write_lm_eval_files(
    directory: Path, results: dict[str, Any], model_args: dict[str, Any]
) -> None:
    """Write `results_*.json` and one `samples_*.jsonl` per task with lm-eval's own writer.

    Raises:
        UserError: a file is missing afterwards; lm-eval only warns where it cannot write.
    """
    samples = results.pop("samples")
    results.setdefault("config", {"model": "sft_probe", "model_args": model_args})
    results.setdefault("date", datetime.datetime.now(datetime.UTC).timestamp())
    tracker = EvaluationTracker(output_path=str(directory / "results.json"))
    tracker.general_config_tracker.log_experiment_args("sft_probe", model_args, None, None, False)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, task_samples in samples.items():
        tracker.save_results_samples(task_name=task, samples=task_samples)
    if len(list(directory.glob("results_*.json"))) != 1 or len(
        list(directory.glob("samples_*.jsonl"))
    ) != len(samples):
        raise UserError(f"lm-eval could not write its results to {directory}; is the disk full?")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let only errors of these loggers through, and no bar per task, for the length of a block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
