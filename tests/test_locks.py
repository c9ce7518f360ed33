import os
import resource
import signal
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.storage.files import replacing, replacing_folder, write_file
from lit_llama.storage.locks import alone, check_room, claim, release

import pytest


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder and a file in it that another process is writing."""
    folder = tmp_path / "out"
    folder.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with replacing_folder(tmp_path / "data", "x"), replacing(folder / "file"):
            claim(folder)
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.read(reading, 1)
    yield folder
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    claim(folder)  # the lock has died with its process
    with replacing_folder(tmp_path / "data", "x"):
        pass
    write_file(folder / "file", "whole")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "file", "out"]
    release()


def test_there_is_one_writer_at_a_time(held: Path) -> None:
    for write in (
        lambda: claim(held),
        lambda: write_file(held / "file", "mine"),
        lambda: alone(held, held).__enter__(),
        lambda: replacing_folder(held, "x").__enter__(),
        lambda: replacing_folder(held.with_name("data"), "x").__enter__(),
    ):
        with pytest.raises(UserError, match="is being written by another process"):
            write()
    write_file(held / "another", "mine")
    (held / "another").unlink()


def test_a_claimed_folder_is_open_to_its_own_process(tmp_path: Path) -> None:
    claim(tmp_path / "out")
    claim(tmp_path / "out")
    with replacing_folder(tmp_path / "out", "x") as part:
        (part / "x").write_text("new")
    assert (tmp_path / "out" / "x").read_text() == "new"


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(UserError, match="make room"):
        check_room(tmp_path, 10**18)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(UserError, match=r"ulimit -f"):
            check_room(tmp_path, 10**7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        claim(tmp_path / "file" / "out")
