"""Hundreds of damaged files, of every kind that is read, are refused in one line; see fuzz.py."""

import re

import pytest
from builders import ROOT
from builders_processes import run_python


@pytest.mark.slow
def test_hundreds_of_damaged_files_end_in_one_line_or_are_right() -> None:
    done = run_python(ROOT / "tests" / "fuzz.py", "--seconds", 8)
    print(done.stdout)
    assert done.returncode == 0, done.stderr + done.stdout
    assert int(re.search(r"^all +(\d+)", done.stdout, re.MULTILINE)[1]) >= 150  # 900 on two quiet cores
