"""Starts a run's processes on this machine, and ends all of them when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from diffexp.errors import UserError

GRACE = 10.0  # seconds between asking the remaining processes to end and ending them


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Runs ``diffexp ARGUMENTS`` in so many processes that know of each other, and waits for all of them.

    Raises:
        UserError: if one of them fails; the others are ended, and the run can be continued.
    """
    where = port()
    ranks = [start(rank, processes, where, arguments) for rank in range(processes)]
    previous = signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
    try:
        failed = watch(ranks)
    finally:
        signal.signal(signal.SIGTERM, previous)
        end(ranks)
    if failed is not None:
        code = ranks[failed].returncode
        if code == 130:
            raise KeyboardInterrupt
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise UserError(f"process {failed} of {processes} failed ({how}), the others were ended: see its message above")


def start(rank: int, size: int, where: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """One process, told its place as torchrun would."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where}
    environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
    return subprocess.Popen([sys.executable, "-m", "diffexp", *arguments], env=environment)  # noqa: S603


def watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that failed, or None when all have ended well."""
    while True:
        try:
            codes = [rank.poll() for rank in ranks]
            if bad := [rank for rank, code in enumerate(codes) if code]:
                return bad[0]
            if all(code == 0 for code in codes):
                return None
            time.sleep(0.2)
        except KeyboardInterrupt:
            continue  # Ctrl-C reached the processes too: they save and end


def end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends whatever still runs."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def port() -> int:
    """A port on loopback that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
