"""The sweep on a Ray cluster: one live model per GPU, or per group of CPU slots; a dead worker's
step goes to another.

Workers read checkpoints and write parts by the same paths as the driver, so all nodes must share
the file system.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from sft_probe.analysis.sweep.benchmarks import BenchmarkTasks
from sft_probe.analysis.sweep.checkpoints import Checkpoint
from sft_probe.analysis.sweep.ownership import StepBusyError
from sft_probe.analysis.sweep.request import SweepRequest
from sft_probe.analysis.sweep.settings import fix_settings, resolve_settings
from sft_probe.analysis.sweep.step import Scorer
from sft_probe.errors import UserError

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_NUM_STARTS = 5
_CONNECT_TIMEOUT_S = 10


def connect(request: SweepRequest) -> SweepRequest:
    """Connect to `request.ray_address`, else to RAY_ADDRESS, else start Ray here; choose the
    workers' device.

    Raises:
        UserError: no cluster answers at the address, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = request.ray_address or os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
        _start_ray(address)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot reach a Ray cluster at {address}: {str(error)[:200]}") from error
    return replace(
        request, device=request.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    )


def _start_ray(address: str | None) -> None:
    """Start Ray or join a cluster. A node has 30 s to start, which Ray has no setting for, so that
    a busy machine gets more tries."""
    for _ in range(_NUM_STARTS):
        try:
            ray.init(address=address, logging_level=logging.WARNING, ignore_reinit_error=True)
        except Exception as error:  # Ray raises this class itself
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return
    raise UserError(
        f"Ray has not started in {_NUM_STARTS} tries of 30 s. Run the command again when the "
        "machine is less busy, or without --engine ray."
    )


def score_on_ray(
    request: SweepRequest,
    decided_by: Checkpoint,
    checkpoints: list[Checkpoint],
    reference: Checkpoint | None,
) -> list[str]:
    """Score the checkpoints on the cluster that `connect` reached; return what went wrong."""
    if not checkpoints:
        return []
    num_workers, start = _plan(request, decided_by, checkpoints, reference)
    log.info("%d workers on %s", num_workers, request.device)
    idle = [start() for _ in range(num_workers)]
    busy: dict[Any, tuple[Any, Checkpoint]] = {}
    waiting = deque((checkpoint, False) for checkpoint in checkpoints)
    deaths: Counter[int] = Counter()
    problems = []
    while waiting or busy:
        while waiting and idle:
            worker, (checkpoint, wait) = idle.pop(), waiting.popleft()
            busy[worker.score.remote(checkpoint, wait)] = (worker, checkpoint)
        (done,), _ = ray.wait(list(busy))
        worker, checkpoint = busy.pop(done)
        try:
            found = ray.get(done)
        except RayActorError:
            worker = start()
            deaths[checkpoint.step] += 1
            found = []
            if deaths[checkpoint.step] < _MAX_ATTEMPTS:
                log.warning("step %d: its worker died; another one takes it", checkpoint.step)
                waiting.append((checkpoint, True))
            else:
                found = [f"its worker died {_MAX_ATTEMPTS} times (out of memory?); see Ray's logs"]
        if found is None:
            log.info("step %d: another process is scoring it", checkpoint.step)
            waiting.append((checkpoint, True))
        idle.append(worker)
        problems += [f"step {checkpoint.step}: {problem}" for problem in found or []]
    ray.shutdown()
    return problems


def _plan(
    request: SweepRequest,
    decided_by: Checkpoint,
    checkpoints: list[Checkpoint],
    reference: Checkpoint | None,
) -> tuple[int, Callable[[], Any]]:
    """Return how many workers there are, and what starts one: a GPU each, else as many CPU slots
    each as there are enough of."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind = "CPU" if request.device == "cpu" else "GPU"
    slots = [int(node.get(kind, 0)) for node in nodes]
    num_workers = min(len(checkpoints), sum(slots))
    share = 1
    if kind == "CPU":  # Ray tells each worker's libraries to start as many threads
        share = max(
            n for n in range(1, max(slots) + 1) if sum(slot // n for slot in slots) >= num_workers
        )
    options = {"num_cpus": share} if kind == "CPU" else {"num_gpus": 1}
    worker = ray.remote(StepWorker).options(**options)
    return num_workers, lambda: worker.remote(request, decided_by, Path.cwd(), reference)


class StepWorker:
    """A Ray actor that holds one live model."""

    def __init__(
        self,
        request: SweepRequest,
        decided_by: Checkpoint,
        directory: Path,
        reference: Checkpoint | None,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        os.chdir(directory)
        self.request = request
        self.decided_by = decided_by
        self.reference = reference
        self.scorer: Scorer | None = None

    def score(self, checkpoint: Checkpoint, wait: bool) -> list[str] | None:
        """Score one checkpoint; return what is wrong with it, or `None` where another process is
        scoring it."""
        try:
            if self.scorer is None:  # not in `__init__`, where an error would be a dead worker
                settings = resolve_settings(self.request, [self.decided_by])
                max_tokens = fix_settings(settings, self.request)
                benchmarks = BenchmarkTasks(self.request.tasks)
                self.scorer = Scorer(self.request, settings, max_tokens, benchmarks, self.reference)
            return self.scorer.score(checkpoint, wait=wait)
        except StepBusyError:
            return None
        except UserError as error:
            return [str(error)]
        except (
            Exception
        ) as error:  # of this node: the driver would end with it, and the other steps be lost
            return [f"{socket.gethostname()}: {type(error).__name__}: {error}"]
