"""lm-eval's `hf` model with the one scorer of `sft_probe.scoring.score`: `--model sft_probe`."""

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - lm-eval loads its own models only while none is registered
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tqdm import tqdm

from sft_probe.adapters import attach_adapter, check_adapter
from sft_probe.errors import UserError, first_few
from sft_probe.malloc import keep_freed_memory
from sft_probe.models import code_refused, local_folder, needs_code
from sft_probe.prompts import Prompt, encode_pair, joins_in_use, no_pair_reason, terminator_id
from sft_probe.scoring.packing import Continuation
from sft_probe.scoring.score import (
    FittingScorer,
    Reference,
    Score,
    choose_mode,
    default_max_tokens,
)
from sft_probe.scoring.targets import Distances, TokenColumns
from sft_probe.tasks.cache import bind_cache

log = logging.getLogger(__name__)

_MAX_NAMED = 10


class ProbeScore(tuple[float, bool]):
    """lm-eval's `(logprob, is_greedy)`, with what it has no place for; log-probs in nats. Pickles
    with all of it."""

    num_tokens: int
    """Of the continuation, without the terminator."""
    token_logprobs: list[float]
    """[num_tokens]"""
    logprob_eos: float | None
    """Of the terminator after the continuation; `None` where none was scored."""
    is_finite: bool
    """False where the model gave NaN or an infinity."""
    token_columns: TokenColumns | None = None
    """More of each token; `None` where it was not asked for."""
    distances: Distances | None = None
    """How far the model is from a reference; `None` without one."""

    @classmethod
    def of(cls, score: Score) -> "ProbeScore":
        """Return what lm-eval is given for a score."""
        result = cls((score.logprob, score.is_greedy))
        result.num_tokens = len(score.token_logprobs)
        result.token_logprobs = score.token_logprobs.tolist()
        result.logprob_eos = score.logprob_eos
        result.is_finite = score.is_finite
        result.token_columns = score.columns
        result.distances = score.distances
        return result


class NonFiniteError(UserError):
    """The model gave NaN or infinite log-probs for some requests; the others are scored."""

    def __init__(self, faults: list[Instance], scored: list[tuple[Instance, ProbeScore]]) -> None:
        names = first_few(
            (f"{_name(request)}: NaN or infinite logits" for request in faults), _MAX_NAMED, "\n"
        )
        super().__init__(
            f"{len(faults)} of {len(faults) + len(scored)} requests have no log-prob:\n{names}"
        )
        self.faults = faults
        self.scored = scored


