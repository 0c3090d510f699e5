"""Runs that are killed twenty times at random moments end as the ones that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parents[1] / "benchmarks" / "kill_storm.py"


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing() -> None:
    arguments = [sys.executable, str(STORM), "--kills", "20", "--algorithm", "both"]
    done = subprocess.run(
        arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["20/20 identical"], done.stdout + done.stderr
