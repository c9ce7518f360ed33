"""Who may write where, and whether there is room: asked before the work, not after it."""

import errno
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from lit_llama.errors import UserError

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a folder that is locked
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without them answers
output_folders = ExitStack()  # that this process has locked


@contextmanager
def exclusive_lock(path: Path, target: Path) -> Iterator[None]:
    """Lock `path`, a file that is there meanwhile, so that no other process writes `target`.

    This process may lock it again. The lock is the system's: it ends with the process, however that ends.

    Raises:
        UserError: if another process is writing `target`.
    """
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{target} is being written by another process; wait until it ends, or write elsewhere"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_of_no_locks()
    try:
        yield
    finally:
        if lock.lock_counter < 2:
            with suppress(OSError):
                path.unlink()  # before it is let go, lest it be another's by then
        lock.release()


def lock_of(target: Path) -> Path:
    """The hidden file beside a target that is locked while that is written; a killed process may leave it behind."""
    return target.with_name(f".{target.name}{LOCK}")


@cache
def warn_of_no_locks() -> None:
    print("warning: this file system has no locks; let no other process write to the same place", file=sys.stderr)


def lock_output_folder(folder: Path) -> None:
    """Make a folder, if need be, and lock it until the script ends; a UserError if it is locked or not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        output_folders.enter_context(exclusive_lock(folder / LOCK, folder))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def release() -> None:
    """Let go of all output folders."""
    output_folders.close()


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
