"""Who may write where, and whether there is room: asked before the work, not after it.

Locks are the system's, on open files: they end with the process that holds them, however it ends.
"""

import errno
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from lit_llama.errors import UserError

CLAIMED: dict[tuple[int, int], int] = {}  # folders that this process has locked, and their descriptors


@contextmanager
def alone(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock on `path`, so that no other process writes `target` in the meantime."""
    descriptor = lock(path, target)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claim(folder: Path) -> None:
    """Make a folder, if need be, and lock it until the script ends; a UserError if it is locked or not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = lock(folder, folder)
        if descriptor is not None:
            CLAIMED[inode(folder.stat())] = descriptor
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def release() -> None:
    """Let go of all claimed folders."""
    while CLAIMED:
        os.close(CLAIMED.popitem()[1])


def lock(path: Path, target: Path) -> int | None:
    """Lock a folder, or a file that is made if need be, until the descriptor is closed; None if this process has.

    Raises:
        UserError: if another process has, and so is writing `target`.
    """
    if path.is_dir() and inode(path.stat()) in CLAIMED:
        return None
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())  # else another has just ended
    except OSError as error:
        free = error.errno != errno.EWOULDBLOCK  # a file system without locks
    if not free:
        os.close(descriptor)
        raise UserError(f"{target} is being written by another process; wait until it ends, or write elsewhere")
    return descriptor


def inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise a UserError if a file of this size cannot be written to a folder."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and n_bytes > limit:
        raise UserError(f"a file of {n_bytes / 1e9:.2g} GB is to be written, but ulimit -f allows {limit} bytes")
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(
            f"a file of {n_bytes / 1e9:.2g} GB is to be written to {folder}, where only {free / 1e9:.2g} GB are free; "
            "make room or write elsewhere"
        )
