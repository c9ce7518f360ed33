"""Hundreds of damaged files, of every kind that is read, are refused in one line; see fuzz.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT


@pytest.mark.slow
def test_hundreds_of_damaged_files_end_in_one_line_or_are_right() -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "scripts", "tests", "tests/scripts"))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}  # a fork would lose threads
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seconds", "8"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout
    assert int(re.search(r"^all +(\d+)", done.stdout, re.MULTILINE)[1]) >= 150  # 900 on two quiet cores
