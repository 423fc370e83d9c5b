"""Writers of texts: which there are, how each is made, and how little its model may think."""

import asyncio
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sft_probe.errors import UserError
from sft_probe.synth.options import SynthRun

if TYPE_CHECKING:
    from sft_probe.synth.asking.batch import BatchWriter
    from sft_probe.synth.asking.protocol import Writer, WriterId

    AnyWriter = Writer | BatchWriter

_LOG = logging.getLogger(__name__)
EMBEDDED_WRITER = "smollm2-135m-instruct-q4_1"
_GEMINI = "gemini-3.5-flash-lite"
_MODELS = {
    "hf": EMBEDDED_WRITER,
    "gemini": _GEMINI,
    "gemini-legacy": _GEMINI,
    "gemini-batch": _GEMINI,
    "offline": "helpful-mini",
}
_LEAST: tuple[tuple[str, dict[str, int | str], int], ...] = (
    (r"gemini-(?:[3-9]|\d\d)[\d.]*-flash-lite", {}, 0),  # its default is the least
    (r"gemini-2\.5-flash(?!-lite)", {"thinkingBudget": 0}, 0),
    (r"gemini-2\.5-pro", {"thinkingBudget": 128}, 128),
    (r"gemini-(?:[3-9]|\d\d)[\d.]*-pro", {"thinkingLevel": "low"}, 1024),
    (r"gemini-(?:[3-9]|\d\d)[\d.]*-flash", {"thinkingLevel": "minimal"}, 256),
)
_UNLIMITED_TOKENS = 2048
_T = TypeVar("_T")


class Thinking(NamedTuple):
    """Limits of a model's thoughts, which are billed as output and leave less room for the text."""

    config: dict[str, int | str]
    """`thinkingConfig` of the API; empty for the model's own default."""
    num_tokens: int
    """Tokens to add to the output limit of each text."""


def make_writer(options: SynthRun) -> "AnyWriter":
    """Return the writer that the options name.

    Raises:
        UserError: its package, key or model is missing.
    """
    name, model, url = str(options.writer), model_of(options), options.base_url
    try:
        match name:
            case "offline":
                from sft_probe.synth.writers.offline import OfflineWriter

                return OfflineWriter()
            case "hf":
                from sft_probe.synth.writers.hf import HfWriter

                return HfWriter(model)
            case "openai":
                from sft_probe.synth.writers.openai import OpenAIWriter

                return OpenAIWriter(model, base_url=url)
            case "gemini-legacy":
                from sft_probe.synth.writers.gemini_legacy import LegacyGeminiWriter

                return LegacyGeminiWriter(model, base_url=url)
            case _:
                from sft_probe.synth.writers.gemini import GeminiBatchWriter, GeminiWriter

                make = GeminiBatchWriter if name == "gemini-batch" else GeminiWriter
                return make(model, base_url=url)
    except ImportError as error:
        extra = name.replace("gemini-batch", "gemini")
        raise UserError(
            f"--writer {name} needs more packages ({error}). Run:  pip install 'sft-probe[{extra}]'"
        ) from error


def name_writer(options: SynthRun) -> "WriterId":
    """Return what identifies a writer, without its key or package."""
    name = str(options.writer)
    if name in ("hf", "offline"):
        return make_writer(options)
    model = model_of(options)
    api_version = "v1" if name == "openai" else key_version("v1beta", name, model)
    return SimpleNamespace(name=name, model=model, api_version=api_version)


def model_of(options: SynthRun) -> str:
    """Return the model of a writer. Raise `UserError` where it must be given and is not."""
    model = options.model or _MODELS.get(str(options.writer))
    if model is None:
        raise UserError(f"--writer {options.writer} needs --model.")
    return model


def thinking_tokens(options: SynthRun) -> int:
    """Return the room for thoughts, and log what is requested of a model that thinks."""
    model = model_of(options)
    thinking = least_thinking(str(options.writer), model)
    num_tokens = int(options.thinking_tokens or thinking.num_tokens)
    if thinking.config or num_tokens:
        parts = [f"{name} {value}" for name, value in thinking.config.items()]
        parts += [f"{num_tokens} more tokens in the output limit"] if num_tokens else []
        _LOG.info("%s thinks before it writes; requests have %s", model, ", ".join(parts))
    return num_tokens


def least_thinking(writer: str, model: str) -> Thinking:
    """Return the least thinking that the API allows for a Gemini model; nothing for all others."""
    name = model.removeprefix("models/")
    for pattern, config, num_tokens in _LEAST if writer.startswith("gemini") else ():
        if re.match(pattern, name):
            if config and writer == "gemini-legacy":  # its package cannot limit thoughts
                return Thinking({}, _UNLIMITED_TOKENS)
            return Thinking(config, num_tokens)
    return Thinking({}, 0)


def key_version(api_version: str, writer: str, model: str) -> str:
    """Return the API version for the key of an answer, with the thinking, which changes texts."""
    config = least_thinking(writer, model).config
    return ", ".join([api_version, *(f"{name} {value}" for name, value in config.items())])


async def in_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """Await a blocking call in a thread of its own, which may outlive the process's end.

    A thread of an executor would be joined at exit, forever if it hangs.
    """
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()  # who gives up waiting does not cancel it
    context = copy_context()

    def run() -> None:
        try:
            result = context.run(function, *arguments)
        except BaseException as error:  # raised again where the call is awaited
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True, name="writer").start()
    return await asyncio.wrap_future(future)
