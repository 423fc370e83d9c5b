"""How the processes of a training start: DeepSpeed's file, its compiled extension, and the ranks.

Run as: python -m sft_probe.train.launch (compiles the extension ahead of the first run)
"""

import json
import logging
import os
import shutil
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory  # private: where torch puts its lock
from transformers.trainer_pt_utils import AcceleratorConfig

from sft_probe import ds_configs
from sft_probe.errors import UserError, doing, exit_on_user_error, quiet
from sft_probe.files import make_dir, read_json
from sft_probe.models import cache_dir

log = logging.getLogger(__name__)


def deepspeed_config(name: str | None) -> str | None:
    """Return the path of a DeepSpeed file, given by its name in `ds_configs` or by its path.

    Returns:
        `None` for the name `none`. Without a name: zero2 with a GPU, else cpu.
    """
    name = name or ("zero2" if torch.cuda.is_available() else "cpu")
    if name == "none":
        return None
    return str(ds_configs.path_of(name) if name in ds_configs.available() else name)


def accelerator_config(given: Any) -> dict[str, Any]:
    """Read `--accelerator_config`, which is JSON or the path of a JSON file.

    Raises:
        UserError: it is no JSON object, or it changes which examples make a batch, or their order.
    """
    if isinstance(given, str):
        given = json.loads(given) if given.startswith("{") else read_json(Path(given))
    if not isinstance(given, dict | None):
        raise UserError("--accelerator_config must be a JSON object, or a file that holds one.")
    defaults = AcceleratorConfig().to_dict()
    for name, value in (given or {}).items():
        if name not in defaults:
            raise UserError(
                f"--accelerator_config: there is no {name!r}; accelerate knows "
                f"{', '.join(defaults)}."
            )
        if name != "non_blocking" and value != defaults[name]:
            raise UserError(
                f"--accelerator_config: {name!r} {value} changes which examples make a step, or "
                f"when. Leave it out: it must be {defaults[name]}."
            )
    return dict(given or {})


def set_single_process_environment() -> None:
    """Set the rank and address variables that a launcher would set, unless there is a launcher.

    Without them DeepSpeed asks MPI.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def join_ranks_on_cpu(*, timeout_s: int) -> bool:
    """Connect the ranks of a DeepSpeed training without a GPU, and return whether that was needed.

    On its own, accelerate sees one process there, and with `use_cpu` it drops DeepSpeed.
    """
    if torch.cuda.is_available():
        return False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return True


def provide_extension() -> None:
    """Leave DeepSpeed's CPU extension out of a single process, and compile it for several.

    It speeds up the exchange between ranks; one process exchanges nothing, and needs no compiler.

    Raises:
        UserError: there is no C++ compiler, where one is needed: for several ranks without a GPU.
    """
    if os.environ["WORLD_SIZE"] != "1":
        build_extension()
        return
    from deepspeed.ops import __compatible_ops__  # private: what DeepSpeed may compile
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


def build_extension() -> None:
    """Compile DeepSpeed's CPU communication extension, or load it if it is compiled already.

    One process compiles while the others wait: ranks that compile at once break each other.

    Raises:
        UserError: there is no C++ compiler, where one is needed: without a GPU.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError(
            "DeepSpeed on CPU needs a C++ compiler (g++). Install one, or train with --deepspeed "
            "none."
        )
    make_dir(cache_dir())
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_dir() / "extensions" / version))
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    with FileLock(cache_dir() / "extensions.lock"):
        folder = Path(_get_build_directory(builder.name, verbose=False))
        # torch's own lock file outlives a `kill -9`, and torch would wait for it for ever
        (folder / "lock").unlink(missing_ok=True)
        if not list(folder.glob("*.so")):
            log.info("compiling DeepSpeed's CPU extension into %s (once, about 1 minute)", folder)
        builder.load(verbose=False)


if __name__ == "__main__":
    quiet()
    with exit_on_user_error(), doing("importing DeepSpeed, or compiling its extension"):
        build_extension()
