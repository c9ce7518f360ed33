"""Every writer is killed at each of its file operations over an older result: the older or the newer one is whole."""

from collections.abc import Callable, Iterator
from functools import cache

import killed_writers
import pytest
from builders_processes import SERVER, fork

pytestmark = pytest.mark.slow

FILES = ("json", "mapping", "imported", "finetuned", "training_state", "picture")
FOLDERS = ("model_folder", "hf", "gguf", "peft", "merged", "converted", "data")
SLOW = ("picture", "merged", "converted")  # and written by what others are written by
FULL = [writer for writer in (*FILES, *FOLDERS) if writer not in SLOW]
TORN = ("mapping", "json", "model_folder", "hf", "gguf", "data")  # whatever writes bytes does it as one of these

Ask = Callable[[str, str], int]


@pytest.fixture(scope="module")
def disturbances() -> Iterator[Ask]:
    """How often a writer was disturbed in this way, each time to no harm; asked of a process that may fork."""
    ours, theirs = SERVER.Pipe()
    process = fork(killed_writers.serve, theirs)
    theirs.close()

    @cache
    def ask(writer: str, how: str) -> int:
        ours.send((writer, how))
        n, problems = ours.recv()
        assert not problems
        print(f"{writer}, {how}: {n} times")
        return n

    yield ask
    ours.send(None)
    process.join()


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
