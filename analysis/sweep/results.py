"""lm-eval's own result files, one directory per step and part of the sweep."""

import datetime
from pathlib import Path
from typing import Any

from sft_probe.errors import UserError


def write_results(directory: Path, results: dict[str, Any], model_args: dict[str, Any]) -> None:
    """Writes `results_*.json` and one `samples_*.jsonl` per task with lm-eval's own writer.

    Raises:
        UserError: a file is missing afterwards; lm-eval only warns where it cannot write.
    """
    from lm_eval.loggers import EvaluationTracker

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


def benchmark_rows(results: dict[str, Any], run: str, step: int) -> list[dict[str, Any]]:
    """Rows `run step task metric filter value stderr n` of the tasks and groups in lm-eval's
    results."""
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            rows.append(
                {
                    "run": run,
                    "step": step,
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "n": results["n-samples"].get(task, {}).get("effective"),
                }
            )
    return rows
