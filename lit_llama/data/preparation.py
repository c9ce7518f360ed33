"""Prepared folders: records, tokenised once, in the order of their files.

`tokens.bin` holds the tokens of all records, one record after the other: record i is tokens[offsets[i]:offsets[i + 1]].
Those in tokens[start:end], for each of the spans (start, end), are trained on. `documents.bin` has the numbers of the
records that are documents, which are cut into blocks. A split (`train.bin`, `validation.bin`) is a list of record
numbers. `meta.json` says what all of this was made from.
"""

import json
import os
import re
import signal
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lit_llama.data.records import Fields, Row, conversation
from lit_llama.data.sources import read_rows, split_records
from lit_llama.errors import UserError
from lit_llama.progress import progress, say
from lit_llama.prompt import STYLES, encode, name_of, stored_template
from lit_llama.storage import files
from lit_llama.storage.checks import check_types
from lit_llama.storage.integrity import digest
from lit_llama.tokenizer import Tokenizer

import numpy as np
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CHUNK = 128  # rows that a process is given at once
FEW = 16  # chunks that are tokenised before other processes would be ready
MOST_REASONS = 5  # that are named
TYPES = {
    "tokens": "<i4", "offsets": "<i8", "spans": "<i8", "documents": "<i4", "train": "<i4", "validation": "<i4",
}  # fmt: skip
DATA_FILES = rf"meta\.json|({'|'.join(TYPES)})\.bin"
META = {"sources": list, "tokenizer": str, "prompt_style": str, "records": Mapping}
META |= {"split_seed": int | None, "sha256": Mapping}


@dataclass(frozen=True)
class Encoder(Dataset):
    """How rows of a source become tokens; with `skip_bad`, those that cannot be used are left out and counted.

    For torch, it is a data set: an index is a list of rows.
    """

    tokenizer: Tokenizer
    template: str
    fields: Fields = field(default_factory=Fields)
    skip_bad: bool = False

    def __getitem__(self, rows: list[Row]) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
        """The arrays of some records, each up to its last token that is trained on, and what is wrong with other rows.

        The offsets are where records end; all numbers count from the first of these records.
        """
        tokens, ends, spans, documents, problems = [], [], [], [], []
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
            flags = np.array([False, *trained, False])
            changes = np.flatnonzero(flags[1:] != flags[:-1])  # where a span starts or ends
            spans += (len(tokens) + changes).tolist()
            tokens += ids[: changes[-1]]
            documents += [len(ends)] * (len(record) == 1)
            ends.append(len(tokens))
        found = {"tokens": tokens, "offsets": ends, "spans": spans, "documents": documents}
        return {name: np.array(values, TYPES[name]) for name, values in found.items()}, problems


def prepare(
    data_dir: Path,
    sources: Mapping[str, Path],
    encoder: Encoder,
    split_seed: int | None = None,
    n_validation: int | None = None,
    num_workers: int = 1,
) -> None:
    """Tokenise the records of "train", and perhaps "validation", into `data_dir`, which is replaced as a whole.

    With a `split_seed`, those of "train" are shuffled, and `n_validation` of them held out (None: 2,000, or a tenth if
    that is less). The result does not depend on the number of processes that tokenise.
    """
    for source in sources.values():
        if source.resolve().parent == data_dir.resolve() and re.fullmatch(DATA_FILES, source.name):
            raise UserError(f"{source} would be replaced; give another --data_dir")
    with files.replacing_folder(data_dir, DATA_FILES) as part:
        append(part, "offsets", np.zeros(1))
        splits, n_tokens, n, n_documents = {}, 0, 0, 0  # n records in all
        for split, source in sources.items():
            first = n
            for arrays in tokenised(source, encoder, num_workers):
                before = {"tokens": 0, "offsets": n_tokens, "spans": n_tokens, "documents": n}
                for name, array in arrays.items():
                    append(part, name, array + before[name])
                n_tokens += len(arrays["tokens"])
                n += len(arrays["offsets"])
                n_documents += len(arrays["documents"])
            splits[split] = np.arange(first, n)
        if not len(splits["train"]):
            raise UserError(f"no training records in {sources['train']}")
        if split_seed is not None:
            splits = split_records(len(splits["train"]), n_validation, split_seed)
        for split, numbers in splits.items():
            append(part, split, numbers)
        names = "offsets", "tokens", "spans", "documents", *splits
        meta = {
            "sources": [
                {"path": str(path), "sha256": digest(path) if path.is_file() else None} for path in sources.values()
            ],
            "tokenizer": encoder.tokenizer.fingerprint(),
            "prompt_style": STYLES["plain"] if n_documents == n else encoder.template,
            "split_seed": split_seed,
            "records": {split: len(numbers) for split, numbers in splits.items()},
            "sha256": {name: digest(part / f"{name}.bin") for name in names},
        }
        files.write_file(part / "meta.json", json.dumps(meta, indent=2))
    n_held_out, style = len(splits.get("validation", ())), name_of(str(meta["prompt_style"]))
    say(f"Saved {data_dir}, prompt style {style}: {len(splits['train']):,} records, and {n_held_out:,} to validate on")
    if n_held_out < 2:
        what = "one record to validate on: its loss says little" if n_held_out else "no records to validate on"
        say(f"warning: {what}; give more, as by --val_split_size")


