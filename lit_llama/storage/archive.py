"""Writing a file of torch.save tensor by tensor, so that a process can write a model that it could not hold.

Torch lays out the file without the tensors' bytes. They are put into their places one by one, and with them the CRC32
that torch would have stored: a file has it after the bytes of each tensor, and again in the directory at its end.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data


def write_tensors(path: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write what torch.save would.

    Args:
        layout: names, shapes and dtypes; what is one tensor under several names is stored once.
        tensors: each of those once, on the CPU, in the order of `layout`. None is kept.
    """
    with FakeTensorMode():
        empty = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in layout.values()}
    with skip_data(materialize_fake_tensors=True):
        torch.save({name: empty[id(tensor)] for name, tensor in layout.items()}, path)
    crcs = {}
    with open(path, "r+b") as file:
        with ZipFile(file) as archive:
            places = [member for member in archive.infolist() if "/data/" in member.filename]
            directory = archive.start_dir
        pieces = iter(tensors)
        for member in places:
            crcs[member.filename] = write_member(file, member, *next(pieces))
        write_directory(file, directory, crcs)


def write_member(file: BinaryIO, member: ZipInfo, name: str, tensor: Tensor) -> int:
    """Write a tensor into its place; returns its CRC32. It is let go on return, before the next one is made."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if content.nbytes != member.file_size:
        raise ValueError(f"{name} has {content.nbytes} bytes, expected {member.file_size}")
    crc = zlib.crc32(content)
    if content.nbytes:  # else nothing follows the header
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<2H", file.read(4))  # of the name and the padding between header and content
        file.seek(member.header_offset + 30 + sum(lengths))
        file.write(content)
        file.write(b"PK\x07\x08" + struct.pack("<I", crc))
    return crc


def write_directory(file: BinaryIO, place: int, crcs: Mapping[str, int]) -> None:
    """Enter the CRC32s of members, by their names, into the directory of an archive, which begins at `place`."""
    file.seek(place)
    while (entry := file.read(46))[:4] == b"PK\x01\x02":
        lengths = struct.unpack("<3H", entry[28:34])  # of the name and of two more fields
        name = file.read(lengths[0]).decode()
        if name in crcs:
            file.seek(place + 16)
            file.write(struct.pack("<I", crcs[name]))
        place += 46 + sum(lengths)
        file.seek(place)
