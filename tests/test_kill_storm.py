"""Runs that are killed again and again end in the same bits; see kill_storm.py, which `--kills 200` makes longer."""

import pytest
from builders import ROOT
from builders_processes import run_python


@pytest.mark.slow
@pytest.mark.parametrize("extent", [["--kills", 4], ["--kills", 1, "--ranks", 2]])
def test_runs_that_are_killed_end_in_the_same_bits(extent: list[object]) -> None:
    done = run_python(ROOT / "tests" / "kill_storm.py", *extent)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
