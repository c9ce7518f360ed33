"""Files and folders that are written whole or not at all, by one process at a time, and what is read from them.

A writer locks its target, fills a file or folder of another name next to it, flushes that to the disk and renames it.
If the process is killed or the disk is full, the target is still the old one.
"""

import atexit
import ctypes
import errno
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from mmap import PAGESIZE
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from lit_llama.errors import UserError
from lit_llama.storage.integrity import check_archive, digest, fingerprint

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import skip_data
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

check_all = True  # --check_files of every script
MADV_PAGEOUT = 21  # of Linux's mman.h
CONFIG = "config.json"  # of a model folder: says under "files" which others belong to it
LOCK = ".lock"  # in a folder that is locked
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without them answers
output_folders = ExitStack()  # that this process has locked
release = output_folders.close
atexit.register(release)  # while all that it needs is still there


@contextmanager
def exclusive_lock(path: Path, target: Path) -> Iterator[None]:
    """Lock `path`, a file that is there meanwhile; a UserError if another process is writing `target`.

    This process may lock it again. The system's lock ends with the process, however that ends.
    """
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        remedy = "wait until it ends, or write elsewhere"
        raise UserError(f"{target} is being written by another process; {remedy}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_of_no_locks()
    try:
        yield
    finally:
        if lock.lock_counter < 2:
            with suppress(OSError):
                path.unlink()  # before it is let go, while it cannot be another's
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


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise a UserError if a file of this size cannot be written to a folder."""
    if n_bytes > (free := shutil.disk_usage(folder).free):
        where = f"{folder}, where only {free / 1e9:.2g} GB are free"
        raise UserError(f"a file of {n_bytes / 1e9:.2g} GB is to be written to {where}; make room or write elsewhere")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which at any moment is the old file or the whole new one."""
    part = path.with_name(f"{path.name}.part")
    with as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(lock_of(path), path):
            if part.is_symlink() or part.is_file():  # of a run that was killed
                part.unlink()
            part.touch(exist_ok=False)  # a file of its own: no link, pipe or folder
            mode = (path if path.exists() else part).stat().st_mode  # safetensors would let nobody else read the file
            try:
                yield part
                part.chmod(mode)
                flush(part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            flush(path.parent)


@contextmanager
def replacing_folder(folder: Path, owned: str) -> Iterator[Path]:
    """A folder to fill in place of `folder`, which at any moment is the old one or the whole new one.

    Old files go if their names match the pattern `owned`; others stay. A UserError if it cannot be replaced as a whole.
    """
    target = Path(os.path.realpath(folder))
    part = target.with_name(f".{target.name}.part")
    if target.exists() and not target.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write; give another --out_dir")
    if target == Path.cwd() or target.is_mount():
        raise UserError(f"{folder} cannot be replaced as a whole; give a folder inside it")
    if inner := [entry.name for entry in (target.iterdir() if target.exists() else ()) if entry.is_dir()]:
        raise UserError(f"{folder} holds a folder, {inner[0]}, which is not part of a result; give another folder")
    with as_user_error(folder), ExitStack() as locks:
        target.parent.mkdir(parents=True, exist_ok=True)
        locks.enter_context(exclusive_lock(lock_of(target), folder))
        if target.exists():
            locks.enter_context(exclusive_lock(target / LOCK, folder))  # a run may be writing to it
        try:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            part.mkdir()
            yield part
            for file in target.iterdir() if target.exists() else ():
                if not re.fullmatch(owned, file.name):
                    try:
                        os.link(file, part / file.name, follow_symlinks=False)
                    except OSError:  # a file system without hard links
                        shutil.copy2(file, part / file.name, follow_symlinks=False)
            for file in part.iterdir():
                flush(file)
            flush(part)
            if target.exists():
                swap(part, target)
            else:
                part.rename(target)
            flush(target.parent)
        except UserError as error:  # it names a file in the folder of another name
            raise UserError(str(error).replace(str(part), str(folder))) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def swap(one: Path, other: Path) -> None:
    """Exchange two folders: in one step by Linux's renameat2, elsewhere by renaming three times."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    if renameat2 and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    aside = one.with_name(f"{one.name}.old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turn an error of writing into a UserError that says what the system said."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause: BaseException | None = error  # torch.save raises another error on top of the system's
        while cause and not (isinstance(cause, OSError) and cause.strerror):
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        where = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
        raise UserError(f"could not write {path}: {reason}{where}") from None


def write_file(path: Path, content: bytes | str) -> None:
    """Write bytes or text, whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(path: Path, content: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]] | None = None) -> None:
    """Write what torch.save would, but tensor by tensor, whole or not at all; it is read back first.

    With `tensors`, in the order of `named_tensors`, those in `content` tell only shapes and dtypes. Each is let go
    before the next one is asked for, so that a process can write a model that it could not hold. A UserError if a
    number is inf or nan, before an older file is replaced.
    """
    tensors = iter(named_tensors(content) if tensors is None else tensors)
    untouched = cache(lambda like: torch.empty(like.shape, dtype=like.dtype, device="cpu"))  # takes no memory yet
    with replacing(path) as part:
        with skip_data():  # all but the numbers
            torch.save(tree_map_only(Tensor, untouched, dict(content)), part)
        with ZipFile(part) as layout:
            names = layout.namelist()
            descriptions = {name: layout.read(name) for name in names if "/data/" not in name}
        with ZipFile(part, "w") as archive:
            for name in names:
                member = ZipInfo(name)
                header = 30 + len(name.encode()) + 4 + 20  # of which 4 for the padding's and 20 for 64-bit sizes
                padding = -(archive.start_dir + header) % 64  # as torch aligns numbers
                member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
                with archive.open(member, "w", force_zip64=True) as file:
                    file.write(descriptions[name] if name in descriptions else bytes_of(path, *next(tensors)))
        with ZipFile(part) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path} was not written: {damaged} is not read back as it was written; try again")


