"""What may stand in a file: every value from outside is checked here, before it is computed with or takes memory.

`parse` makes a dataclass of the fields of a file, `check_types` looks at a mapping that has no class of its own. Both
name the field, what it is and what was expected; whoever read the file adds its name with `naming`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from torch import Tensor

from lit_llama.adapter import AdapterConfig
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMAConfig, RopeScaling

T = TypeVar("T")
LIMITS: dict[type, dict[str, tuple[float, float]]] = {  # far beyond any published model; n_hidden 0 is the default
    LLaMAConfig: {
        "block_size": (1, 2**24), "vocab_size": (1, 2**22), "n_layer": (1, 1024), "n_head": (1, 4096),
        "n_embd": (2, 2**17), "n_kv_head": (0, 4096), "n_hidden": (0, 2**20), "norm_eps": (0, 0.1),
        "rope_base": (1, 1e12),
    },
    RopeScaling: {
        "factor": (1, 1e6), "low_freq_factor": (0, 1e6), "high_freq_factor": (0, 1e6),
        "original_block_size": (1, 2**24),
    },
    LoRAConfig: {"r": (1, 2**16), "alpha": (-1e9, 1e9), "dropout": (0, 1)},
    AdapterConfig: {"prompt_length": (1, 2**16), "start_layer": (0, 1023)},
}  # fmt: skip


def parse(kind: type[T], values: Any) -> T:
    """The dataclass `kind` from the fields of a file; a UserError if one is unknown, missing, or not valid."""
    if not isinstance(values, Mapping):
        raise UserError(f"{short(values)} is not a {kind.__name__}")
    known = {field.name: field for field in fields(kind)}  # pyrefly: ignore
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{short(unknown[0])} is not known; it may be from a newer version")
    checked = dict(values)
    for name, value in values.items():
        expected = known[name].type
        if RopeScaling in get_args(expected) and value is not None:
            checked[name] = parse(RopeScaling, value)
        elif not fits(value, expected):
            raise UserError(f"{name} is {short(value)}, expected {describe_type(expected)}")
        if name in LIMITS[kind] and not LIMITS[kind][name][0] <= value <= LIMITS[kind][name][1]:
            raise UserError(f"{name} is {short(value)}, expected {LIMITS[kind][name][0]} to {LIMITS[kind][name][1]:g}")
    try:
        result = kind(**checked)
    except (TypeError, ValueError) as error:  # a field is missing, or does not fit another
        raise UserError(str(error)) from None
    check_together(result)
    return result


def check_together(config: Any) -> None:
    """What must hold of several fields at once."""
    if isinstance(config, LLaMAConfig) and config.head_size % 2:
        raise UserError(f"n_embd {config.n_embd} and n_head {config.n_head} make heads of an odd size")
    if isinstance(config, RopeScaling) and not config.low_freq_factor < config.high_freq_factor:
        raise UserError(f"high_freq_factor is {config.high_freq_factor}, expected more than low_freq_factor")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: a whole number is a float too, true and false are not numbers, nan is none."""
    if isinstance(kind, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(fits(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def describe_type(kind: Any) -> str:
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "named values",
        NoneType: "null", list: "a list",
    }  # fmt: skip
    parts = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return " or ".join(names.get(get_origin(part) or part, getattr(part, "__name__", str(part))) for part in parts)


def short(value: Any) -> str:
    """A value for a message: on one line, and not long."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = ascii(value) if isinstance(value, str | int | float | bytes | NoneType) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_types(values: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raise a UserError unless `values` has the required fields, perhaps the optional ones, each of its type."""
    known = {**required, **optional}
    for name in required:
        if name not in values:
            raise UserError(f"it does not have {name}")
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{short(name)} is not known; it may be from a newer version")
        if not fits(value, known[name]):
            raise UserError(f"{name} is {short(value)}, expected {describe_type(known[name])}")


@contextmanager
def naming(path: Path, remedy: str = "") -> Iterator[None]:
    """Put the name of the file that a UserError is about in front of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is not valid: {error}{remedy and f'; {remedy}'}") from None