@register_model("sft_probe")
class ProbeLM(HFLM):
    """`hf`, except that every distinct prefix of all requests is computed once and sums are never
    of 16-bit numbers.

    `loglikelihood` returns `ProbeScore`s. Tasks named `sft_probe*` have the terminator of their
    prompt format scored too. What it does not override, such as generation, is `hf`.

    Args:
        max_tokens: how many tokens one forward pass reads; default: 16,384 on a GPU, 1,024 on a
            CPU. Halved where memory runs out.
        token_columns: probe tasks also get `ProbeScore.token_columns`.
        **arguments: those of `hf`; `batch_size` is for generation alone.

    Raises:
        UserError: an encoder-decoder, mixed precision, code that comes with a model, or an adapter
            that does more than change layers is asked for.
    """

    def __init__(
        self, *, max_tokens: int | None = None, token_columns: bool = False, **arguments: Any
    ) -> None:
        if arguments.pop("trust_remote_code", False):
            raise UserError(
                "trust_remote_code: the model sft_probe never runs code that comes with a model; "
                "use hf."
            )
        given = arguments["pretrained"]
        if isinstance(given, str):
            self._load(arguments)
        else:
            super().__init__(**arguments | {"pretrained": _Untouched(given)})
            self._model = (
                given.eval()
            )  # and no other reference: its memory is needed for the next one
        if self.backend != "causal" or self.mixed_precision_dtype is not None:
            raise UserError("the model sft_probe scores decoder-only models in one dtype; use hf.")
        if isinstance(self.model, PeftModel):
            check_adapter(self.model, str(arguments.get("peft") or "the model"))
        self.scorer = FittingScorer(
            max_tokens or default_max_tokens(str(self.device)), self.max_length
        )
        self.token_columns = token_columns
        self.reference: Reference | None = None
        """Probe tasks also get `ProbeScore.distances` from it."""
        if torch.device(self.device).type == "cpu":
            keep_freed_memory()
            if self.model.dtype.itemsize < 4 and torch.backends.cpu.get_cpu_capability() == "AVX2":
                log.warning(
                    "this CPU multiplies no 16-bit matrices: expect %s to be slow", self.model.dtype
                )
        self._modules = _module_types(self.model)
        self._ids: dict[tuple[str, str, str], tuple[list[int], list[int]]] = {}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a cache of answers (`--use_cache`). Raises `UserError` where it holds those of
        another model."""
        bind_cache(cache_hook.dbdict, self.model, max_length=self.max_length)
        super().set_cache_hook(cache_hook)

    def _load(self, arguments: dict[str, Any]) -> None:
        """Let `hf` load the model, except for its adapter, and keep the weights as the files hold
        them."""
        try:
            super().__init__(**arguments, trust_remote_code=False)
        except ValueError as error:
            if needs_code(error):
                raise code_refused("model", arguments["pretrained"]) from error
            raise
        del self._model.tie_weights

    def _create_model(self, *args: Any, peft: str | None = None, **arguments: Any) -> None:
        super()._create_model(*args, **arguments)
        if peft:  # `hf` would cut or pad the vocabulary to the tokenizer's first
            self._model = attach_adapter(
                self._model, local_folder(peft, arguments.get("revision") or "main")
            )
        # `hf` ties the weights next, also those that transformers has left apart because the files
        # hold them so
        self._model.tie_weights = lambda: None

    def use(self, model: Any) -> None:
        """Replace the model by another one of the same architecture, or by none; token ids stay
        cached."""
        self._model = model
        if model is None:
            return
        modules = _module_types(model)
        # another adapter's layers may not take the masks, and weights with NaN in them fail the
        # check for all others
        if modules != self._modules or (
            self.scorer.mode is not None and not self.scorer.mode.shared
        ):
            self.scorer.mode = None
        self._modules = modules

    def compare_with(self, model: Any) -> None:
        """Give probe tasks the distance from another model of the same token ids, which stays.

        Raises:
            UserError: it has another number of logits.
        """
        sizes = [item.config.get_text_config().vocab_size for item in (self.model, model)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the reference has {sizes[1]} logits and the model {sizes[0]}: no divergence is "
                "defined between them. Use a reference of the same vocabulary."
            )
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.reference = Reference(model=inner, mode=choose_mode(inner, self.max_length))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[ProbeScore]:
        """Score all requests, in one go.

        Raises:
            UserError: a continuation is empty or longer than the window; nothing is scored.
            NonFiniteError: after all others are scored.
        """
        pairs = [self._encode(request) for request in requests]
        terminators = [self._terminator(request) for request in requests]
        self._check(requests, pairs, terminators)
        items = [self._fit(*pair, end) for pair, end in zip(pairs, terminators, strict=True)]
        if num_cut := sum(
            len(item.prefix_ids) < len(ids) for item, (ids, _) in zip(items, pairs, strict=True)
        ):
            log.warning(
                "contexts cut on the left, to max_length %d: %d of %d",
                self.max_length,
                num_cut,
                len(items),
            )
        is_probe = any(map(_is_probe, requests))
        self.scorer.with_columns = self.token_columns and is_probe
        self.scorer.reference = self.reference if is_probe else None
        results: dict[int, ProbeScore] = {}
        for index, result in self._score(items, disable_tqdm):
            results[index] = result
            if result.is_finite:
                self.cache_hook.add_partial("loglikelihood", requests[index].args, result)
        self.scorer.reference = None  # whatever else it scores has none
        ordered = [results[i] for i in range(len(requests))]
        answered = list(zip(requests, ordered, strict=True))
        if faults := [request for request, result in answered if not result.is_finite]:
            raise NonFiniteError(faults, [pair for pair in answered if pair[1].is_finite])
        return ordered

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,  # noqa: ARG002 - the token budget counts
    ) -> list[ProbeScore]:
        """Score windows of token ids, which is what `loglikelihood_rolling` calls."""
        results = dict(
            self._score(
                [self._fit(context, ids, None) for _, context, ids in requests], disable_tqdm
            )
        )
        return [results[i] for i in range(len(requests))]

    def _encode(self, request: Instance) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation: those of the format's join rule for probe
        tasks, else as in `hf`."""
        context, continuation = request.args
        rule = str(request.doc["prompt_format"]) if _is_probe(request) else ""
        key = (context, continuation, rule)
        if key not in self._ids:
            if rule and context:
                self._ids[key] = self._join(context, continuation, rule)
            elif context:
                self._ids[key] = self._encode_pair(context, continuation)
            else:
                ids = self.tok_encode(continuation, add_special_tokens=False)
                has_prefix = ids[:1] == [self.prefix_token_id]
                self._ids[key] = (ids[:1], ids[1:]) if has_prefix else ([self.prefix_token_id], ids)
        return self._ids[key]

    def _join(
        self, context: str, continuation: str, format_name: str
    ) -> tuple[list[int], list[int]]:
        """Return ids under the rule that training and live probe have; no continuation where it
        finds no split."""
        text, response = context.rstrip(), continuation.lstrip()
        separator = context[len(text) :] + continuation[: len(continuation) - len(response)]
        prompt = Prompt(text, separator)
        return encode_pair(self.tokenizer, prompt, response, in_use=joins_in_use(format_name)) or (
            [],
            [],
        )

    def _terminator(self, request: Instance) -> int | None:
        if not _is_probe(request):
            return None
        return terminator_id(request.doc["prompt_format"], self.tokenizer)

    def _check(
        self,
        requests: list[Instance],
        pairs: list[tuple[list[int], list[int]]],
        terminators: list[int | None],
    ) -> None:
        faults = []
        for request, (_, ids), end in zip(requests, pairs, terminators, strict=True):
            num_tokens = len(ids) + (end is not None)
            if not ids and _is_probe(request):
                reason = no_pair_reason(joins_in_use(request.doc["prompt_format"]))
                faults.append(
                    f'{_name(request)}: {reason}; name the tokenizer: --metadata \'{{"tokenizer": '
                    f'"..."}}\''
                )
            elif not ids:
                faults.append(
                    f"{_name(request)}: no token is left of the continuation {request.args[1]!r}"
                )
            elif num_tokens > self.max_length:
                faults.append(
                    f"{_name(request)}: {num_tokens} tokens to predict, over max_length "
                    f"{self.max_length}"
                )
        if faults:
            raise UserError(
                f"{len(faults)} of {len(requests)} requests cannot be scored:\n"
                + first_few(faults, _MAX_NAMED, "\n")
            )

    def _fit(self, context_ids: list[int], ids: list[int], end: int | None) -> Continuation:
        """Cut the context on the left where the window is too short, as `hf` does."""
        return Continuation(context_ids[-(self.max_length + (end is None) - len(ids)) :], ids, end)

    def _score(
        self, items: list[Continuation], disable_tqdm: bool
    ) -> Iterator[tuple[int, ProbeScore]]:
        """Return the scores of `items` by index."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        scores = self.scorer.score(model, items)
        is_shown = sys.stderr.isatty() and not disable_tqdm and self.rank == 0
        for index, result in tqdm(scores, total=len(items), desc="scoring", disable=not is_shown):
            yield index, ProbeScore.of(result)


def _is_probe(request: Instance) -> bool:
    return (request.task_name or "").startswith("sft_probe")


class _Untouched:
    """All that `HFLM.__init__` may know of a model that it is handed: it would tie the weights of
    the model itself."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.device = model.device
        self.name_or_path = (
            model.config._name_or_path
        )  # whose tokenizer it takes where none is given


def _module_types(model: Any) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def _name(request: Instance) -> str:
    doc_id = (
        request.doc.get("doc_id", request.doc_id)
        if isinstance(request.doc, dict)
        else request.doc_id
    )
    return f"{request.task_name}, doc {doc_id}"
