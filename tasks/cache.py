"""lm-eval's `--use_cache`, whose key is the text of a request alone: bound to one model, or
refused."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from sft_probe.errors import UserError
from sft_probe.files import read_object, write_json


def bind_cache(cache: Any, model: Any, **settings: Any) -> None:
    """Record beside a cache which weights its answers are of, in `CACHE.model.json`.

    Args:
        cache: the `SqliteDict` of lm-eval.
        model: in memory.
        **settings: what else may change an answer.

    Raises:
        UserError: the cache holds answers of another model, or of an unknown one.
    """
    path = Path(f"{cache.filename}.model.json")
    mine = {"weights_sha256": weights_sha256(model), **settings}
    if path.exists():
        earlier = read_object(path)
        differing = sorted(
            name for name in mine.keys() | earlier.keys() if mine.get(name) != earlier.get(name)
        )
        if differing:
            raise _refused(cache, f"holds the answers of another model ({', '.join(differing)})")
    elif len(cache):
        raise _refused(cache, "does not say of which model its answers are")
    else:
        write_json(path, mine)


def _refused(cache: Any, reason: str) -> UserError:
    return UserError(
        f"--use_cache {cache.filename} {reason}. lm-eval finds answers by the text of a request "
        "alone, so each "
        "checkpoint needs a cache of its own. `sft-probe sweep` needs none: it never scores a "
        "checkpoint twice."
    )


def weights_sha256(model: torch.nn.Module) -> str:
    """Return a hash of all tensors of a model, in its dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
