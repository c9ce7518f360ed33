"""Records to learn from, read from files of many forms: each is a conversation, or a document.

A record is an object with "instruction", "output" and perhaps "input" (Alpaca), with "messages" of "role" and "content"
(OpenAI, Hugging Face) or "conversations" of "from" and "value" (ShareGPT), or with "text", a document to be trained on
as a whole. What a file calls these fields can be said with `Fields`.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

from lit_llama.errors import UserError
from lit_llama.prompt import Message, Role, check_order
from lit_llama.storage.files import parse_json, read_text, write_file

import numpy as np

Conversation = list[Message]  # of a document: the answer alone
Row = tuple[str, object]  # its place, such as "line 3", and what is there; bytes are a line of JSON, not yet parsed
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@dataclass(frozen=True)
class Fields:
    """What the fields of a record are called in its file."""

    instruction: str = "instruction"
    input: str = "input"  # the only one that a record may lack
    output: str = "output"
    messages: str = "messages"
    text: str = "text"


def conversation(row: object, fields: Fields) -> Conversation:
    """The messages of a record; a ValueError says what is wrong with it."""
    row = parse_line(row) if isinstance(row, bytes) else row
    if not isinstance(row, dict):
        raise ValueError(f"is of type {type(row).__name__}, not an object with fields")
    turns = row.get(fields.messages, row.get("conversations"))
    if turns is not None:
        messages = [message(turn) for turn in turns] if isinstance(turns, list) else []
    elif fields.text in row and fields.instruction not in row:
        messages = [Message("assistant", text_of(row, fields.text))]
    else:
        context = text_of(row, fields.input) if row.get(fields.input) else ""
        question = Message("user", text_of(row, fields.instruction), context)
        messages = [question, Message("assistant", text_of(row, fields.output))]
    check_order(messages)
    if messages[-1].role != "assistant":
        raise ValueError("ends in a question, not in an answer to learn from")
    return messages


def parse_line(line: bytes) -> object:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 (byte {error.start})") from None
    except ValueError:
        raise ValueError("is not valid JSON") from None


def message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError("has a message that is not an object with role and content")
    name = str(turn.get("role", turn.get("from")))
    role: Any = ROLES.get(name, name)
    if role not in get_args(Role):
        raise ValueError(f"has a message of role {name!r}, not one of {', '.join(get_args(Role))}")
    return Message(role, text_of(turn, "content" if "content" in turn else "value"))


def text_of(row: dict[str, Any], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        what = f"has no {name!r}, only {', '.join(map(repr, row))}" if name not in row else f"has no text in {name!r}"
        raise ValueError(what)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a character (a lone surrogate) in {name!r}") from None
    return text


def read_rows(source: Path) -> Iterator[Row]:
    """The rows of a file or data set, one by one."""
    readers = {".csv": csv_rows, ".txt": document, ".json": json_rows, ".jsonl": json_rows}
    if source.is_dir() or source.suffix == ".parquet" or (not source.exists() and len(source.parts) == 2):
        return dataset_rows(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist")
    return readers.get(source.suffix, json_rows)(source)


def document(source: Path) -> Iterator[Row]:
    yield "it", {"text": read_text(source).removeprefix("\ufeff")}


def csv_rows(source: Path) -> Iterator[Row]:
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", {str(name): value for name, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{source}, line {reader.line_num}: not valid CSV ({error})") from None
        except UnicodeDecodeError:
            raise UserError(f"{source} is not text in UTF-8 (after line {reader.line_num}); convert it") from None


def json_rows(source: Path) -> Iterator[Row]:
    """The values of a JSON list, of the one list in a JSON object, or of the lines of a JSONL file."""
    if has_lines(source):
        with open(source, "rb") as file:
            yield from ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        return
    try:
        content = parse_json(read_text(source).removeprefix("\ufeff"))
    except ValueError as error:
        raise UserError(f"{source} is neither a JSON list nor JSON lines: {error}") from None
    if isinstance(content, dict) and len(content) == 1:
        ((name, value),) = content.items()
        content = value if isinstance(value, list) and name not in ("messages", "conversations") else content
    yield from ((f"record {i}", row) for i, row in enumerate(content if isinstance(content, list) else [content], 1))


def has_lines(source: Path) -> bool:
    """Whether a file is JSON lines: more follow the first, which is a value (in a .jsonl file, may be a broken one)."""
    with open(source, "rb") as file:
        filled = (line for line in file if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    try:
        parse_line(first)
    except ValueError:
        return bool(second) and source.suffix == ".jsonl" and not first.lstrip().startswith(b"[")
    return bool(second)


def dataset_rows(source: Path) -> Iterator[Row]:
    """The training split of a data set, by the library `datasets`: a parquet file, a folder, or a name on the hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"to read {source}, run: pip install -e '.[data]'; or give a JSON, JSONL or CSV file") from None
    try:
        if source.suffix == ".parquet":
            rows = load_dataset("parquet", data_files=str(source), split="train")
        else:
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
        raise UserError(f"cannot hold out {n_validation} of {n} records for validation")
    order = shuffled(n, np.random.default_rng(seed))
    return {"train": order[n_validation:], "validation": order[:n_validation]}


def shuffled(n: int, rng: np.random.Generator) -> np.ndarray:
    """What rng.permutation(n) gives, in half the memory."""
    order = np.arange(n, dtype=np.int32)
    rng.shuffle(order)
    return order


def download(url: str, path: Path) -> None:
    """Fetch `url` into `path` unless it is there already."""
    if path.is_file():
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
            expected = response.headers.get("Content-Length")
    except (OSError, HTTPException) as error:
        raise UserError(f"could not download {url} ({error}); fetch it by other means and pass --data_file") from None
    if expected and int(expected) != len(content):
        raise UserError(f"the download of {url} broke off after {len(content)} of {expected} bytes; run this again")
    write_file(path, content)
