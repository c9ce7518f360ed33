"""The exceptions that end a script in one line, and what puts values and expectations into that line."""

import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType, NoneType, TracebackType, UnionType
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parents[1]


class UserError(Exception):
    """Something a user can fix, in one line: what was found, what was expected and what to do."""


class Stopped(UserError):
    """A run was saved and ends because a signal asked for it; `status` is its exit status, as shells count."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def error_context(path: Path, remedy: str = "") -> Iterator[None]:
    """Put the name of the file that a UserError is about in front of it, and what to do after it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is not valid: {error}{remedy and f'; {remedy}'}") from None


def check_fields(config: Any, **ranges: tuple[float, float]) -> None:
    """Raise a UserError unless the fields of a dataclass have their types, and values in the ranges, ends included."""
    for field in fields(config):
        check_type(field.name, getattr(config, field.name), field.type)
    for name, (low, high) in ranges.items():
        if not low <= getattr(config, name) <= high:
            raise UserError(f"{name} is {short(getattr(config, name))}, expected {low} to {high:g}")


def check_type(name: str, value: Any, expected: Any) -> None:
    """Raise a UserError that names the value if it is not of the expected type."""
    if not fits(value, expected):
        raise UserError(f"{name} is {short(value)}, expected {describe_type(expected)}")


def fits(value: Any, expected: Any) -> bool:
    """Whether a value is of a type: a whole number is a float too, true and false are not numbers, nan is none."""
    if isinstance(expected, UnionType):
        return any(fits(value, part) for part in get_args(expected))
    if get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(expected)[0]) for item in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, expected) and (expected is bool or not isinstance(value, bool))


def describe_type(expected: Any) -> str:
    """A type in words for users."""
    words = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "named values",
        NoneType: "null", list: "a list", tuple: "a list",
    }  # fmt: skip
    if isinstance(expected, UnionType):
        return " or ".join(map(describe_type, get_args(expected)))
    return words.get(get_origin(expected) or expected, getattr(expected, "__name__", str(expected)))


def short(value: Any) -> str:
    """A value for a message: on one line, and not long."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # without importing torch
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = ascii(value) if isinstance(value, str | int | float | bytes | NoneType) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def guard_imports() -> None:
    """Have errors and Ctrl-C end in one line while a script of ours loads its libraries, which takes seconds."""
    folder = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent
    if folder == ROOT or folder.is_relative_to(ROOT / "scripts"):  # but not in the programs of others
        sys.excepthook = end_in_one_line
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # on a GPU: no gaps between tensors
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # without stacks in C++ where a process is lost
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    remedy = (
        "; run: source .venv/bin/activate (make quickstart makes it)" if issubclass(kind, ModuleNotFoundError) else ""
    )
    text = " ".join(str(error).split())[:200]
    print(f"error: {kind.__name__} while libraries were loaded ({text}){remedy}", file=sys.stderr)


def interrupted(number: int, _frame: FrameType | None) -> None:
    """Nothing has been begun. An exception here could come up in a place that prints it and goes on."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
