"""A process that dies, fails or stands still ends all of them, and is named; a slow one is waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffexp.devices import device
from diffexp.errors import Lost, UserError
from diffexp.processes import launch
from diffexp.processes.heartbeat import Heartbeat
from diffexp.processes.parallel import Ranks, join
from diffexp.processes.patience import VARIABLE, patience

RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
from diffexp.errors import Lost
from diffexp.processes.parallel import join

what, folder = sys.argv[1], Path(sys.argv[2])
rendezvous = torch.distributed.rendezvous

def meet(*where, **settings):
    for met in rendezvous(*where, **settings):
        if what == "meet " + os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # until the other has stopped
        yield met

if what.startswith("meet"):
    torch.distributed.rendezvous = meet
if what == "start " + os.environ["RANK"]:
    os.kill(os.getpid(), signal.SIGSTOP)
ranks = join(torch.device("cpu"))
try:
    with ranks.together((folder / str(ranks.rank)).touch):
        ranks.wait()
        if what == "slow":
            time.sleep(9 if ranks.rank == 1 else 0)  # three times the patience
            ranks.wait()
        if what.endswith(str(ranks.rank)) and not what.startswith("last"):
            if what.startswith("raise"):
                raise ValueError("no such luck")
            os.kill(os.getpid(), signal.SIGKILL if what.startswith("kill") else signal.SIGSTOP)
        ranks.wait()
    if what == f"last {ranks.rank}":
        os.kill(os.getpid(), signal.SIGSTOP)
except Lost as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(Lost.exit_code)
"""


def run(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that meet, do ``what``, and meet again, launched with a patience of three seconds."""
    (folder / "rank.py").write_text(RANK)
    monkeypatch.setattr(launch, "program", lambda: [sys.executable, str(folder / "rank.py")])
    monkeypatch.setattr(launch, "GRACE", 0.5)
    monkeypatch.setenv(VARIABLE, "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.launch(2, [what, str(folder)])


class SlowStore:
    """A store that all ranks talk through, which takes half a second to answer."""

    def clone(self) -> SlowStore:
        return self

    def add(self, key: str, amount: int) -> int:
        time.sleep(0.5)
        return 1

    def check(self, keys: list[str]) -> bool:
        return False


def test_no_thread_talks_to_the_store_when_the_watch_is_over() -> None:
    """An interpreter that ends while one is in the store's C++ code would abort the process."""
    heartbeat = Heartbeat(SlowStore(), 0, 2, patience=60)
    heartbeat.leave()
    assert not heartbeat.pulsing.is_alive()


def test_who_has_met_the_others_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that stops before its threads have begun would be waited for as if it were still starting."""
    counted = []
    monkeypatch.setattr(SlowStore, "add", lambda store, key, amount: counted.append((key, amount)))
    monkeypatch.setattr(Heartbeat, "pulse", lambda heartbeat: None)
    Heartbeat(SlowStore(), 1, 2, patience=60).leave()
    assert counted == [("beats of 1", 1)]


def test_a_slow_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("slow", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stop 1", "^process 1 of 2 has given no sign of life for 3 s"),
        ("stop 0", "^process 0 of 2 has given no sign of life for 3 s"),  # it holds the store that all talk through
        ("kill 1", r"^process 1 of 2 failed \(signal 9\); the others were ended"),
        ("raise 1", r"^process 1 of 2 failed \(exit code 1: ValueError: no such luck\); the others were ended"),
    ],
)
def test_a_lost_process_ends_the_others(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message):
        run(what, tmp_path, monkeypatch)
    survivor = 1 - int(what[-1])
    assert (tmp_path / str(survivor)).exists(), "who is left saves before it ends"


@pytest.mark.parametrize("moment", ["start", "meet", "last"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stops_where_nobody_listens_ends_the_others(
    moment: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "NOTICE", 0.0)
    with pytest.raises(UserError, match=f"^process {rank} of 2 has given no sign of life for 3 s; "):
        run(f"{moment} {rank}", tmp_path, monkeypatch)


def test_processes_that_meet_need_no_launcher_to_see_that_one_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun, or on several machines."""
    monkeypatch.setattr(launch.Rank, "stopped", lambda rank: False)
    with pytest.raises(UserError, match=r"^process 0 of 2 has given no sign of life for 3 s; "):
        run("meet 0", tmp_path, monkeypatch)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_patience_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UserError, match=f"{VARIABLE} = '{text}'"):
        patience()


def test_who_broke_is_blamed_before_who_lost_it() -> None:
    assert launch.blamed([75, None, -9]) == 2
    assert launch.blamed([75, None]) == 0
    assert launch.blamed([0, 0]) is None


def test_the_working_folder_is_not_imported_from(tmp_path: Path) -> None:
    """It may be a run that came from a stranger: ``cd run; diffexp resume . --processes 2``."""
    (tmp_path / "typer.py").write_text("raise SystemExit('typer.py of the folder')")
    (tmp_path / "diffexp.py").write_text("raise SystemExit('diffexp.py of the folder')")
    said = subprocess.run([*launch.program(), "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")


def test_an_error_between_processes_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def message() -> None:
        raise RuntimeError("Duplicate GPU detected : rank 1 and rank 0\nand a trace")

    with pytest.raises(Lost, match=r"can't be reached: Duplicate GPU detected : rank 1 and rank 0$"):
        Ranks(1, 2).send(message)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 of this machine finds 2 GPUs"):
        device("auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device = 'mps': only one process"):
        join(torch.device("mps"))
