"""The sweep: lm-eval over every checkpoint, in one process, resumable part by part.

A part is a split of the probe set or a benchmark. `sweep/step_000016/heldout/` exists only complete.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_probe.analysis.checkpoints import Checkpoint, of_patterns, of_revisions, of_run
from sft_probe.analysis.results import benchmark_rows, write_results
from sft_probe.analysis.rows import score_row
from sft_probe.analysis.settings import SweepRequest, SweepSettings, fix_settings, resolve_settings
from sft_probe.analysis.tables import write_tables
from sft_probe.errors import UserError
from sft_probe.files import new_dir, write_jsonl
from sft_probe.models import check_window, load_model
from sft_probe.tasks.discovery import task_name, write_tasks_dir

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

log = logging.getLogger(__name__)


def sweep(request: SweepRequest) -> list[Path]:
    """Scores what is not scored yet and writes the tables; returns their paths.

    Raises:
        UserError: nothing can be scored; or, after all others are done, some checkpoint could not be.
    """
    checkpoints, problems = _find(request)
    if not checkpoints:
        raise UserError("\n".join(["no checkpoint can be scored:", *problems]))
    settings = resolve_settings(request, checkpoints[0])
    fix_settings(settings, request.directory)
    for drop in settings.dropped:
        log.warning("left out of all categories: %s: %s", drop.doc_id, drop.reason)
    log.info(
        "%d checkpoints; %d docs can be scored in %d categories, %d are left out",
        len(checkpoints), len(settings.docs), len(settings.probe_set.categories), len(settings.dropped),
    )  # fmt: skip
    index, num_shards = request.shard
    scorer = _Scorer(request, settings)
    for checkpoint in checkpoints[index - 1 :: num_shards]:
        try:
            scorer.score(checkpoint)
        except UserError as error:
            problems.append(f"step {checkpoint.step}: {error}")
            log.error("step %d cannot be scored: %s", checkpoint.step, error)
    tables = write_tables(request.directory)
    if problems:
        done = f"the others are in {request.directory}" if tables else "nothing was scored"
        raise UserError("\n".join([f"{len(problems)} checkpoints could not be scored; {done}:", *problems]))
    return tables


def _find(request: SweepRequest) -> tuple[list[Checkpoint], list[str]]:
    if request.checkpoints:
        return of_patterns(request.checkpoints), []
    if request.model:
        return of_revisions(request.model, request.revisions), []
    return of_run(request.directory)


class _Scorer:
    """Task objects and the lm-eval model, built at first need and kept; each checkpoint replaces the weights."""

    def __init__(self, request: SweepRequest, settings: SweepSettings) -> None:
        self.request = request
        self.settings = settings
        self.lm: HFLM | None = None
        self.probe_tasks: dict[str, Any] = {}
        self.benchmarks: dict[str, list[Any]] = {}
        self.benchmark_suffix = "".join(
            f"-{name}"
            for name in (
                f"{request.num_fewshot}shot" if request.num_fewshot is not None else "",
                f"limit{request.limit:g}" if request.limit is not None else "",
                "chat" if request.apply_chat_template else "",
            )
            if name
        )

    def score(self, checkpoint: Checkpoint) -> None:
        """Scores the parts of one checkpoint that are missing."""
        folder = self.request.directory / "sweep" / f"step_{checkpoint.step:06d}"
        splits = [split for split in self.request.splits if not (folder / split).exists()]
        benchmarks = {spec: folder / f"benchmark_{_slug(spec)}{self.benchmark_suffix}" for spec in self.request.tasks}
        benchmarks = {spec: path for spec, path in benchmarks.items() if not path.exists()}
        if not splits and not benchmarks:
            log.info("step %d is complete", checkpoint.step)
            return
        log.info("step %d: scoring %s", checkpoint.step, ", ".join([*splits, *benchmarks]))
        checkpoint.verify()
        self._load(checkpoint)
        for split in splits:
            self._score_probes(checkpoint, split, folder / split)
        for spec, path in benchmarks.items():
            self._score_benchmark(checkpoint, spec, path)

    def _load(self, checkpoint: Checkpoint) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM

        if self.lm is not None:
            self.lm._model = None  # frees the memory before the next weights come
        model = load_model(checkpoint.model, self.request.dtype, checkpoint.revision)
        check_window(self.settings.max_length, model)
        model = model.to(self.request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.lm is not None:
            self.lm._model = model
            return
        with _quiet("lm_eval"):
            self.lm = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=self.settings.tokenizer,
                batch_size=self.request.batch_size,
                max_length=self.settings.max_length,
                softmax_dtype="float32",
                # its one-token cache reads wrong logits where two requests differ only in the split point
                logits_cache=False,
            )

    def _score_probes(self, checkpoint: Checkpoint, split: str, folder: Path) -> None:
        from lm_eval.evaluator import evaluate

        if split not in self.probe_tasks:
            self.probe_tasks[split] = self._load_probe_tasks(split)
        with _quiet("lm_eval"):
            results = evaluate(lm=self.lm, task_dict=self.probe_tasks[split], bootstrap_iters=1000)
        samples = [sample for name in results["samples"] for sample in results["samples"][name]]
        rows = [score_row(sample, checkpoint, self.settings.run_columns) for sample in samples]
        with new_dir(folder) as temporary:
            write_jsonl(temporary / "rows.jsonl", rows)
            write_results(temporary, results, self._model_args(checkpoint))

    def _load_probe_tasks(self, split: str) -> Any:
        from lm_eval.tasks import TaskManager

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
            manager = TaskManager(include_defaults=False, include_path=str(tasks_dir), metadata=metadata)
            return manager.load([task_name(category, split) for category in self.settings.probe_set.categories])

    def _score_benchmark(self, checkpoint: Checkpoint, spec: str, folder: Path) -> None:
        from lm_eval.evaluator import simple_evaluate

        if spec not in self.benchmarks:
            self.benchmarks[spec] = _load_benchmark(spec)
        results = simple_evaluate(
            model=self.lm,
            tasks=self.benchmarks[spec],
            num_fewshot=self.request.num_fewshot,
            limit=self.request.limit,
            apply_chat_template=self.request.apply_chat_template,
            batch_size=self.request.batch_size,
        )
        rows = benchmark_rows(results, self.settings.run_columns["run"], checkpoint.step)
        with new_dir(folder) as temporary:
            write_jsonl(temporary / "benchmarks.jsonl", rows)
            write_results(temporary, results, self._model_args(checkpoint))

    def _model_args(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "pretrained": checkpoint.model,
            "revision": checkpoint.revision,
            "dtype": self.request.dtype,
            "softmax_dtype": "float32",
            "max_length": self.settings.max_length,
        }


def _load_benchmark(spec: str) -> list[Any]:
    from lm_eval.tasks import TaskManager

    is_file = spec.endswith((".yaml", ".yml"))
    with _quiet("lm_eval"):
        manager = TaskManager(include_defaults=not is_file)
        names = [spec] if is_file else manager.match_tasks([spec])
        if not names or (is_file and not Path(spec).is_file()):
            raise UserError(f"--tasks: lm-eval knows no task {spec!r}; `lm_eval ls tasks` lists them.")
        if len(names) > 1:  # a pattern may match a group and its tasks, which lm-eval refuses as duplicates
            names = [name for name in names if name in manager.all_subtasks]
        loaded = manager.load(names)
    return [*loaded["groups"].values()] or [*loaded["tasks"].values()]


def _slug(spec: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in Path(spec).name.removesuffix(".yaml"))


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Errors only from these loggers, for the length of a block: what lm-eval logs here tells a user nothing."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
