"""Where records come from: rows of files in many forms, and of data sets; and their split."""

import csv
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from lit_llama.data.records import Row, parse, parse_line
from lit_llama.errors import UserError, short

import numpy as np

SUFFIXES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet"}  # of files, not of data sets on the hub
DELIMITERS = ",;\t|"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how a file in it begins


def read_rows(source: Path) -> Iterator[Row]:
    """The rows of a file or data set, one by one. Text files may be compressed with gzip."""
    suffix = Path(source.name.lower().removesuffix(".gz")).suffix
    if source.is_file() and suffix == ".txt":
        return iter([("it", {"text": read_all(source)})])
    if source.is_file():
        return {".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}.get(suffix, json_rows)(source)
    is_name = len(source.parts) == 2 and suffix not in SUFFIXES and not source.parent.exists()  # of a data set
    if source.is_dir() or is_name:
        return dataset_rows(source)
    raise UserError(f"{source} does not exist")


def open_binary(source: Path) -> Any:
    with open(source, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(source) if is_gzip else open(source, "rb")


def open_lines(source: Path) -> Iterator[bytes]:
    """The lines of a file, as UTF-8 if it begins with the mark of UTF-16."""
    with open_binary(source) as file:
        if file.read(2) not in UTF_16:
            file.seek(0)
            yield from file
            return
    with open_text(source) as text:
        yield from map(str.encode, text)


@contextmanager
def open_text(source: Path) -> Iterator[io.TextIOWrapper]:
    """A file to be read as UTF-8, or as UTF-16 if it begins with the mark of that; a UserError says where it is not."""
    with open_binary(source) as file:
        encoding = "utf-16" if file.read(2) in UTF_16 else "utf-8-sig"
    try:
        with io.TextIOWrapper(open_binary(source), encoding, newline="") as file:
            yield file
    except UnicodeError:
        with open_binary(source) as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    place = f"line {number}, byte {error.start + 1}"
                    command = f"iconv -f CP1252 -t UTF-8 {quote(str(source))} > {quote(f'utf8-{source.name}')}"
                    raise UserError(f"{source} is not text in UTF-8 ({place}); convert it, as by {command}") from None
        raise UserError(f"{source} is not text in UTF-8 or UTF-16") from None


def read_all(source: Path) -> str:
    with open_text(source) as file:
        return file.read()


def csv_rows(source: Path) -> Iterator[Row]:
    """The rows of a table under its header; its delimiter is what divides the header into most cells."""
    csv.field_size_limit(2**31 - 1)
    names: list[str] = []
    line = 1
    try:
        with open_text(source) as file:
            first = file.readline()
            stated = re.fullmatch(r"sep=(.)\r?\n", first)  # as Excel has it
            delimiter = stated[1] if stated else max(DELIMITERS, key=first.count)
            lines = chain(["\n" if stated else first], file)
            for cells in (reader := csv.reader(lines, strict=True, delimiter=delimiter)):
                while len(cells) > len(names) > 0 and not cells[-1].strip():
                    cells.pop()
                if any(map(str.strip, cells)) and not names:
                    names = [name.strip() for name in cells]
                    if twice := [name for name in names if name and names.count(name) > 1]:
                        raise UserError(f"{source}: two columns are called {short(twice[0])}; rename one")
                elif any(map(str.strip, cells)):
                    fits, found = len(cells) == len(names), f"has {len(cells)} cells, expected {len(names)}"
                    wrong = f"{found} as in the header (quote cells that contain a delimiter)"
                    yield f"line {line}", dict(zip(names, cells, strict=True)) if fits else ValueError(wrong)
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}, line {line}: not valid CSV ({error}); mend its quotes") from None


def json_rows(source: Path) -> Iterator[Row]:
    """The values of a JSON list, of the one list in a JSON object, or of the lines of a JSONL file."""
    if has_lines(source):
        yield from ((f"line {number}", line) for number, line in enumerate(open_lines(source), 1) if line.strip())
        return
    try:
        content = parse(read_all(source))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is neither a JSON list nor JSON lines: {error}") from None
    if isinstance(content, dict) and len(content) == 1:
        ((name, value),) = content.items()
        content = value if isinstance(value, list) and name not in ("messages", "conversations") else content
    yield from ((f"record {i}", row) for i, row in enumerate(content if isinstance(content, list) else [content], 1))


def has_lines(source: Path) -> bool:
    """Whether a file is JSON lines: more follow the first, which is a value (in a .jsonl file, may be a broken one)."""
    filled = (line for line in open_lines(source) if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    try:
        parse_line(first)
    except ValueError:
        return bool(second) and ".jsonl" in source.suffixes and not first.lstrip().startswith(b"[")
    return bool(second)


def parquet_rows(source: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(source).iter_batches() for row in batch.to_pylist())
        yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
    except (ArrowException, OSError) as error:
        raise UserError(f"{source} is not a valid parquet file ({str(error).splitlines()[0]}); get it again") from None


def dataset_rows(source: Path) -> Iterator[Row]:
    """The training split of a data set, by the library `datasets`: a folder, or a name on the hub."""
    from datasets import load_dataset

    try:
        rows = load_dataset(str(source), split="train")
    except Exception as error:  # of the library, or of one of the many beneath it
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{source} is not a file, and could not be read as a data set ({reason})") from None
    return ((f"row {i}", row) for i, row in enumerate(rows, 1))


def split_records(n: int, n_validation: int | None, seed: int) -> dict[str, np.ndarray]:
    """The numbers of `n` records, shuffled, and `n_validation` held out (None: 2,000, or a tenth if that is less)."""
    if n_validation is None:
        n_validation = min(2000, n // 10)
    if not 0 <= n_validation < n:
        raise UserError(f"cannot hold out {n_validation} of {n} records for validation; lower --val_split_size")
    order = shuffled(n, np.random.default_rng(seed))
    return {"train": order[n_validation:], "validation": order[:n_validation]}


def shuffled(n: int, rng: np.random.Generator) -> np.ndarray:
    """What rng.permutation(n) gives, in half the memory."""
    order = np.arange(n, dtype=np.int32)
    rng.shuffle(order)
    return order
