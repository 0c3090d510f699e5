"""Ctrl-C and SIGTERM end a run after the current step, with all whole iterations saved; a second one, at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_active: ContextVar[Interruption | None] = ContextVar("interruption", default=None)


class Interrupted(KeyboardInterrupt):
    """The user, or the machine's scheduler, wants the run to end; its state is saved."""


class Interruption:
    """A context that turns the first signal into ``requested`` and lets the second one through.

    Once it is requested, ``between`` is called at every ``check`` of the code inside; it may raise ``Interrupted``.
    """

    def __init__(self, announce: Callable[[str], None], between: Callable[[], None] = lambda: None) -> None:
        self.announce, self.between, self.requested = announce, between, False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self.outer = _active.set(self)
        # Python hands signals to the main thread only
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.request) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _active.reset(self.outer)
        self.restore()

    def restore(self) -> None:
        """Lets signals do what they did before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first signal."""
        self.requested = True
        self.restore()
        self.announce("stopping and saving; once more to stop at once")


def check() -> None:
    """Called between two steps of a rollout or an update: what was asked for by a signal is done here."""
    if (interruption := _active.get()) and interruption.requested:
        interruption.between()


def pause(seconds: float) -> None:
    """Sleeps in the midst of an iteration that can't go on, such as without a reward server.

    Raises:
        Interrupted: as soon as a signal asks the run to end: this iteration will not be finished.
    """
    end, interruption = time.monotonic() + seconds, _active.get()
    while (left := end - time.monotonic()) > 0:
        if interruption and interruption.requested:
            raise Interrupted("stopped while waiting")
        time.sleep(min(left, 0.1))
