"""Prepared folders: records, tokenised once, in the order of their files.

`tokens.bin` holds the tokens of all records, one record after the other: record i is tokens[offsets[i]:offsets[i + 1]].
Those in tokens[start:end], for each of the spans (start, end), are trained on. `documents.bin` has the numbers of the
records that are documents, which are cut into blocks. A split (`train.bin`, `validation.bin`)
is a list of record numbers. `meta.json` says what all of this was made from.
"""

import hashlib
import json
import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from lit_llama.data.records import Fields, Row, conversation
from lit_llama.data.sources import read_rows, split_records
from lit_llama.errors import UserError
from lit_llama.progress import progress, say
from lit_llama.prompt import STYLES, encode, stored_template, turn_end
from lit_llama.storage import files
from lit_llama.storage.checks import check_types
from lit_llama.storage.integrity import digest
from lit_llama.tokenizer import Tokenizer

import numpy as np
from torch.utils.data import DataLoader, Dataset

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CHUNK = 128  # rows that a process is given at once
FEW = 16  # chunks that are tokenised before other processes would be ready
MOST_REASONS = 5  # that are named
BLOCK = 2**18  # values of an array that are checked at once
TYPES = {
    "tokens": "<i4", "offsets": "<i8", "spans": "<i8", "documents": "<i4", "train": "<i4", "validation": "<i4",
}  # fmt: skip
DATA_FILES = rf"meta\.json|({'|'.join(TYPES)})\.bin|(train|validation)_\w+\.npy"  # .npy: of earlier versions
META = {"sources": list, "tokenizer": str, "prompt_style": str, "records": Mapping}
META |= {"split_seed": int | None, "sha256": Mapping}


class Tokenised(NamedTuple):
    """Some rows of a source: n records, with T tokens and S spans in all, and what is wrong with the other rows."""

    tokens: np.ndarray  # (T,)
    ends: np.ndarray  # (n,) of the records
    spans: np.ndarray  # (S, 2)
    documents: np.ndarray  # (d,) which of the records are documents
    problems: list[tuple[str, str]]  # place and reason
    n_spelled: int  # records that spell control tokens


@dataclass(frozen=True)
class Encoder:
    """How rows of a source become tokens; with `skip_bad`, those that cannot be used are left out and counted."""

    tokenizer: Tokenizer
    template: str
    fields: Fields = field(default_factory=Fields)
    skip_bad: bool = False

    def tokenise(self, rows: list[Row]) -> Tokenised:
        """The tokens of records, each up to the last that is trained on."""
        tokens, ends, edges, documents, problems, n_spelled = [], [], [], [], [], 0
        for place, row in rows:
            try:
                record = conversation(row, self.fields)
                ids, trained = encode(self.template, record, self.tokenizer)
            except ValueError as error:
                problems.append((place, str(error)))
                continue
            except UserError as error:
                problems.append((place, f"does not fit: {error}"))
                continue
            changes = np.flatnonzero(np.diff(trained, prepend=False, append=False))  # where a span starts or ends
            edges += (len(tokens) + changes).tolist()
            tokens += ids[: changes[-1]]
            documents += [len(ends)] * (len(record) == 1)
            n_spelled += any(re.search(self.tokenizer.control_pattern, message.content) for message in record)
            ends.append(len(tokens))
        spans = np.array(edges, np.int64).reshape(-1, 2)
        arrays = np.array(tokens, np.int32), np.array(ends, np.int64), spans, np.array(documents, np.int64)
        return Tokenised(*arrays, problems, n_spelled)


