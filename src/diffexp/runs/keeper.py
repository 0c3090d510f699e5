"""The state of a run between two iterations: held until the next one is whole, and made a checkpoint when asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor

from diffexp.runs import checkpoint
from diffexp.runs.names import CHECKPOINTS
from diffexp.runs.records import Records
from diffexp.terminal.reporter import Reporter


class State(NamedTuple):
    """A run between two iterations, as a checkpoint holds it."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors under ``name.``, without it."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


class Keeper:
    """Holds the newest ``state`` of the run in a folder, with its records. Only the ``main`` process writes.

    States are saved once each, by whichever thread asks first; of records, what belongs to the state.
    """

    def __init__(self, run: Path, keep: int, reporter: Reporter, main: bool) -> None:
        self.run, self.keep, self.reporter, self.main = run, keep, reporter, main
        self.state: State | None = None
        self.saved = 0
        self.saving = Lock()

    def open(self) -> State | None:
        """The state of the newest whole checkpoint, to whose time the records are taken back; None for a new run.

        Raises:
            UserError: if there are checkpoints, and all of them are damaged.
        """
        self.records = Records(self.run)
        newest = checkpoint.read_newest(self.run / CHECKPOINTS)
        if newest is None:
            self.rewind({})
            return None
        for damaged in newest.damaged:
            self.reporter.warned(f"passed over a damaged checkpoint: {damaged}")
        # checkpoints of the first format know the records' sizes only
        self.rewind(newest.records or self.records.heads(newest.numbers))
        self.saved = newest.numbers["iteration"]
        return State(newest.tensors, newest.numbers)

    def rewind(self, records: Mapping[str, bytes]) -> None:
        """Takes back what the records say of iterations after the restored one."""
        if self.main:
            for damaged in self.records.restore(records):
                self.reporter.warned(f"{damaged} was damaged: put back from the checkpoint")

    def save(self) -> None:
        """Makes the state the run's newest checkpoint.

        Raises:
            NotSaved: if the disk refuses.
        """
        with self.saving:
            state = self.state
            if state is None or state.numbers["iteration"] == self.saved or not self.main:
                return
            iteration, records = state.numbers["iteration"], self.records.heads(state.numbers["records"])
            folder = self.run / CHECKPOINTS
            checkpoint.write(folder, iteration, state.tensors, state.numbers, records, self.keep)
            self.saved = iteration
            self.reporter.saved(iteration)

    def rescue(self) -> None:
        """Saves the last whole iteration: whatever ended the run, nothing computed is lost."""
        try:
            self.save()
        except checkpoint.NotSaved as error:
            self.reporter.warned(str(error))  # what ended the run matters more
