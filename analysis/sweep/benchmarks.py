"""Benchmarks beside the probes: lm-eval's tasks by name, pattern or file, and their results."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sft_probe.errors import unknown
from sft_probe.tasks.benchmark_files import benchmarks_dir

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class BenchmarkTasks:
    """The tasks of `--tasks`, each loaded at its first use.

    Args:
        specs: names or patterns of lm-eval's tasks, or of those that `sft-probe benchmarks add`
            made, or YAML files.

    Raises:
        UserError: there is no such task or file; nothing has been loaded then.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self._names = {spec: self._match(spec) for spec in specs}
        self._loaded: dict[str, list[Any]] = {}

    def load(self, spec: str) -> list[Any]:
        """Return the task objects of one of the specs, groups as one."""
        if spec not in self._loaded:
            manager, names = self._names[spec]
            found = manager.load(names)
            self._loaded[spec] = [*found["groups"].values()] or [*found["tasks"].values()]
        return self._loaded[spec]

    @cached_property
    def _own(self) -> "TaskManager":
        from lm_eval.tasks import TaskManager

        folder = benchmarks_dir()
        path = str(folder) if folder.is_dir() else None
        return TaskManager(include_defaults=False, include_path=path)

    @cached_property
    def _all(self) -> "TaskManager":
        from lm_eval.tasks import TaskManager

        return TaskManager()

    def _match(self, spec: str) -> "tuple[TaskManager, list[str]]":
        if spec.endswith((".yaml", ".yml")):
            return self._own, [spec]
        for manager in (self._own, self._all):
            if names := manager.match_tasks([spec]):
                if len(names) > 1:
                    # a pattern may match a group and its tasks, which lm-eval refuses as duplicates
                    names = [name for name in names if name in manager.all_subtasks]
                return manager, names
        known = [*self._own.all_tasks, *self._all.all_tasks]
        use = "`lm_eval ls tasks` lists them; `sft-probe benchmarks add` makes one of a JSONL file."
        raise unknown("task", spec, known, where="--tasks", use=use)
