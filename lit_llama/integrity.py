"""Whether a file is what was written: checksums, and fingerprints by which a model is recognised.

A file of torch.save is a zip archive in which each tensor's bytes are a member, uncompressed and with a CRC32. That is
checked when the file is read, whoever wrote it, on all CPU cores at once. Descriptions of models and data
(config.json, meta.json) and files of finetuned weights hold a sha256 of their own in addition.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor

from lit_llama.errors import UserError

SEAL = "checksum"  # the field that holds it
MAX_PICKLE = 4 * 2**20  # bytes; that of a model of 70 billion weights takes 100,000
CHUNK = 2**20


def check_archive(path: Path, tensors: bool = True) -> None:
    """Raise a UserError unless a file of torch.save is intact, and opening it takes no more memory than its size.

    Args:
        tensors: check the bytes of the tensors, too, not only what describes them.
    """
    try:
        with ZipFile(path) as archive, ThreadPoolExecutor(os.cpu_count()) as pool:
            members = archive.infolist()
            inflated = any(member.compress_type != ZIP_STORED for member in members)
            descriptions = [member for member in members if "/data/" not in member.filename]
            excessive = sum(member.file_size for member in descriptions) > MAX_PICKLE
            checked = [] if inflated or excessive else members if tensors else descriptions
            problems = [name for name in pool.map(partial(damage, archive), checked) if name]
    except Exception:  # the standard library's parser raises a dozen kinds
        raise UserError(
            f"{path} is truncated, or not a checkpoint of PyTorch 1.6 or later; copy or convert it again"
        ) from None
    if inflated or excessive:
        raise UserError(f"{path} would take far more memory than its size, and was not opened; get it from elsewhere")
    if problems:
        raise UserError(f"{path} is damaged: its {problems[0]} does not match its checksum; copy or write it again")


def damage(archive: ZipFile, member: ZipInfo) -> str:
    """The name of a member whose bytes do not have its CRC32, which zipfile compares at their end; else ""."""
    try:
        with archive.open(member) as file:
            while file.read(CHUNK):
                pass
    except BadZipFile:
        return member.filename.partition("/")[2]
    return ""


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


def checksum(content: Any) -> str:
    """A sha256 of nested mappings, lists, values and tensors; of a tensor, its CRC32 takes part."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(describe_leaf, leaves(content)):
            digest.update(part.encode())
    return digest.hexdigest()


def leaves(content: Any) -> Iterator[Any]:
    """All values in order; what they are in shows as names and numbers of items between them."""
    if isinstance(content, Mapping):
        yield f"{len(content)} named"
        for name, value in content.items():
            yield name
            yield from leaves(value)
    elif isinstance(content, list | tuple):
        yield f"{len(content)} listed"
        for value in content:
            yield from leaves(value)
    else:
        yield content


def describe_leaf(value: Any) -> str:
    if not is_plain(value):
        return f"{type(value).__name__} {value!r}\n"
    crc = zlib.crc32(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{value.dtype} {tuple(value.shape)} {crc}\n"


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose numbers all lie in memory or in its file, one by one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def sealed(fields: Mapping[str, Any]) -> str:
    """Fields as JSON, with a checksum of them."""
    return json.dumps({**fields, SEAL: seal(fields)}, indent=2)


def seal(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def unsealed(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a JSON file that `sealed` made, or that has no checksum; a UserError if they have changed."""
    rest = {name: value for name, value in fields.items() if name != SEAL}
    if SEAL in fields and fields[SEAL] != seal(rest):
        raise UserError(f'{path} is damaged or was edited: it does not match its "{SEAL}"; remove that to keep an edit')
    return rest


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
