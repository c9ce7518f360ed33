"""The tensors of a sharded run on disk: each process writes its rows to a folder, by torch.distributed.checkpoint.

The files are in the safetensors format, which holds no code. Any number of processes, sharded or not, can read them:
each reads the rows that it stores.
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.storage import files
from lit_llama.storage.files import as_user_error, flush
from lit_llama.storage.integrity import size_and_digest

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FILE_SIZE = 2**27  # bytes that a process writes at once: it holds two copies of them


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write sharded tensors to a new folder; called by all processes.

    Returns:
        the size and the sha256 of each file, by its name.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    ends = itertools.accumulate(tensor.numel() * tensor.itemsize // n for tensor in tensors.values())
    places = {name: 1 + end // FILE_SIZE for name, end in zip(tensors, ends, strict=True)}
    with as_user_error(folder), raising_cause():
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), places, save_distributed=True))
        flush(folder)
    digests: list[dict[str, str]] = [{}] * n
    mine = folder.glob(f"shard-{rank + 1:05}-*")
    dist.all_gather_object(digests, {path.name: size_and_digest(path) for path in mine})
    return {name: digest for each in digests for name, digest in each.items()}


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or not, from a folder; called by all processes."""
    with raising_cause(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        alone = not dist.is_initialized()
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def describe_shards(folder: Path) -> dict[str, Tensor]:
    """The names, shapes and dtypes of the tensors in a folder, as tensors without numbers."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, LookupError) as error:  # if digests were not compared
        raise UserError(f"{folder} has a file that cannot be read ({str(error).splitlines()[0]})") from None
    tensors = {name: kind for name, kind in found.items() if isinstance(kind, TensorStorageMetadata)}
    with FakeTensorMode():
        return {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in tensors.items()}


def check_shards(folder: Path, digests: Mapping[str, str], rank: int, n: int) -> None:
    """Raise a UserError unless a folder has just the files that were written, as far as one of `n` processes looks."""
    remedy = "copy the folder again; a run without it has to start over, in another --out_dir"
    found = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(digests.keys() ^ found):
        problem = "is missing" if name in digests else "does not belong to the state"
        raise UserError(f"{folder / name} {problem}; {remedy}")
    for name in sorted(digests)[rank::n]:
        whole = size_and_digest(folder / name) == digests[name]
        if files.check_all and not whole:
            raise UserError(f"{folder / name} is damaged: it does not match its checksum; {remedy}")


@contextmanager
def raising_cause() -> Iterator[None]:
    """Raise what went wrong on the first process where something did."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None
