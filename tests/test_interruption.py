"""The first signal asks a run to end, and is heard between two steps; the second one ends it as it ends any program."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
from test_training import recipe

from diffexp import train
from diffexp.terminal.reporter import Reporter

USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What signals do in a process that has just started."""


class Insisting(Reporter):
    """Sends this process the same signal twice, with a whole iteration that is not saved."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.warnings, self.saves = number, 0, 0

    def warned(self, message: str) -> None:
        self.warnings += "once more to stop at once" in message

    def saved(self, iteration: int) -> None:
        self.saves += 1

    def stepped(self, record: Any) -> None:
        if record["iteration"] == 2:
            signal.raise_signal(self.number)
            assert (self.warnings, self.saves) == (1, 0)
            assert [signal.getsignal(number) for number in USUAL] == list(USUAL.values())
            signal.raise_signal(self.number)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once_and_saves_nothing(
    number: signal.Signals, code: int, sd_folder: Path, tmp_path: Path
) -> None:
    """Who asks twice does not want to wait for a disk."""
    rare, run = recipe(sd_folder, **{"checkpoint.every": 9, "preview.images": 0}), tmp_path / "run"
    if not (child := os.fork()):
        try:
            for each, handler in USUAL.items():
                signal.signal(each, handler)
            train(rare, run, Insisting(number))
        except BaseException as error:
            traceback.print_exc()
            os._exit(130 if type(error) is KeyboardInterrupt else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert not list(run.glob("checkpoints/*")) + list(run.glob("lora/*"))
