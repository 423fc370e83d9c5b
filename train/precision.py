"""The dtype of the weights that are really trained, read from the model once everything is
prepared."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from sft_probe.errors import UserError
from sft_probe.train.gather import has_masters


def name_of(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")


def most_common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype that most numbers have: some models keep a few weights in float32."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += getattr(
            tensor, "ds_numel", tensor.numel()
        )  # ZeRO-3 leaves an empty tensor in its place
    return sizes.most_common(1)[0][0]


def weights_dtype(model: torch.nn.Module) -> str:
    """Return the dtype of the weights that a forward pass reads and training changes, or of all if
    none is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return name_of(most_common_dtype(trained or model.parameters()))


class PrecisionCallback(TrainerCallback):
    """Compares the dtype that training really uses with `--dtype`, before the first step.

    Raises:
        UserError: weights are trained in another dtype than was asked for.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.columns: dict[str, str] = {}
        """For the manifest: `weights_dtype` of what a forward pass reads, `trained_dtype` of what
        is updated."""

    def on_train_begin(
        self, _args: TrainingArguments, _state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Read the dtypes of the prepared model."""
        model = kwargs["model"]
        in_memory = name_of(most_common_dtype(model.parameters()))
        trained = "float32" if has_masters(model) else weights_dtype(model)
        if self.dtype not in (in_memory, trained):
            raise UserError(
                f"--dtype {self.dtype}: the weights are {in_memory} once they are prepared, and "
                f"trained in {trained}. "
                "Let --dtype, --bf16 and --fp16 agree with the DeepSpeed file and the launcher."
            )
        self.columns = {"weights_dtype": weights_dtype(model), "trained_dtype": trained}