def append(folder: Path, name: str, array: np.ndarray) -> None:
    with open(folder / f"{name}.bin", "ab") as file:
        file.write(np.ascontiguousarray(array, TYPES[name]).data)


def tokenised(source: Path, encoder: Encoder, num_workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The records of a source; at its end, a UserError or a line counts those that cannot be used, by reason."""
    n_rows, places = 0, defaultdict(list)
    results = in_processes(encoder, chunks(source), num_workers)
    what = f"Tokenising {source.name}"
    for arrays, problems in progress(results, what, "record", count=lambda result: len(result[0]["offsets"])):
        yield arrays
        n_rows += len(arrays["offsets"]) + len(problems)
        for place, reason in problems:
            places[reason].append(place)
    if places:
        n_bad = sum(map(len, places.values()))
        found = f"{source}: {n_bad:,} of {n_rows:,} records cannot be used: {count_reasons(places)}"
        if encoder.skip_bad:
            say(f"warning: {found}; they are left out")
            return
        named = {
            "has no '": "; name its fields: prepare_json.py --instruction_key question",
            "cannot be used here": "; leave out such fields, as by --ignored_fields tools",
        }
        remedies = [remedy for sign, remedy in named.items() if any(sign in reason for reason in places)]
        raise UserError(f"{found}{''.join(remedies)}; mend the records, or leave them out with --skip_bad true")


def count_reasons(places: Mapping[str, list[str]]) -> str:
    """What is wrong with records, the most frequent first, and where."""
    named = []
    for reason, (first, *others) in sorted(places.items(), key=lambda item: -len(item[1])):
        if len(others) > 2:
            others[2:] = [f"{len(others) - 2:,} more"]
        likewise = f" (likewise {', '.join(others)})" if others else ""
        named.append(f"{first} {reason}{likewise}")
    if (n_more := len(named) - MOST_REASONS) > 0:
        named[MOST_REASONS:] = [f"and {n_more} more reason{'s' * (n_more > 1)}"]
    return "; ".join(named)


def chunks(source: Path) -> Iterator[list[Row]]:
    try:
        rows = read_rows(source)
        while chunk := list(islice(rows, CHUNK)):
            yield chunk
    except ImportError:
        raise UserError(f"to read {source}, run: pip install -e '.[data]'; or give a JSON, JSONL or CSV file") from None
    except (OSError, EOFError, zlib.error) as error:  # also of a truncated .gz
        raise UserError(f"could not read {source}: {getattr(error, 'strerror', None) or error}") from None


def in_processes(items: Dataset, indices: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """items[index], a tuple, for each index in turn, a few of them computed ahead by other processes."""
    indices = iter(indices)
    first = list(islice(indices, FEW))
    yield from DataLoader(
        items,
        sampler=chain(first, indices),
        batch_size=None,
        collate_fn=tuple,  # it stays as it is
        num_workers=min(num_workers, N_CORES) if num_workers > 1 and len(first) == FEW else 0,
        worker_init_fn=end_with_parent,
    )


def end_with_parent(_worker: int) -> None:
    """If the parent is killed, Linux ends this process, too: it might wait for ever, and hold the parent's locks."""
    multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyrefly: ignore


def read_split(data_dir: Path, split: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """meta.json, and the arrays of tokens, offsets, spans, documents and the split's records, checked and mapped."""
    try:
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
    if wrong := [path.name for path in checked if digest(path) != meta["sha256"].get(path.stem)]:
        raise UserError(f"{data_dir} is damaged: {wrong[0]} does not match the rest; prepare the data again")
    return meta, arrays


def map_array(path: Path) -> np.ndarray:
    dtype = TYPES[path.stem]
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