def prepare(
    data_dir: Path,
    sources: Mapping[str, Path],
    encoder: Encoder,
    split_seed: int | None = None,
    n_validation: int | None = None,
    num_workers: int = 1,
) -> None:
    """Tokenise records into `data_dir`, whose earlier arrays are replaced as a whole.

    Args:
        sources: what the records of "train", and perhaps "validation", are read from.
        split_seed: if given, the records of "train" are shuffled, and some of them held out as "validation".
        n_validation: how many; None: 2,000, or a tenth if that is less.
        num_workers: processes that tokenise; the result does not depend on it.
    """
    for source in sources.values():
        if source.resolve().parent == data_dir.resolve() and re.fullmatch(DATA_FILES, source.name):
            raise UserError(f"{source} would be replaced; give another --data_dir")
    with files.replacing_folder(data_dir, DATA_FILES) as part:
        arrays, splits = ArrayFiles(part), {}
        for split, source in sources.items():
            splits[split] = arrays.append_records(tokenised(source, encoder, num_workers))
        if not len(splits["train"]):
            raise UserError(f"no training records in {sources['train']}")
        if split_seed is not None:
            splits = split_records(len(splits["train"]), n_validation, split_seed)
        for split, numbers in splits.items():
            arrays.append(split, numbers)
        checksums = {name: sha256.hexdigest() for name, sha256 in arrays.sha256.items()}
        meta = {
            "sources": [{"path": str(path), "sha256": identify(path, checksums)} for path in sources.values()],
            "tokenizer": encoder.tokenizer.fingerprint(),
            "prompt_style": STYLES["plain"] if arrays.n_documents == arrays.n_records else encoder.template,
            "split_seed": split_seed,
            "records": {split: len(numbers) for split, numbers in splits.items()},
            "sha256": checksums,
        }
        files.write_file(part / "meta.json", json.dumps(meta, indent=2))
    warn_if_few(len(splits.get("validation", ())))
    if arrays.n_documents < arrays.n_records and turn_end(encoder.template, encoder.tokenizer) is None:
        found = "the chat template puts no control token after an answer, so the model does not learn to end one"
        say(f"warning: {found}; choose another --prompt_style")


def warn_if_few(n: int) -> None:
    if n < 2:
        what = "one record to validate on: its loss says little" if n else "no records to validate on"
        say(f"warning: {what}; hold out more, or give a --validation_file")


def identify(source: Path, checksums: Mapping[str, str]) -> str:
    """sha256 of a file; of a data set that is not one file, of what was made of it."""
    return digest(source) if source.is_file() else hashlib.sha256(json.dumps(checksums).encode()).hexdigest()


def tokenised(source: Path, encoder: Encoder, num_workers: int) -> Iterator[Tokenised]:
    """The records of a source; at its end, a UserError or a line counts those that cannot be used, by reason."""
    n, n_spelled, places = 0, 0, defaultdict(list)
    results = in_processes(encoder.tokenise, chunks(source), num_workers)
    for chunk in progress(results, f"Tokenising {source.name}", "record", count=lambda chunk: len(chunk.ends)):
        yield chunk
        n += len(chunk.ends) + len(chunk.problems)
        n_spelled += chunk.n_spelled
        for place, reason in chunk.problems:
            places[reason].append(place)
    if n_spelled > n / 20:
        say(
            f"warning: {n_spelled:,} of {n:,} records of {source.name} spell control tokens, which are text there: "
            "if they have gone through a chat template already, give the messages instead"
        )
    if places:
        n_bad = sum(map(len, places.values()))
        found = f"{source}: {n_bad:,} of {n:,} records cannot be used: {count_reasons(places)}"
        if encoder.skip_bad:
            say(f"warning: {found}; they are left out")
            return
        named = {
            "has no '": "; name its fields: prepare_json.py --instruction_key question",
            "cannot be used here": "; leave out such fields: prepare_json.py --ignored_fields tools",
        }
        remedies = [remedy for sign, remedy in named.items() if any(sign in reason for reason in places)]
        raise UserError(f"{found}{''.join(remedies)}; mend the records, or leave them out with --skip_bad true")


def count_reasons(places: Mapping[str, list[str]]) -> str:
    """What is wrong with records, the most frequent first, and where."""
    reasons = sorted(places, key=lambda reason: -len(places[reason]))
    named = [f"{places[reason][0]} {reason}" for reason in reasons[:MOST_REASONS]]
    for i, reason in enumerate(reasons[:MOST_REASONS]):
        others = [*places[reason][1:3], *([f"{len(places[reason]) - 3:,} more"] if len(places[reason]) > 3 else [])]
        named[i] += f" (likewise {', '.join(others)})" if others else ""
    more = len(reasons) - MOST_REASONS
    return "; ".join(named) + (f"; and for {more} more reasons" if more > 0 else "")


