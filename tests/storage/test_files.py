import errno
import os
import signal
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.storage.files import (
    LOCK,
    check_room,
    exclusive_lock,
    lock_output_folder,
    read_file,
    release,
    replacing,
    replacing_folder,
    warn_of_no_locks,
    write_file,
    write_tensors,
)
from lit_llama.storage.integrity import fingerprint

import pytest
import torch


def test_a_file_written_tensor_by_tensor_is_that_of_torch(tmp_path: Path) -> None:
    state = {"a": torch.randn(5, 3), "empty": torch.empty(0, 3), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3.0)}
    state["twin"] = state["a"]
    write_tensors(tmp_path / "ours.pth", state)
    torch.save(state, tmp_path / "torch.pth")
    for mmap in (True, False):
        read = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mmap)
        assert list(read) == list(state)
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
        assert read["twin"].data_ptr() == read["a"].data_ptr()
    assert fingerprint(tmp_path / "ours.pth") == fingerprint(tmp_path / "torch.pth")
    read_file(tmp_path / "ours.pth")  # compares the CRC32s


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder and a file in it that another process is writing."""
    folder = tmp_path / "out"
    folder.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with replacing_folder(tmp_path / "data", "x"), replacing(folder / "file"):
            lock_output_folder(folder)
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.read(reading, 1)
    yield folder
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock_output_folder(folder)  # the lock has died with its process
    with replacing_folder(tmp_path / "data", "x"):
        pass
    write_file(folder / "file", "whole")
    release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "file", "out"]


def test_there_is_one_writer_at_a_time(held: Path) -> None:
    link = held.with_name("link")
    link.symlink_to(held)
    for write in (
        lambda: lock_output_folder(held),
        lambda: lock_output_folder(link),
        lambda: write_file(held / "file", "mine"),
        lambda: write_file(link / "file", "mine"),
        lambda: exclusive_lock(held / LOCK, held).__enter__(),
        lambda: replacing_folder(held, "x").__enter__(),
        lambda: replacing_folder(link, "x").__enter__(),
        lambda: replacing_folder(held.with_name("data"), "x").__enter__(),
    ):
        with pytest.raises(UserError, match="is being written by another process"):
            write()
    write_file(held / "another", "mine")
    (held / "another").unlink()
    link.unlink()


def test_a_locked_folder_is_open_to_its_own_process(tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    lock_output_folder(out)
    lock_output_folder(link)
    with replacing_folder(link, "x") as part:
        (part / "x").write_text("new")
    write_file(out / "file", "new")
    assert {path.name for path in out.iterdir()} == {"x", "file", LOCK}
    release()
    assert {path.name for path in out.iterdir()} == {"x", "file"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    warn_of_no_locks.cache_clear()
    lock_output_folder(tmp_path)
    for name in "ab":
        write_file(tmp_path / name, "whole")
    release()
    assert capfd.readouterr().err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(UserError, match="make room"):
        check_room(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        lock_output_folder(tmp_path / "file" / "out")
