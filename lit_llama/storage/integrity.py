"""Whether a file is what was written: checksums, and fingerprints by which a file is recognised.

A file of torch.save is a zip archive in which each tensor's bytes, and what describes them, are members, uncompressed
and with a CRC32. That is checked when the file is read, whoever wrote it.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

from lit_llama.errors import UserError

MAX_PICKLE = 4 * 2**20  # bytes; that of a model of 70 billion weights takes 100,000
CHUNK = 2**20
THREADS = 8  # that compute checksums, faster than disks are


def check_archive(path: Path, tensors: bool = True) -> None:
    """Raise a UserError unless a file of torch.save is intact, and opening it takes no more memory than its size.

    Without `tensors`, only what describes them is checked.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
        described = [member for member in members if "/data/" not in member.filename]
        inflated = any(member.compress_type != ZIP_STORED for member in members)
        excessive = inflated or sum(member.file_size for member in described) > MAX_PICKLE
        names = [member.filename for member in (members if tensors else described) if not excessive]
        shares = [names[i::THREADS] for i in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            damaged = next(filter(None, pool.map(partial(first_damaged, path), shares)), "")
    except Exception:  # the standard library's parser raises a dozen kinds
        problem = "is truncated, or not a checkpoint of PyTorch 1.6 or later"
        raise UserError(f"{path} {problem}; copy or convert it again") from None
    if excessive:
        raise UserError(f"{path} would take far more memory than its size, and was not opened; get it from elsewhere")
    if damaged:
        name = damaged.partition("/")[2]
        raise UserError(f"{path} is damaged: its {name} does not match its checksum; copy or write it again")


def first_damaged(path: Path, names: Sequence[str]) -> str | None:
    """The first of these members of an archive that does not match its CRC32."""
    with ZipFile(path) as archive:  # of this thread: shared, Python 3.12 and 3.13 report good files as damaged
        archive.filelist = [archive.getinfo(name) for name in names]
        return archive.testzip()


def fingerprint(path: Path) -> str:
    """What tells a file of torch.save from others: a digest of the names, shapes and numbers of its tensors."""
    check_archive(path, tensors=False)
    with ZipFile(path) as archive:
        crcs = [m.CRC for m in archive.infolist() if "/data/" in m.filename or m.filename.endswith("/data.pkl")]
    return hashlib.sha256(repr(crcs).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """The sha256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            sha256.update(block)
    return sha256.hexdigest()
