"""Calls that block, in threads that do not keep the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

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
