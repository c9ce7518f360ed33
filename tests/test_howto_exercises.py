"""The exercises to howto/understand_lora.md: none is solved as it stands, and their solutions are right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT

FOLDER = ROOT / "howto" / "exercises"
NAMES = ("gradients", "scaling", "merge", "keys", "bug")


def check(answers: str, *flags: str, folder: Path = FOLDER) -> dict[str, str]:
    """What the exercises' tests say of a file of answers: the outcome of each test."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", *flags]
    environment = {**os.environ, "EXERCISES": answers, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, str(FOLDER / "test_exercises.py")],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    return {
        test: outcome for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)
    }


@pytest.mark.slow
def test_every_exercise_fails_as_it_stands_and_its_solution_passes() -> None:
    unsolved, solved = check("exercises"), check("solutions")
    assert unsolved.keys() == solved.keys()
    assert set(unsolved.values()) == {"FAILED"}
    assert set(solved.values()) == {"PASSED"}


MERGES = {
    "(W.float() + scaling * (B.float() @ A.float())).to(W.dtype)": "PASSED",
    "(W.float() + (B.float() @ A.float()) * scaling).to(W.dtype)": "PASSED",
    "(W.float() + B.float() @ (scaling * A.float())).to(W.dtype)": "PASSED",
    "(W.double() + scaling * B.double() @ A.double()).to(W.dtype)": "PASSED",
    "torch.addmm(W.float(), B.float(), A.float(), alpha=scaling).to(W.dtype)": "PASSED",
    "W + (scaling * B.float() @ A.float()).to(W.dtype)": "FAILED",  # rounded twice
    "W + scaling * B @ A": "FAILED",
    "W.float() + scaling * B.float() @ A.float()": "FAILED",  # not of W's dtype
    "(W.float() + B.float() @ A.float()).to(W.dtype)": "FAILED",
    "W.add_((scaling * B.float() @ A.float()).to(W.dtype))": "FAILED",  # W is changed
}


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "expected"), MERGES.items())
def test_right_answers_to_merge_pass_however_they_are_written(answer: str, expected: str, tmp_path: Path) -> None:
    solutions = (FOLDER / "solutions.py").read_text(encoding="utf-8")
    right = "(W.float() + scaling * B.float() @ A.float()).to(W.dtype)"
    assert right in solutions
    (tmp_path / "another.py").write_text(solutions.replace(right, answer))
    outcomes = check("another", "-k", "merge", folder=tmp_path)
    assert outcomes["test_merge_is_rounded_once[dtype1]"] == expected  # bfloat16
    assert expected == "FAILED" or outcomes["test_merge_is_rounded_once[dtype0]"] == "PASSED"


def test_every_exercise_has_tests_by_its_name() -> None:
    tests = re.findall(r"^def test_(\w+)", (FOLDER / "test_exercises.py").read_text(encoding="utf-8"), re.MULTILINE)
    for file in ("exercises.py", "solutions.py"):
        functions = re.findall(r"^def (\w+)", (FOLDER / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(functions) == len(NAMES)
    assert {test.split("_")[0] for test in tests} == set(NAMES)
    exercises = (FOLDER / "exercises.py").read_text(encoding="utf-8")
    assert re.findall(r'"""(\w+): ', exercises) == list(NAMES)
