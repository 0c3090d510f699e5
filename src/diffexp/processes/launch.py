"""Starts a run's processes on this machine, and ends all of them when one fails."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import IO

from diffexp.errors import GOES_ON, Lost, UserError
from diffexp.processes.patience import patience, silent

INTERRUPTED = 130  # the exit code of a run that was asked to stop
NOTICE = 10.0  # seconds, besides the patience, for the others to notice that one failed, to save, and to end
TICK = 0.1  # seconds between two looks at the processes
GRACE = 5.0  # seconds between asking the remaining processes to end and ending them
ERROR = "error: "  # what the line of a user's error begins with; this process prints one for all


def program() -> list[str]:
    """Python at diffexp. Not with the working folder among its imports: that may be a run from a stranger."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", "diffexp"]
    alone = "import runpy, sys; sys.path.remove(''); runpy.run_module('diffexp', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", alone]


class Rank:
    """One process, told its place as torchrun would. What it says is passed on, and its last words are kept."""

    def __init__(self, rank: int, size: int, where: int, arguments: Sequence[str]) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where}
        # torch's own account of a lost connection is a page of addresses for each process
        environment = {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **os.environ,
            **{key: str(value) for key, value in place.items()},
        }
        self.process = subprocess.Popen(  # noqa: S603
            [*program(), *arguments], env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.last_words, self.stood = "", 0.0  # seconds for which it has been stopped, while others were not
        self.listener = Thread(target=self.listen, args=(self.process.stderr,), daemon=True)
        self.listener.start()

    def listen(self, stream: IO[str]) -> None:
        """Passes on what the process writes to its standard error, but for the line of a user's error."""
        with stream:
            for line in stream:
                self.last_words = line.strip() or self.last_words
                if not line.startswith(ERROR):
                    sys.stderr.write(line)

    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll()

    def stopped(self) -> bool:
        """Whether it is stopped, as by SIGSTOP, which no exit code tells. Where the system does not say: no."""
        if not hasattr(os, "waitid") or self.code() is not None:
            return False
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # it has ended since
            return False

    def words(self) -> str:
        """The last line that it said, without what marks it as an error, and as whose."""
        self.listener.join(1.0)
        return re.sub(rf"^(\[rank\d+\]: )?({ERROR})?", "", self.last_words)

    def obituary(self) -> str:
        """How it ended, and the last that it said."""
        code, words = self.code(), self.words()
        how = "did not end" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {words}" if words else how


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Runs ``diffexp ARGUMENTS`` in so many processes that know of each other, and waits for all of them.

    Raises:
        UserError: if one of them fails; the others are ended, and the run can be continued.
    """
    seconds, where = patience(), port()
    ranks = [Rank(rank, processes, where, arguments) for rank in range(processes)]
    previous = signal.signal(signal.SIGTERM, lambda *_: [rank.process.terminate() for rank in ranks])
    try:
        failed = watch(ranks, seconds)
        still = [rank.stood > seconds for rank in ranks]
    finally:
        signal.signal(signal.SIGTERM, previous)
        end(ranks)
    if failed is None and True in still:
        raise UserError(f"{silent(still.index(True), processes, seconds)}; {GOES_ON}")
    if failed is None:
        return
    if ranks[failed].code() == INTERRUPTED:
        raise KeyboardInterrupt
    if ranks[failed].code() == Lost.exit_code:
        raise UserError(ranks[failed].words())
    ended = f"process {failed} of {processes} failed ({ranks[failed].obituary()}); the others were ended"
    killed = (ranks[failed].code() or 0) < 0  # after an error of its own, the same command would end the same way
    raise UserError(f"{ended}; {GOES_ON}" if killed else ended)


def watch(ranks: Sequence[Rank], seconds: float) -> int | None:
    """The rank to blame once one has failed, or None when all have ended well, or at most stand still.

    After the first has failed, or stood still for ``seconds``, the others have as long again, and ``NOTICE``, to
    notice, to save, and to end by themselves; after the user's own wish to stop, as long as they need.
    """
    deadline = float("inf")
    while time.monotonic() < deadline:
        with suppress(KeyboardInterrupt):  # Ctrl-C reached the processes too: they save and end
            codes = [rank.code() for rank in ranks]
            look(ranks)
            still = [rank.stood > seconds for rank in ranks]
            if all(code is not None or stands for code, stands in zip(codes, still, strict=True)):
                break
            if deadline == float("inf") and (any(still) or not {None, 0, INTERRUPTED}.issuperset(codes)):
                deadline = time.monotonic() + seconds + NOTICE
            time.sleep(TICK)
    return blamed([rank.code() for rank in ranks])


def look(ranks: Sequence[Rank]) -> None:
    """Counts for how long a process stands still. The ranks see that too, but not before they have met.

    It is counted in looks: a run that was suspended as a whole, with or without this process, blames nobody afterwards.
    """
    stopped = [rank.stopped() for rank in ranks]
    for rank, still in zip(ranks, stopped, strict=True):
        rank.stood = rank.stood + TICK * (not all(stopped)) if still else 0.0


def blamed(codes: Sequence[int | None]) -> int | None:
    """Which process failed first: those that only lost another one, or still stand, say less than one that broke."""
    failed = [rank for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda rank: (codes[rank] == Lost.exit_code, rank)) if failed else None


def end(ranks: Sequence[Rank]) -> None:
    """Ends whatever still runs; what is stopped hears of it only when it is killed."""
    for rank in ranks:
        if rank.code() is None:
            rank.process.terminate()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def port() -> int:
    """A port on loopback that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
