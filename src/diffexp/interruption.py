"""Ctrl-C and SIGTERM end a run after the current iteration, with everything saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user, or the machine's scheduler, wants the run to end; its state is saved."""


class Interruption:
    """A context that turns the first signal into ``requested`` and lets the second one through."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce, self.requested = announce, False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # Python hands signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.request) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first signal."""
        self.requested = True
        self.__exit__(None, None, None)
        self.announce("finishing the iteration, then saving; once more to stop at once")
