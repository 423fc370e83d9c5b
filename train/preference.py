"""The preference stage: DPO and IPO on pairs, against log-probs of a reference that are computed
once.

A batch holds each pair as two rows, chosen before rejected, so that trainer, logs and resume are
those of SFT.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed

from sft_probe.errors import UserError
from sft_probe.files import read_object, write_json
from sft_probe.models import load_model, load_tokenizer
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import FittingScorer, default_max_tokens
from sft_probe.train.arguments import SftArguments
from sft_probe.train.examples import IGNORED_LABEL, Example, TrainingExamples
from sft_probe.train.model import model_version
from sft_probe.train.trainer import FiniteTrainer

log = logging.getLogger(__name__)

REFERENCE_FILE = "reference.json"


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The loss of a pair. `ratio` is log p(response) less that under the reference, in nats, summed
    over response and terminator."""

    beta: float
    label_smoothing: float
    loss_type: str
    sft_weight: float

    def of_pairs(self, ratios: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        """Return the losses [P] of pairs, from `ratios` and `num_tokens` [P, 2], chosen first.

        `sigmoid` is DPO (Rafailov et al. 2023, arXiv 2305.18290), with `label_smoothing` the chance
        that a pair is the wrong way round. `ipo` is eq. 17 of Azar et al. 2023 (arXiv 2310.12036)
        on means over tokens, as TRL has it.
        """
        if self.loss_type == "ipo":
            margins = (ratios / num_tokens) @ ratios.new_tensor([1.0, -1.0])
            return (margins - 1 / (2 * self.beta)) ** 2
        logits = self.beta * (ratios @ ratios.new_tensor([1.0, -1.0]))
        kept, flipped = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        return -(1 - self.label_smoothing) * kept - self.label_smoothing * flipped


class PreferenceTrainer(FiniteTrainer):
    """Trains on pairs as `FiniteTrainer` trains on examples; the loss is the mean over the pairs of
    a step, of all its micro-batches and ranks.

    Args:
        preference: the loss.
        reference: [N] float32, log-probs of all responses under the reference, by example index.
    """

    def __init__(
        self, *args: Any, preference: PreferenceLoss, reference: torch.Tensor, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.preference = preference
        self._reference = reference
        self._num_chosen_tokens = torch.ones(())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, and the number of pairs in those of all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        labels = [batch["labels"] for batch in batches]
        counts = [
            sum(len(rows) // 2 for rows in labels),
            sum(int((rows[::2] != IGNORED_LABEL).sum()) for rows in labels),
        ]
        total = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum")
        self._num_chosen_tokens = total[1]
        return batches, total[0]

    def _mean_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any
    ) -> torch.Tensor:
        is_target = labels[:, 1:] != IGNORED_LABEL
        rows, _ = torch.nonzero(is_target, as_tuple=True)
        token_losses = self._token_losses(outputs, labels)
        sums = token_losses.new_zeros(len(labels)).index_add(0, rows, token_losses)
        self._shown.append((self._example_index, sums.detach()))
        reference = self._reference[self._example_index].to(sums.device)
        ratios = (-sums - reference).view(-1, 2)
        losses = self.preference.of_pairs(ratios, is_target.sum(1).view(-1, 2))
        chosen = self.preference.sft_weight * sums[::2].sum() / self._num_chosen_tokens
        loss: torch.Tensor = losses.sum() / num_items_in_batch + chosen
        return loss

    def step_columns(
        self, shown: Sequence[tuple[int, float]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Return the loss of a step, and rewards, margins and accuracies by the names that TRL
        uses."""
        index = [i for i, _ in shown]
        sums = torch.tensor([loss for _, loss in shown], dtype=torch.float64)
        num_tokens = torch.tensor([examples[i].num_tokens for i in index])
        ratios = (-sums - self._reference[index].double()).view(-1, 2)
        losses = self.preference.of_pairs(ratios, num_tokens.view(-1, 2))
        chosen_loss = float(sums[::2].sum() / num_tokens[::2].sum())
        rewards = self.preference.beta * ratios
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": float(losses.mean()) + self.preference.sft_weight * chosen_loss,
            "chosen_loss": chosen_loss,
            "rewards/chosen": float(rewards[:, 0].mean()),
            "rewards/rejected": float(rewards[:, 1].mean()),
            "rewards/margins": float(margins.mean()),
            "rewards/accuracies": float((margins > 0).double().mean()),
        }

    def example_columns(self, index: int, loss: float) -> dict[str, float]:
        """Return the reward of a response, and its log-prob under the reference."""
        reference = float(self._reference[index])
        return {
            "reference_logprob": reference,
            "reward": self.preference.beta * (-loss - reference),
        }


def preference_loss(arguments: SftArguments) -> PreferenceLoss:
    """Return the loss that the flags ask for."""
    return PreferenceLoss(
        beta=arguments.beta,
        label_smoothing=arguments.label_smoothing,
        loss_type=arguments.loss_type,
        sft_weight=arguments.sft_weight,
    )


def reference_logprobs(
    arguments: SftArguments,
    tokenizer: PreTrainedTokenizerBase,
    examples: TrainingExamples,
    folder: Path,
) -> torch.Tensor:
    """Return the log-probs [N] float32 of all responses under the reference: `--reference`, else
    the model that this stage starts from.

    The first rank computes them before the model to train is loaded, so that there are never two in
    memory, and writes them to `reference.json`; a resumed run reads them there.

    Raises:
        UserError: the reference has another tokenizer, or gives a log-prob that is not finite.
    """
    values: list[Any] = [None]
    if arguments.should_save:
        name = arguments.reference or arguments.model_name_or_path
        request = {
            "model": name,
            "model_version": model_version(name),
            "dtype": arguments.dtype,
            "encoded_data_sha256": examples.sha256,
        }
        path = folder / REFERENCE_FILE
        if (
            path.exists()
            and (found := read_object(path, {"of": dict, "logprobs": list}))["of"] == request
        ):
            values = [[row["logprob"] for row in found["logprobs"]]]
        else:
            _check_tokenizer(name, tokenizer)
            values = [_score(arguments, name, examples)]
            rows = [
                {"doc_id": one.doc_id, "category": one.category, "logprob": value}
                for one, value in zip(examples.examples, values[0], strict=True)
            ]
            write_json(path, {"of": request, "logprobs": rows})
    broadcast_object_list(values)
    return torch.tensor(values[0], dtype=torch.float32)


def reference_sha256(folder: Path) -> str:
    """Return the hash of the reference log-probs of a run, for its manifest."""
    rows = read_object(folder / REFERENCE_FILE, {"logprobs": list})["logprobs"]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--reference {name}: its vocabulary is another one than that of the model, so that "
            "its log-probs are of other tokens. Choose a reference of the same family."
        )


def _score(arguments: SftArguments, name: str, examples: TrainingExamples) -> list[float]:
    """Return the log-prob of each response under the reference."""
    log.info("reference: scoring %d responses with %s", len(examples.examples), name)
    with _unsharded():
        model = load_model(
            name, arguments.dtype, attn_implementation=arguments.attn_implementation
        ).to(arguments.device)
    scorer = FittingScorer(default_max_tokens(str(arguments.device)), arguments.max_length)
    items = [_continuation(example) for example in examples.examples]
    found = dict(tqdm(scorer.score(model, items), total=len(items), desc="reference"))
    sums = [found[index].logprob + (found[index].logprob_eos or 0.0) for index in range(len(items))]
    for example, value in zip(examples.examples, sums, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"the reference {name} gives {example.doc_id} ({example.category}) the log-prob "
                f"{value}. Look at its weights."
            )
    return sums


def _continuation(example: Example) -> Continuation:
    start = len(example.labels) - example.num_tokens
    ids = example.input_ids
    return Continuation(ids[:start], ids[start:-1], ids[-1])


@contextmanager
def _unsharded() -> Iterator[None]:
    """Have transformers load whole models inside of the block: under ZeRO-3 it would give each rank
    a share, and wait for all of them."""
    config = hf_deepspeed.deepspeed_config()
    # private: a weak reference to the Trainer's own object, which the public setter would need
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    if config is not None:
        hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept
