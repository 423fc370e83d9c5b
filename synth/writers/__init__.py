"""Writers of texts, one module each; `sft_probe.synth.asking.protocol.Writer` is their protocol."""

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_FLASH_LITE = re.compile(r"gemini-(?:[3-9]|\d\d)[\d.]*-flash-lite")
_LEAST: tuple[tuple[str, dict[str, int | str], int], ...] = (
    (r"gemini-2\.5-flash(?!-lite)", {"thinkingBudget": 0}, 0),
    (r"gemini-2\.5-pro", {"thinkingBudget": 128}, 128),
    (r"gemini-(?:[3-9]|\d\d)[\d.]*-pro", {"thinkingLevel": "low"}, 1024),
    (r"gemini-(?:[3-9]|\d\d)[\d.]*-flash", {"thinkingLevel": "minimal"}, 256),
)
_UNLIMITED_TOKENS = 2048


@dataclass(frozen=True)
class Thinking:
    """What a model is told about thoughts, and the room that is left to them."""

    config: dict[str, int | str]
    """`thinkingConfig` of the API; empty where nothing is said."""
    num_tokens: int
    """Added to the output limit of each text."""


NO_THINKING = Thinking({}, 0)


def least_thinking(writer: str, model: str) -> Thinking:
    """Return the least thinking that the API allows for a model of Gemini; nothing for all
    others."""
    name = model.removeprefix("models/")
    if not writer.startswith("gemini") or _FLASH_LITE.match(
        name
    ):  # flash-lite thinks least by itself
        return NO_THINKING
    for pattern, config, num_tokens in _LEAST:
        if re.match(pattern, name):
            if writer == "gemini-legacy":  # its package knows nothing of thoughts
                return Thinking({}, _UNLIMITED_TOKENS)
            return Thinking(config, num_tokens)
    return NO_THINKING


def key_version(api_version: str, writer: str, model: str) -> str:
    """Return what stands for the API in the key of an answer: thoughts change what is written."""
    config = least_thinking(writer, model).config
    return ", ".join([api_version, *(f"{name} {value}" for name, value in config.items())])


_T = TypeVar("_T")


async def in_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """Await a call in a thread of its own. A thread of an executor would be joined at exit, for
    ever if it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled: nobody waits any more
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, caught = None, None
        try:
            result = function(*arguments)
        except BaseException as error:  # it belongs to the caller
            caught = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, caught)

    threading.Thread(target=run, daemon=True, name="writer").start()
    return await future