def named_tensors(content: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """The tensors in nested mappings with their names, such as optimizer.state.0.exp_avg; each tensor once."""
    found: dict[Tensor, str] = {}
    for keys, value in tree_flatten_with_path(dict(content))[0]:
        if isinstance(value, Tensor):
            found.setdefault(value, ".".join(str(getattr(key, "key", key)) for key in keys))
    return [(name, tensor) for tensor, name in found.items()]


def bytes_of(path: Path, name: str, tensor: Tensor) -> memoryview:
    """The bytes of a tensor to be written to `path`."""
    check_finite(path, {name: tensor})
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if any number to be written to `path` is inf or nan, before a good file is replaced."""
    for name, tensor in tensors.items():
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # without a tensor of its size
            raise UserError(f"{path} was not written: {name} has numbers that are inf or nan")


def check_apart(source: Path, target: Path) -> None:
    """Raise a UserError if writing `target` would replace `source`, which is read."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"{target} is read by this command; choose another place to write to")


def read_file(path: Path, check_tensors: bool = True) -> dict[str, Any]:
    """The mapping that torch.save wrote, checked, with `check_tensors` to its last byte. Tensors stay on the disk."""
    check_archive(path, check_tensors and check_all)
    if check_tensors and not check_all:
        print(f"{path} was read without comparing its tensors with their checksums", file=sys.stderr)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than weights (perhaps code), and was not opened; get it elsewhere"
        ) from None
    except Exception as error:  # a description that makes no sense ends in any of a dozen kinds
        if "Cannot allocate memory" in str(error):
            raise MemoryError(f"could not map {path}") from None
        raise UserError(f"{path} does not describe tensors that PyTorch can read; copy or convert it again") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a checkpoint with named tensors")
    return content


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a .safetensors file, one by one."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); get it again") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}); convert it") from None


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file."""
    try:
        fields = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # the latter if it is nested too deep
        raise UserError(f"{path} is truncated or not valid JSON ({error}); get it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object; get it again")
    return fields


def check_listed(path: Path) -> None:
    """Raise a UserError if the config.json of a model folder was written with another file of this name."""
    config = path.with_name(CONFIG)
    files = read_json(config).get("files") if config.is_file() else None
    expected = files.get(path.name) if isinstance(files, dict) else None
    if expected and expected != (fingerprint(path) if path.suffix == ".pth" else digest(path)):
        remedy = 'copy both again, or remove its "files" if you have exchanged the file'
        raise UserError(f"{path} is not the file that {config} was written with; {remedy}")


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers all lie in memory or in its file, one by one."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return is_dense and value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def page_out(tensor: Tensor) -> None:
    """Tell Linux that a tensor mapped from a file is not needed soon; it would stay in memory beside the copy."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        first, end = -(-tensor.data_ptr() // PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // PAGESIZE  # whole pages
        start, size = ctypes.c_void_p(first * PAGESIZE), ctypes.c_size_t(max(0, end - first) * PAGESIZE)
        ctypes.CDLL(None).madvise(start, size, MADV_PAGEOUT)  # whatever it answers, no number is lost