def chunks(source: Path) -> Iterator[list[Row]]:
    try:
        rows = iter(read_rows(source))
        while chunk := list(islice(rows, CHUNK)):
            yield chunk
    except OSError as error:  # which would be taken for one of writing the folder
        raise UserError(f"could not read {source}: {error.strerror or error}") from None


class Identity(Dataset):
    """A data set whose item at an "index" is that index."""

    def __getitem__(self, index: Any) -> Any:
        return index


def in_processes(function: Callable[[Any], Any], arguments: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """function(argument) for each argument in turn, a few of them computed ahead by other processes."""
    arguments = iter(arguments)
    first = list(islice(arguments, FEW))
    yield from DataLoader(
        Identity(),
        sampler=chain(first, arguments),
        batch_size=None,
        collate_fn=function,
        num_workers=min(num_workers, N_CORES) if num_workers > 1 and len(first) == FEW else 0,
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


class ArrayFiles:
    """The .bin files of a folder, which grow part by part; `sha256` has the state of each one's checksum."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_tokens, self.n_records, self.n_documents = folder, 0, 0, 0
        self.sha256 = defaultdict(hashlib.sha256)
        self.append("offsets", np.zeros(1))

    def append(self, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, TYPES[name]).data
        with open(self.folder / f"{name}.bin", "ab") as file:
            file.write(data)
        self.sha256[name].update(data)

    def append_records(self, chunks: Iterable[Tokenised]) -> np.ndarray:
        """Write the records of a source; returns their numbers."""
        first = self.n_records
        for tokens, ends, spans, documents, *_ in chunks:
            self.append("tokens", tokens)
            self.append("offsets", self.n_tokens + ends)
            self.append("spans", self.n_tokens + spans)
            self.append("documents", self.n_records + documents)
            self.n_tokens += len(tokens)
            self.n_records += len(ends)
            self.n_documents += len(documents)
        return np.arange(first, self.n_records)


def read_split(data_dir: Path, split: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """meta.json, and the arrays of tokens, offsets, spans, documents and the split's records, checked and mapped."""
    try:
        if [*data_dir.glob("train_*.npy")]:
            raise UserError("it is of an earlier version")
        meta = files.read_json(data_dir / "meta.json")
        check_types(meta, META, {})
        stored_template(meta["prompt_style"])
        paths = [data_dir / f"{name}.bin" for name in ("tokens", "offsets", "spans", "documents", split)]
        arrays = [map_array(path) for path in paths]
        arrays[2] = arrays[2].reshape(-1, 2)
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"{data_dir} holds no prepared data ({error}); run one of scripts/prepare_*.py") from None
    if not files.check_all:
        say(f"{paths[0]} was read without comparing it with its checksum")
    checked = paths if files.check_all else paths[1:]
    wrong = [path.name for path in checked if digest(path) != meta["sha256"].get(path.stem)]
    wrong += [paths[i].name for i in inconsistent(*arrays)]
    if wrong:
        raise UserError(f"{data_dir} is damaged: {wrong[0]} does not match the rest; prepare the data again")
    return meta, arrays


def map_array(path: Path) -> np.ndarray:
    dtype = TYPES[path.stem]
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def inconsistent(tokens: np.ndarray, offsets: np.ndarray, spans: np.ndarray, *records: np.ndarray) -> Iterator[int]:
    """Which of the arrays, counted from 0, cannot be right, whatever the records were."""
    edges = spans.reshape(-1)  # starts and ends in turn
    if len(offsets) < 2 or (offsets[0], offsets[-1]) != (0, len(tokens)) or not is_increasing(offsets, 1):
        yield 1
    if not len(edges) or edges[0] < 0 or edges[-1] != len(tokens) or not is_increasing(edges, 0):
        yield 2
    for i, numbers in enumerate(records, 3):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(offsets) - 1:
            yield i


def is_increasing(array: np.ndarray, min_step: int) -> bool:
    return all((np.diff(array[i : i + BLOCK + 1]) >= min_step).all() for i in range(0, len(array), BLOCK))
