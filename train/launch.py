"""Builds DeepSpeed's CPU communication extension before any rank needs it: ranks that compile at
once break each other.

Run as: python -m sft_probe.train.extensions
"""

import logging
import shutil
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

from sft_probe.errors import UserError, exit_on_user_error
from sft_probe.files import make_dir
from sft_probe.models import cache_dir


def build() -> None:
    """Compiles the extension, or loads it where it is built already.

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
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    make_dir(cache_dir())
    with FileLock(cache_dir() / "extensions.lock"):
        # torch's own lock file outlives a `kill -9`, and torch would wait for it for ever
        Path(_get_build_directory(builder.name, verbose=False), "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with exit_on_user_error():
        build()
