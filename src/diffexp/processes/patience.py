"""How long processes of one run wait for a sign of life from each other."""

from __future__ import annotations

import os

from diffexp.errors import UserError

VARIABLE, DEFAULT = "DIFFEXP_PATIENCE", 20.0
MEETING = 600.0  # seconds for all processes to start: nobody can tell one that has not from one that never will


def patience() -> float:
    """Seconds of silence after which a process counts as lost: DIFFEXP_PATIENCE, else 20.

    Raises:
        UserError: if the variable holds no positive number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or DEFAULT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{VARIABLE} = {text!r}: give the seconds that processes wait for each other, such as 20")
    return seconds


def silent(rank: int, size: int, seconds: float) -> str:
    """What is said of a process that was waited for so long."""
    return f"process {rank} of {size} has given no sign of life for {seconds:g} s"
