"""Records as tokens, by several processes.

Records are read twice, as a stream: to check and count them, and to tokenise them into temporary files, from where they
can be written in any order. Only where each record begins is kept in memory.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lit_llama.arrays import Spool
from lit_llama.errors import UserError
from lit_llama.progress import progress
from lit_llama.prompt import PromptStyle, encode
from lit_llama.records import Fields, Row, conversation, read_rows
from lit_llama.tokenizer import Tokenizer

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CHUNK = 128  # records that a process is given at once
FEW = 16  # chunks that are done sooner than other processes are started


class Tokenised(NamedTuple):
    """Some records, one after the other: n of them, with T tokens and S spans in all."""

    tokens: np.ndarray  # (T,)
    lengths: np.ndarray  # (n,) tokens of each record
    edges: np.ndarray  # (2 S,) where spans start and end, in turn, counted from the start of their record
    n_edges: np.ndarray  # (n,) of each record
    documents: np.ndarray  # (n,) whether each is one


@dataclass(frozen=True)
class Encoder:
    """How rows of a file become tokens."""

    tokenizer: Tokenizer
    prompt_style: PromptStyle
    fields: Fields = field(default_factory=Fields)

    def tokenise(self, rows: list[Row]) -> Tokenised | str:
        """The tokens of records, without what comes after the last that is trained on; or what is wrong with one.

        It is not raised, since what is raised in another process arrives with its traceback as its text.
        """
        tokens, spans, documents = [], [], []
        for place, row in rows:
            try:
                record = conversation(row, self.fields)
                ids, trained = encode(self.prompt_style, record, self.tokenizer)
            except (ValueError, UserError) as error:
                return f"{place}: {error}"
            edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))  # where a span starts or ends
            tokens.append(np.array(ids[: edges[-1]], np.int32))
            spans.append(edges.astype(np.int32))
            documents.append(len(record) == 1)
        lengths, n_edges = (np.array(list(map(len, arrays)), np.int32) for arrays in (tokens, spans))
        return Tokenised(np.concatenate(tokens), lengths, np.concatenate(spans), n_edges, np.array(documents))


def check(rows: list[Row], fields: Fields) -> tuple[int, list[str]]:
    """How many rows there are, and of each that is not a record, its place and what is wrong with it."""
    problems = []
    for place, row in rows:
        try:
            conversation(row, fields)
        except (ValueError, UserError) as error:
            problems.append(f"{place} {error}")
    return len(rows), problems


def count_records(source: Path, fields: Fields, num_workers: int = 1) -> int:
    """How many records a source has; a UserError counts those that cannot be used, and names the first three."""
    n, n_problems, first = 0, 0, []
    results = in_processes(partial(check, fields=fields), chunks(source), num_workers)
    for size, problems in progress(results, f"Checking {source.name}", "record", count=lambda result: result[0]):
        n, n_problems, first = n + size, n_problems + len(problems), (first + problems)[:3]
    if n_problems:
        more = f" (and {n_problems - 3} more)" if n_problems > 3 else ""
        raise UserError(
            f"{source}: {n_problems} of {n} records cannot be used: {'; '.join(first)}{more}; "
            "fix or remove them, or name the fields, as in --instruction_key question"
        )
    return n


def chunks(source: Path) -> Iterator[list[Row]]:
    rows = iter(read_rows(source))
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


class Calls(TorchDataset):
    """A data set whose item at an "index" is a function of that."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, argument: Any) -> Any:
        return self.function(argument)


def in_processes(function: Callable[[Any], Any], arguments: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """function(argument) for each argument in turn, a few of them computed ahead by other processes."""
    arguments = iter(arguments)
    first = list(islice(arguments, FEW))
    n = min(num_workers, N_CORES) if num_workers > 1 and len(first) == FEW else 0
    yield from DataLoader(
        Calls(function),
        sampler=chain(first, arguments),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=n,
        worker_init_fn=end_with_parent,
    )


def end_with_parent(_worker: int) -> None:
    """If the parent is killed, end this process: it would wait for ever to hand over results, and hold its locks."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def as_it_is(result: Any) -> Any:
    """Instead of DataLoader's default, which makes tensors of arrays."""
    return result


class Spools(NamedTuple):
    """All records of a source, tokenised, in its order."""

    tokens: Spool
    edges: Spool
    documents: np.ndarray  # (n,) whether each is one


@contextmanager
def tokenised(source: Path, n: int, encoder: Encoder, folder: Path, num_workers: int) -> Iterator[Spools]:
    """The `n` records of a source, tokenised into temporary files in `folder`."""
    with closing(Spool(folder)) as tokens, closing(Spool(folder)) as edges:
        documents = bytearray()
        results = in_processes(encoder.tokenise, chunks(source), num_workers)
        for result in progress(results, f"Tokenising {source.name}", "record", n=n, count=lambda r: len(r.lengths)):
            if isinstance(result, str):
                raise UserError(f"{source}, {result}")
            tokens.add(result.tokens, result.lengths)
            edges.add(result.edges, result.n_edges)
            documents += result.documents.data
        tokens.complete()
        edges.complete()
        if len(tokens.starts) - 1 != n:
            raise UserError(f"{source} was changed while it was read; run this again")
        yield Spools(tokens, edges, np.frombuffer(documents, bool))
