"""A local transformers model, which needs no server and no key and costs nothing."""

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from sft_probe.errors import UserError
from sft_probe.models import EMBEDDED_MODEL, continue_prompts, load_model, load_tokenizer
from sft_probe.prompts import encode
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.writers import in_thread

BATCH_SIZE = 16
CONCURRENCY = 4 * BATCH_SIZE
"""Concurrency for `ask_all`, large enough for batches of texts of similar length."""
_GATHER_S = 0.05
_NEXT_TURNS = ("\n\nHuman:", "\n\nAssistant:")
_SENTENCES = re.compile(r"[\s\S]*[.!?][\"')\]]*(?=\s)")
Pending = tuple[Request, "asyncio.Future[Answer]"]


class HfWriter:
    """Writes in float32 and in batches.

    A request with temperature 0 is decoded greedily. Sampling is seeded by the prompts of a batch,
    so that it repeats only where the batches do; the store is what makes a set reproducible.

    Args:
        model: a hub id, a path, or the embedded model.
        is_chat: whether the prompt is a user's turn in the model's chat template. Otherwise the
            prompt is continued as it is, up to the model's end, another HH turn or the last full
            sentence.

    Raises:
        UserError: the model does not exist, or has no chat template or no EOS token.
    """

    name = "hf"

    def __init__(self, model: str = EMBEDDED_MODEL, *, is_chat: bool = True) -> None:
        self.model = model
        self.api_version = "float32, chat template" if is_chat else "float32, continuation"
        self.tokenizer: Any = load_tokenizer(model)
        self._is_chat = is_chat
        self._model: Any = None
        self._pending: list[Pending] = []
        if is_chat and not self.tokenizer.chat_template:
            lack = f"the model {model!r} has no chat template, so it cannot follow instructions"
            raise UserError(f"{lack}. Choose another --model.")
        if self.tokenizer.eos_token_id is None:
            lack = f"the tokenizer of {model!r} has no EOS token, so no answer would end"
            raise UserError(f"{lack}. Choose another --model.")

    async def write(self, request: Request) -> Answer:
        """Write one text, in a batch with those requested at the same moment."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending.append((request, future))
        if len(self._pending) == 1:
            self._task = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        """Free the model, which is loaded again when needed."""
        self._model = None
        self._pending.clear()

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER_S)  # until callers with earlier answers have asked again
        while self._pending:
            # a batch takes as long as its longest text
            self._pending.sort(key=lambda item: _token_budget(item[0]))
            batch = self._pending[:BATCH_SIZE]
            try:
                answers = await in_thread(self._generate, [request for request, _ in batch])
            except Exception as error:  # raised in every caller
                for _, future in self._pending:
                    if not future.done():
                        future.set_exception(error)
                self._pending.clear()
                return
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
            await asyncio.sleep(_GATHER_S)
            del self._pending[: len(batch)]

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        if self._model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = load_model(self.model, "float32").to(device)
        prompts = [self._prompt_ids(request.prompt) for request in requests]
        temperature = requests[0].temperature
        key = "\n".join(f"{request.sample_index} {request.prompt}" for request in requests)
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        sampling |= {"temperature": temperature} if temperature else {}
        eos = self.tokenizer.eos_token_id
        limit = max(map(_token_budget, requests))
        texts = continue_prompts(
            self._model, prompts, pad=eos, max_new_tokens=limit, pad_token_id=eos, **sampling
        )
        pairs = zip(requests, prompts, texts, strict=True)
        return [self._answer(request, len(prompt), new) for request, prompt, new in pairs]

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not self._is_chat:
            return encode(self.tokenizer, prompt)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return encode(self.tokenizer, text)

    def _answer(self, request: Request, num_prompt_tokens: int, new: list[int]) -> Answer:
        ids = self._model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *([ids] if isinstance(ids, int) else ids or [])}
        length = next((number for number, token_id in enumerate(new) if token_id in ends), None)
        kept = new[: min(_token_budget(request), len(new) if length is None else length)]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        is_finished = length is not None and length <= _token_budget(request)
        if not self._is_chat:
            cut = min((at for at in map(text.find, _NEXT_TURNS) if at >= 0), default=None)
            text, is_finished = text[:cut], is_finished or cut is not None
            if not is_finished and (sentences := _SENTENCES.match(text)):
                text, is_finished = sentences[0], True
        return Answer(
            status="ok" if is_finished else "truncated",
            raw=json.dumps({"ids": kept, "text": text}),
            text=text.strip(),
            reason=None if is_finished else f"no end within {_token_budget(request)} tokens",
            model_version=self.model,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=len(kept),
        )


def _token_budget(request: Request) -> int:
    """Return the output limit of a small model, which may never end by itself.

    Three tokens per word are enough for a text that passes the checks.
    """
    return min(request.max_output_tokens, 3 * request.num_words + 32)
