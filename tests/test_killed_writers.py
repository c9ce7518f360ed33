"""Every writer is killed at each of its file operations over an older result: the older or the newer one is whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from builders import ROOT

pytestmark = pytest.mark.slow

FILES = ("json", "mapping", "imported", "finetuned", "training_state", "picture")
FOLDERS = ("model_folder", "hf", "gguf", "peft", "merged", "converted", "data")
SLOW = ("picture", "merged", "converted")  # and written by what others are written by
FULL = [writer for writer in (*FILES, *FOLDERS) if writer not in SLOW]
TORN = ("mapping", "json", "model_folder", "hf", "gguf", "data")  # whatever writes bytes does it as one of these

Ask = Callable[[str, str], int]


@pytest.fixture(scope="module")
def disturbances() -> Iterator[Ask]:
    """How often a writer was disturbed in this way, each time to no harm; asked of a program that forks."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "scripts", "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}  # a fork would lose threads
    command = [sys.executable, str(Path(__file__).with_name("killed_writers.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as program:

        @cache
        def ask(writer: str, how: str) -> int:
            print(json.dumps([writer, how]), file=program.stdin, flush=True)
            answer = json.loads(program.stdout.readline())
            assert not answer["problems"], answer["problems"]
            print(f"{writer}, {how}: {answer['disturbances']} times")
            return answer["disturbances"]

        yield ask
        program.stdin.close()


@pytest.mark.parametrize("writer", [*FILES, *FOLDERS])
def test_a_writer_that_is_killed_leaves_the_older_or_the_newer_result(writer: str, disturbances: Ask) -> None:
    assert disturbances(writer, "killed") >= (8 if writer in FILES else 20)


@pytest.mark.parametrize("writer", TORN)
def test_a_writer_that_is_killed_within_a_file_leaves_the_older_result(writer: str, disturbances: Ask) -> None:
    assert disturbances(writer, "killed within a file") >= 2


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_ends_in_one_line_and_leaves_a_whole_result_alone(writer: str, disturbances: Ask) -> None:
    assert disturbances(writer, "disk full") >= (4 if writer in FILES else 12)


@pytest.mark.parametrize("writer", TORN)
def test_a_disk_that_fills_up_within_a_file_ends_in_one_line(writer: str, disturbances: Ask) -> None:
    assert disturbances(writer, "disk full within a file") >= 2


def test_writers_are_killed_at_hundreds_of_places(disturbances: Ask) -> None:
    assert sum(disturbances(writer, "killed") for writer in (*FILES, *FOLDERS)) >= 200
