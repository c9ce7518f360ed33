"""Files and folders that are written whole or not at all, and what is read from them.

A writer fills a file or folder of another name next to its target, flushes it to the disk and renames it. If the
process is killed or the disk is full, the target is still the old one. While it is at work, nobody else can write the
same target.
"""

import ctypes
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.storage.integrity import check_archive, digest, fingerprint
from lit_llama.storage.locks import LOCK, exclusive_lock, lock_of

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

check_all = True  # --check_files of every script
MADV_PAGEOUT = 21  # of Linux's mman.h
CONFIG = "config.json"  # of a model folder: says under "files" which others belong to it


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

    Args:
        owned: pattern of the file names that the format has. The old ones go; files of other names stay.

    Raises:
        UserError: if the folder cannot be replaced as a whole, before anything is written.
    """
    target = Path(os.path.realpath(folder))
    part = target.with_name(f".{target.name}.part")
    check_replaceable(folder, target)
    with as_user_error(folder), ExitStack() as locks:
        target.parent.mkdir(parents=True, exist_ok=True)
        locks.enter_context(exclusive_lock(lock_of(target), folder))
        if target.exists():
            locks.enter_context(exclusive_lock(target / LOCK, folder))  # a run may be writing to it
        try:
            remove_folder(part)  # of a run that was killed
            part.mkdir()
            yield part
            for file in target.iterdir() if target.exists() else ():
                if not re.fullmatch(owned, file.name):
                    link_or_copy(file, part / file.name)
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
            remove_folder(part)


def check_replaceable(folder: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write; give another --out_dir")
    if target == Path.cwd() or target.is_mount():
        raise UserError(f"{folder} cannot be replaced as a whole; give a folder inside it")
    for entry in target.iterdir() if target.exists() else ():
        if entry.is_dir():
            raise UserError(f"{folder} holds a folder, {entry.name}, which is not part of a result; give another one")


def remove_folder(folder: Path) -> None:
    """Remove a folder of our own making, with all that is in it."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


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


def write_file(path: Path, content: bytes | str | Mapping[str, Any]) -> None:
    """Write bytes, text or (by torch.save) a mapping, whole or not at all; what is written is read back first."""
    with replacing(path) as part:
        with open(part, "wb") as file:
            if isinstance(content, Mapping):
                torch.save(content, file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        if isinstance(content, Mapping):
            check_archive(part)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write finite tensors as transformers and PEFT read them, whole or not at all; they are read back first."""
    check_finite(path, tensors)
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
        if not all(torch.equal(tensor, tensors[name]) for name, tensor in read_safetensors(part)):
            raise UserError(f"{path} was not written: what is read back is not the same; try again")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if any number to be written to `path` is inf or nan, before a good file is replaced."""
    for name, tensor in tensors.items():
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # without a tensor of its size
            raise UserError(f"{path} was not written: {name} has numbers that are inf or nan")


def check_apart(source: Path, target: Path) -> None:
    """Raise a UserError if writing `target`, a file or a folder, would replace `source`, which is read."""
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is read by this command; choose another place to write to")


def read_file(path: Path, check_tensors: bool = True) -> dict[str, Any]:
    """The mapping that torch.save wrote to `path`, after a check that it is intact. Tensors stay on the disk.

    Args:
        check_tensors: whether the check is of the tensors' bytes, too; for a file of which only the shapes matter, no.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if check_tensors and not check_all:
        print(f"{path} was read without comparing its tensors with their checksums", file=sys.stderr)
    check_archive(path, check_tensors and check_all)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than weights (code, perhaps) and was not opened; get it elsewhere"
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


def parse_json(text: str) -> Any:
    """The value of JSON text; a ValueError if it has none, also if it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file."""
    try:
        fields = parse_json(read_text(path))
    except ValueError as error:
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
        raise UserError(
            f"{path} is not the file that {config} was written with; copy both again, or remove its "
            '"files" if you have exchanged the file'
        )


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers all lie in memory or in its file, one by one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def page_out(tensor: Tensor) -> None:
    """Tell Linux that a tensor mapped from a file is not needed soon; it would stay in memory beside the copy."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        first, end = -(-tensor.data_ptr() // PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // PAGESIZE  # whole pages
        start, size = ctypes.c_void_p(first * PAGESIZE), ctypes.c_size_t(max(0, end - first) * PAGESIZE)
        ctypes.CDLL(None).madvise(start, size, MADV_PAGEOUT)  # whatever it answers, no number is lost
