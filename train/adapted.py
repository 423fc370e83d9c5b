"""Scores of a model with a PEFT adapter: through the whole adapted model, whatever the adapter adds
to it.

A LoRA and its like replace layers of the base model, whose own `forward` is then the adapted one.
Other adapters act in `PeftModel.forward` alone: learned prompts and prefixes, activated LoRA,
routers. Those are scored there.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftMixedModel, PeftModel

from sft_probe.errors import UserError
from sft_probe.scoring.packing import Item
from sft_probe.scoring.score import FittingScorer, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_LAYERS = (
    "LORA",
    "ADALORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "VERA",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
)
"""Types whose layers compute each token by itself, in the base model's own forward, so that
prefixes can be shared."""


def inner_model(model: Any) -> "PreTrainedModel":
    """Return the causal LM inside an adapted model, with the adapter's layers in it; any other
    model as it is."""
    if isinstance(model, PeftMixedModel):
        model = model.base_model.model
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def adapter_type(model: Any) -> str | None:
    """Return the PEFT type of a model, in the letters of PEFT; `None` for a model without an
    adapter."""
    if isinstance(model, PeftMixedModel):
        return "MIXED"
    return str(model.active_peft_config.peft_type.value) if isinstance(model, PeftModel) else None


def num_virtual_tokens(model: Any) -> int:
    """Return the number of learned positions that stand before every prompt."""
    is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return int(model.active_peft_config.num_virtual_tokens) if is_prompt else 0


def score_adapted(
    scorer: FittingScorer, model: Any, items: Sequence[Item]
) -> Iterator[tuple[int, Score]]:
    """Score items as `scorer.score` does, through the adapter if the model has one.

    Raises:
        UserError: the adapter cannot score a text on its own (it needs a task id, for instance);
        its type is named.
    """
    if adapter_type(model) is None or _is_in_layers(model):
        yield from scorer.score(inner_model(model), items)
        return
    try:
        yield from _score_whole(model, items)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError) as error:
        raise UserError(
            f"a model with the adapter {adapter_type(model)} cannot be scored: its forward pass "
            "failed "
            f"({type(error).__name__}: {error}). Train without the probe, or use another adapter."
        ) from error


def _is_in_layers(model: Any) -> bool:
    if isinstance(model, PeftMixedModel) or len(model.active_adapters) != 1:
        return False
    config = model.active_peft_config
    # an activated LoRA acts from its invocation tokens on, and Arrow routes between adapters
    acts_outside = any(
        getattr(config, name, None) is not None
        for name in ("alora_invocation_tokens", "arrow_config")
    )
    return config.peft_type.value in _IN_LAYERS and not acts_outside


def _score_whole(model: Any, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
    """Yield the score of each item from a forward pass of its own through the whole adapted
    model."""
    with torch.no_grad():
        for index, item in enumerate(items):
            input_ids = torch.tensor([item.input_ids], device=model.device)
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[0]
            targets = torch.tensor(item.target_ids, device=logits.device)
            rows = logits[-len(targets) :].float()  # virtual tokens stand before the prompt
            chosen = rows.gather(1, targets[:, None])[:, 0]
            logprobs = (chosen - rows.logsumexp(dim=-1)).cpu().numpy()
            greedy = (chosen == rows.amax(dim=-1)).cpu().numpy()
            num_tokens = len(item.continuation_ids)
            has_end = item.terminator_id is not None
            yield (
                index,
                Score(
                    token_logprobs=logprobs[:num_tokens],
                    greedy_tokens=greedy[:num_tokens],
                    logprob_eos=float(logprobs[num_tokens]) if has_end else None,
                ),
            )
