"""Processes of one run watch each other: one that dies or stands still ends all of them, and is named.

Every rank counts seconds in the store that the ranks met at, and watches the count of the next rank. It does so on
threads of its own: however long a reward or an evaluation takes, the count goes on; a process that was killed or
stopped counts no more. The first to notice leaves the verdict in the store, where all the others find it a second
later. That needs no time limit on the work itself, and works wherever the ranks run.

Every call to the store waits for as long as the process that holds it stands still. None is therefore made on the
thread that judges, nor on the main one before the judge is there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from diffexp.errors import GOES_ON, Lost, first_line
from diffexp.processes.patience import MEETING, silent

BEAT = 1.0  # seconds


class Heartbeat:
    """This rank's sign of life, and its look at the next rank's. After ``patience`` seconds of silence the run ends.

    A rank that has not counted yet may still be starting, and has longer; one whose store is silent is silent itself.
    ``rescue`` is called before a process is ended from here: it saves what is worth saving.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float) -> None:
        self.store, self.rank, self.size, self.patience = store, rank, size, patience
        self.watched = (rank + 1) % size
        self.rescue: Callable[[], None] = lambda: None
        self.verdict, self.silence, self.unanswered = "", 0.0, 0.0
        self.begun = False
        self.over = Event()
        guarding = Thread(target=self.guard, name="heartbeat-guard", daemon=True)
        self.pulsing = Thread(target=self.pulse, name="heartbeat-pulse", daemon=True)
        guarding.start()
        # whoever has met the others has counted: one that then stops at once is lost, not about to start
        with suppress(RuntimeError):  # a store that is gone is the pulse's to find
            self.count()
        self.pulsing.start()

    def pulse(self) -> None:
        """Counts, and reads. Where the store is stopped this never returns, so that another thread has to judge."""
        last = -1
        try:
            # a connection of its own: the ranks' main threads wait for each other on the one they met at
            self.store = self.store.clone()
            while True:
                self.count()
                beats = self.store.add(f"beats of {self.watched}", 0)
                if self.store.check(["verdict"]):
                    self.verdict = self.store.get("verdict").decode()
                self.unanswered = 0.0
                if beats != last:
                    last, self.silence = beats, 0.0
                self.begun = beats > 0
                if self.over.wait(BEAT):
                    break
        except RuntimeError:
            self.verdict = self.verdict or f"process 0 of {self.size}, or its machine, is gone"

    def count(self) -> None:
        """A sign of life."""
        self.store.add(f"beats of {self.rank}", 1)

    def guard(self) -> None:
        """Ends this process when another one is lost.

        Silence is counted in this thread's own seconds: a run that was suspended as a whole blames nobody afterwards.
        """
        while not self.over.wait(BEAT):
            # the others have most often met the same error, and are about to say so themselves
            if self.verdict and not self.over.wait(min(5 * BEAT, self.patience)):
                self.end()
            self.silence, self.unanswered = self.silence + BEAT, self.unanswered + BEAT
            limit = self.patience if self.begun else MEETING
            if self.silence > limit or self.unanswered > self.patience:
                # a store that does not answer is process 0's, or its launcher's
                answers = self.unanswered < self.patience / 2
                whom, how_long = (self.watched, limit) if answers else (0, self.patience)
                self.verdict = silent(whom, self.size, how_long)
                if answers:
                    self.tell(self.verdict)
                self.end()

    def end(self) -> None:
        """Ends this process from a thread: the main one waits for somebody who will not answer."""
        self.rescue()
        print(f"error: {self.verdict}; {GOES_ON}", file=sys.stderr, flush=True)
        os._exit(Lost.exit_code)

    def tell(self, verdict: str) -> None:
        """Leaves the reason why the run ends, for all ranks; a store that does not answer keeps nobody from ending."""

        def leave_word() -> None:
            with suppress(RuntimeError):
                self.store.set("verdict", verdict)

        teller = Thread(target=leave_word, name="heartbeat-tell", daemon=True)
        teller.start()
        teller.join(self.patience)

    def reason(self, otherwise: str) -> str:
        """Why another process does not answer, as far as is known a moment later."""
        for _ in range(3):
            if self.verdict or self.over.wait(BEAT):
                break
        return self.verdict or otherwise

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the watch: this rank is done, or has failed, which the others are told."""
        if not self.over.is_set():
            self.over.set()
            if error and not isinstance(error, Lost):
                self.tell(f"process {self.rank} of {self.size} failed: {first_line(error)}")
            # an interpreter that ends while a thread is in the store's C++ aborts the process
            self.pulsing.join(2 * BEAT)
