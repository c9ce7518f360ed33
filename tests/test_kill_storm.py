"""Runs that are killed again and again end in the same bits; see kill_storm.py, which `--kills 200` makes longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("extent", [["--kills", "4"], ["--kills", "1", "--ranks", "2"]])
def test_runs_that_are_killed_end_in_the_same_bits(extent: list[str]) -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "scripts", "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}  # a fork would lose threads
    command = [sys.executable, str(Path(__file__).with_name("kill_storm.py")), *extent]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
