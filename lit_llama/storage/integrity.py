"""Whether a file is what was written: checksums, and fingerprints by which a model is recognised.

A file of torch.save is a zip archive in which each tensor's bytes, and what describes them, are members, uncompressed
and with a CRC32. That is checked when the file is read, whoever wrote it, on all CPU cores at once.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from lit_llama.errors import UserError

MAX_PICKLE = 4 * 2**20  # bytes; that of a model of 70 billion weights takes 100,000
CHUNK = 2**20
HEADER = struct.Struct("<4s22x2H")  # before each member: a signature, and the lengths of its name and of a second field
UTF8_NAME = 0x800  # the flag of a name in UTF-8


def check_archive(path: Path, tensors: bool = True) -> None:
    """Raise a UserError unless a file of torch.save is intact, and opening it takes no more memory than its size.

    Args:
        tensors: check the bytes of the tensors, too, not only what describes them.
    """
    try:
        with open(path, "rb") as file, ZipFile(file) as archive, ThreadPoolExecutor(os.cpu_count()) as pool:
            members = archive.infolist()
            inflated = any(member.compress_type != ZIP_STORED for member in members)
            descriptions = [member for member in members if "/data/" not in member.filename]
            excessive = sum(member.file_size for member in descriptions) > MAX_PICKLE
            checked = [] if inflated or excessive else members if tensors else descriptions
            whole = pool.map(partial(is_whole, file.fileno()), checked)
            damaged = [member.filename for member, right in zip(checked, whole, strict=True) if not right]
    except Exception:  # the standard library's parser raises a dozen kinds
        raise UserError(
            f"{path} is truncated, or not a checkpoint of PyTorch 1.6 or later; copy or convert it again"
        ) from None
    if inflated or excessive:
        raise UserError(f"{path} would take far more memory than its size, and was not opened; get it from elsewhere")
    if damaged:
        name = damaged[0].partition("/")[2]
        raise UserError(f"{path} is damaged: its {name} does not match its checksum; copy or write it again")


def is_whole(descriptor: int, member: ZipInfo) -> bool:
    """Whether an uncompressed member of an archive has the name and the CRC32 that the archive's directory says.

    Threads may read one file at once: each read says where, so that none moves the position of another. (ZipFile itself
    cannot be used so: Python 3.12 and 3.13 then report good files as damaged.)
    """
    header = os.pread(descriptor, HEADER.size, member.header_offset)
    signature, name_size, extra_size = HEADER.unpack(header)
    place = member.header_offset + HEADER.size
    name = os.pread(descriptor, name_size, place)
    encoding = "utf-8" if member.flag_bits & UTF8_NAME else "cp437"
    if signature != b"PK\3\4" or name.decode(encoding) != member.orig_filename:
        return False
    place, crc, left = place + name_size + extra_size, 0, member.file_size
    while left and (block := os.pread(descriptor, min(left, CHUNK), place)):
        crc = zlib.crc32(block, crc)
        place, left = place + len(block), left - len(block)
    return not left and crc == member.CRC


def fingerprint(path: Path) -> str:
    """What tells the tensors of a file of torch.save from others: a digest of their sizes and CRC32s, in any order."""
    check_archive(path, tensors=False)
    with ZipFile(path) as archive:
        tensors = [(member.file_size, member.CRC) for member in archive.infolist() if "/data/" in member.filename]
    return hashlib.sha256(repr(sorted(tensors)).encode()).hexdigest()[:16]


def identity(path: Path) -> dict[str, str]:
    """How a run, and what it writes, remembers its base model."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return {"base": fingerprint(path), "base_path": str(path)}


def check_base(path: Path, trained_on: Mapping[str, Any], given: Mapping[str, Any], remedy: str) -> None:
    """Raise a UserError if what `path` holds was trained on another base model than the one that is given.

    Args:
        trained_on: what `identity` said of the one, among other things; files of earlier versions do not tell.
        given: what it says of the other.
    """
    theirs, ours = trained_on.get("base"), given.get("base")
    if theirs and ours and theirs != ours:
        raise UserError(
            f"{path} was trained on {trained_on.get('base_path')} (fingerprint {theirs}), not on {given['base_path']} "
            f"({ours}); {remedy}"
        )


def digest(path: Path, size: int | None = None, start: int = 0) -> str:
    """The sha256 of a file, or of its first `size` bytes, or of what comes after its first `start` bytes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(CHUNK if size is None else min(CHUNK, size - file.tell())):
            sha256.update(block)
    return sha256.hexdigest()


def size_and_digest(path: Path, size: int | None = None) -> str:
    """The length and sha256 of a file, or of its first `size` bytes if it is longer."""
    length = path.stat().st_size
    size = length if size is None else min(length, size)
    return f"{size} {digest(path, size)}"
