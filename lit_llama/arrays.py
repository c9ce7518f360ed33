"""Arrays that may be larger than memory: written part by part, and read back in another order."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

BLOCK = 2**18  # values of an array that are looked at at a time
MOST_PIECES, MOST_VALUES = 2**16, 2**22  # that are read at a time


def number_type(n: int) -> type[np.signedinteger]:
    """The type of numbers up to n: four bytes if that is enough."""
    return np.int32 if n < 2**31 else np.int64


def rises(array: np.ndarray, least: int) -> bool:
    """Whether each number is by at least so much larger than the one before it."""
    return all((np.diff(array[i : i + BLOCK + 1]) >= least).all() for i in range(0, len(array), BLOCK))


class Spool:
    """Pieces of int32 of any length in a temporary file, added one after the other and then read in any order.

    Attributes:
        starts: (n + 1,) the place of each piece, and the end of the last; once `complete` was called.
    """

    def __init__(self, folder: Path) -> None:
        self.file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close
        self.added = bytearray()  # the lengths so far
        self.starts = np.empty(0, np.int64)

    def close(self) -> None:
        self.file.close()

    def add(self, pieces: np.ndarray, lengths: np.ndarray) -> None:
        """Append some pieces, given as one array, and the length of each as int32."""
        self.file.write(pieces.data)
        self.added += lengths.data

    def complete(self) -> None:
        lengths = np.frombuffer(self.added, np.int32)
        self.starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self.starts[1:])
        self.added = bytearray()

    def lengths(self, chosen: np.ndarray) -> np.ndarray:
        """How long the pieces are that are chosen by their numbers."""
        return self.starts[chosen + 1] - self.starts[chosen]

    def total(self, chosen: np.ndarray) -> int:
        """How long they are together."""
        return sum(int(self.lengths(block).sum()) for block in self.blocks(chosen))

    def blocks(self, chosen: np.ndarray) -> Iterator[np.ndarray]:
        """The same, as many at a time as should be read at a time."""
        for first in range(0, len(chosen), MOST_PIECES):
            block = chosen[first : first + MOST_PIECES]
            ends = np.cumsum(self.lengths(block))
            cuts = np.searchsorted(ends, np.arange(MOST_VALUES, ends[-1], MOST_VALUES))
            yield from (part for part in np.split(block, cuts) if len(part))

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """These pieces, one after the other. The disk is read in the order of the file."""
        starts, lengths = self.starts[chosen].tolist(), self.lengths(chosen).tolist()
        pieces = [b""] * len(chosen)
        for i in np.argsort(chosen).tolist():
            self.file.seek(4 * starts[i])
            pieces[i] = self.file.read(4 * lengths[i])
        return np.frombuffer(b"".join(pieces), np.int32)


class ArrayFile:
    """A .npy file as np.save writes it, whose rows come in parts; `sha256` is of its numbers."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...]) -> None:
        self.dtype, self.sha256 = np.dtype(dtype), hashlib.sha256()
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self) -> None:
        self.file.close()

    def write(self, part: np.ndarray) -> None:
        data = np.ascontiguousarray(part, self.dtype).data
        self.file.write(data)
        self.sha256.update(data)
