"""Records to learn from, read from files of many forms: each is a conversation, or a document.

A record is an object with "instruction", "output" and perhaps "input" (Alpaca), with "messages" of "role" and "content"
(OpenAI, Hugging Face) or "conversations" of "from" and "value" (ShareGPT), or with "text", a document to be trained on
as a whole. What a file calls these fields can be said with `Fields`.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

import numpy as np

from lit_llama.errors import UserError
from lit_llama.files import parse_json, read_text, write_file
from lit_llama.prompt import Message, Role, check_order

Conversation = list[Message]  # of a document: the answer alone
Rows = Iterable[tuple[str, object]]  # each with its place, such as "line 3"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@dataclass(frozen=True)
class Fields:
    """What the fields of a record are called in its file."""

    instruction: str = "instruction"
    input: str = "input"  # the only one that a record may lack
    output: str = "output"
    messages: str = "messages"
    text: str = "text"


def read_records(source: Path, fields: Fields | None = None) -> list[Conversation]:
    """The records of a .json, .jsonl, .csv, .parquet or .txt file, or of a data set's folder or name on the hub."""
    records, problems, fields = [], [], fields or Fields()
    for place, row in read_rows(source):
        try:
            records.append(conversation(row, fields))
        except (ValueError, UserError) as error:
            problems.append(f"{place} {error}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"{source}: {len(problems)} of {len(problems) + len(records)} records cannot be used: "
            f"{'; '.join(problems[:3])}{more}; fix or remove them, or name the fields, as in --instruction_key question"
        )
    return records


def conversation(row: object, fields: Fields) -> Conversation:
    """The messages of a record; a ValueError says what is wrong with it."""
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


def read_rows(source: Path) -> Rows:
    """The rows of a file or data set, each with its place."""
    readers = {".csv": csv_rows, ".txt": document, ".json": json_rows, ".jsonl": json_rows}
    if source.is_dir() or source.suffix == ".parquet" or (not source.exists() and len(source.parts) == 2):
        return dataset_rows(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist")
    text = read_text(source).removeprefix("\ufeff")
    return readers.get(source.suffix, json_rows)(source, text)


def document(_source: Path, text: str) -> Rows:
    return [("it", {"text": text})]


def csv_rows(source: Path, text: str) -> Rows:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        return [(f"line {reader.line_num}", {str(name): value for name, value in row.items()}) for row in reader]
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not valid CSV ({error})") from None


def json_rows(source: Path, text: str) -> Rows:
    """The values of a JSON list, of the one list in a JSON object, or of the lines of a JSONL file."""
    try:
        content = parse_json(text)
        if isinstance(content, dict) and len(content) == 1:
            ((name, value),) = content.items()
            content = value if isinstance(value, list) and name not in ("messages", "conversations") else content
        return [(f"record {i}", row) for i, row in enumerate(content if isinstance(content, list) else [content], 1)]
    except ValueError as error:
        reason = str(error)
    rows: list[tuple[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [(f"line {number}", parse_json(line))] if line.strip() else []
        except ValueError:
            what = f"line {number} is not valid JSON" if rows else reason
            raise UserError(f"{source} is neither a JSON list nor JSON lines: {what}") from None
    return rows


def dataset_rows(source: Path) -> Rows:
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


def split_records(records: list[Conversation], n_validation: int | None, seed: int) -> dict[str, list[Conversation]]:
    """Shuffle and hold out `n_validation` records (None: 2,000, or a tenth if that is less)."""
    if n_validation is None:
        n_validation = min(2000, len(records) // 10)
    if not 0 <= n_validation < len(records):
        raise UserError(f"cannot hold out {n_validation} of {len(records)} records for validation")
    order = np.random.default_rng(seed).permutation(len(records))
    shuffled = [records[i] for i in order]
    return {"train": shuffled[n_validation:], "validation": shuffled[:n_validation]}


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
