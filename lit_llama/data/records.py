"""Records to learn from: each is a conversation, or a document.

A record is an object with "instruction", "output" and perhaps "input" (Alpaca), with "messages" of "role" and "content"
(OpenAI, Hugging Face) or "conversations" of "from" and "value" (ShareGPT), or with "text", a document to be trained on
as a whole. `Fields` says what a file calls these fields. What carries meaning is used, or refused by name.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from lit_llama.prompt import Message, Role, check_order

Conversation = list[Message]  # of a document: the answer alone
Row = tuple[str, object]  # its place, such as "line 3", and what is there: bytes of JSON, a value, or an error
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}  # of ShareGPT and others
WEIGHTS = ("weight", "loss_weight", "loss", "train", "trainable")  # 0 or false: not to be learned
LABELS = ("label", "kto_tag")  # false: an answer that is wrong
SYSTEMS = {"system", "system_prompt"}
UNUSED = {  # what changes the meaning of a record or a message, and has no use here
    "tools", "functions", "tool_calls", "function_call", "images", "image", "videos", "audios", "context",
    "reasoning", "reasoning_content", "thinking", "documents", "train_detail",
}  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """What the fields of a record are called in its file."""

    instruction: str = "instruction"
    input: str = "input"  # the only one that a record may lack
    output: str = "output"
    messages: str = "messages"
    text: str = "text"
    ignored: tuple[str, ...] = ()  # to be left out, though they may carry meaning


def conversation(row: object, fields: Fields) -> Conversation:
    """The messages of a record; a ValueError says what is wrong with it, or which of its fields has no use here."""
    row = parse_line(row) if isinstance(row, bytes) else row
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"is of type {type(row).__name__}, not an object with fields")
    given = present(row, fields)
    turns = given.get(fields.messages, given.get("conversations"))
    instruction, text = given.get(fields.instruction), given.get(fields.text)
    if "history" in given and instruction is None:
        raise ValueError("has a 'history', which goes with an instruction alone")
    if not all(map(is_learned, given.items())) or any(given.get(name) in (False, "false", "False") for name in LABELS):
        raise ValueError("is marked as not to be learned (by its weight or label)")
    if turns is not None and instruction is not None:
        raise ValueError(f"has {fields.instruction!r} beside messages; leave out one of them by --ignored_fields")
    if turns is not None:
        messages = [message(turn, fields) for turn in turns_of(turns)]
    elif text is not None and instruction is None:
        if other := given.keys() & {"role", "label"}:
            raise ValueError(f"has {min(other)!r} beside {fields.text!r}, so it is more than a document")
        messages = [Message("assistant", text_of(row, fields.text))]
    elif instruction is None and row.keys() & {fields.messages, "conversations"}:
        raise ValueError("has no messages")
    else:
        question = Message("user", text_of(row, fields.instruction), as_text(given.get(fields.input), fields.input))
        messages = [*history(given.get("history", [])), question, Message("assistant", text_of(row, fields.output))]
    for name in (SYSTEMS & given.keys()) - {fields.instruction, fields.input}:
        messages = [Message("system", as_text(given[name], name)), *messages]
    check_order(messages)
    if messages[-1].role != "assistant":
        raise ValueError("ends in a question, not in an answer to learn from")
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise ValueError("has no answer to learn from: all have the weight 0")
    return messages


def present(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The fields that have a value; a ValueError names one that has no use here but changes what the rest means."""
    given = {name: value for name, value in row.items() if not is_absent(value) and name not in fields.ignored}
    for name in sorted(UNUSED & given.keys() - {*vars(fields).values()}):
        raise ValueError(f"has {name!r}, which cannot be used here")
    return given


def is_absent(value: object) -> bool:
    """Whether there is nothing in a field: null, nan (pandas), blanks, or an empty list."""
    return value is None or value != value or value in ([], {}) or (isinstance(value, str) and not value.strip())


def is_learned(item: tuple[str, object]) -> bool:
    """False if a field is a weight of 0; a ValueError for weights in between."""
    name, value = item
    if name not in WEIGHTS or isinstance(value, list) or value in (1, "1", "true", "True"):
        return True
    if value not in (0, "0", "false", "False"):
        raise ValueError(f"has a {name} of {value!r}, expected 0 or 1")
    return False


def turns_of(turns: object) -> list[Any]:
    """A list of messages, perhaps as JSON in a cell of a table."""
    with suppress(ValueError, RecursionError):
        turns = parse(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list):
        raise ValueError(f"has messages that are of type {type(turns).__name__}, not a list")
    return turns


def message(turn: object, fields: Fields) -> Message:
    if isinstance(turn, ValueError):
        raise turn
    if not isinstance(turn, dict):
        raise ValueError("has a message that is not an object with role and content")
    given = present(turn, fields)
    name = str(given.get("role", given.get("from", "none")))
    role: Any = ROLES.get(name, name)
    if role not in get_args(Role):
        raise ValueError(f"has a message of role {name!r}, not one of {', '.join(get_args(Role))}")
    content = text_of(turn, "value" if "value" in turn and "content" not in given else "content")
    return Message(role, content, learned=all(map(is_learned, given.items())))


def history(turns: Any) -> Iterator[Message]:
    """The earlier questions and answers of a record, in pairs."""
    for pair in turns if isinstance(turns, list) else [turns]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise ValueError("has a 'history' that is not a list of pairs of question and answer")
        yield Message("user", as_text(pair[0], "history"))
        yield Message("assistant", as_text(pair[1], "history"))


def text_of(row: dict[str, Any], name: str) -> str:
    """The text in a field that must have one."""
    if name not in row:
        raise ValueError(f"has no {name!r}, only {', '.join(map(repr, row))}")
    text = as_text(row[name], name)
    if not text.strip():
        raise ValueError(f"has no text in {name!r}")
    return text


def as_text(value: object, name: str) -> str:
    """A value as text: parts of text are joined, numbers and booleans are written as in JSON; "" if there is none."""
    if is_absent(value):
        return ""
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) else {"type": f"{part!r:.20}"} for part in value]
        if other := [part.get("type") for part in parts if not isinstance(part.get("text"), str)]:
            raise ValueError(f"has a part of type {other[0]} in {name!r}, expected only text")
        return "".join(part["text"] for part in parts)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise ValueError(f"has a value of type {type(value).__name__} in {name!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a character (a lone surrogate) in {name!r}") from None
    return value


def parse_line(line: bytes) -> object:
    try:
        return parse(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None


def parse(text: str) -> Any:
    """What a text of JSON holds; in the place of an object that has a field twice stands an error."""
    return json.loads(text, object_pairs_hook=once)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any] | ValueError:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    return ValueError(f"has {max(names, key=names.count)!r} twice")
