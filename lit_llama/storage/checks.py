"""What may stand in a file: every value from outside is checked before it is computed with or takes memory.

`from_fields` makes a dataclass, which checks its own fields; `check_types` looks at a mapping that has no class of its
own. Whoever read the file adds its name with `error_context`.
"""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin

from lit_llama.errors import UserError, check_type, short

T = TypeVar("T")


def from_fields(cls: type[T], values: Any) -> T:
    """A dataclass from the fields of a file; a UserError if one is unknown, missing or not valid."""
    if not isinstance(values, Mapping):
        raise UserError(f"{short(values)} is not a {cls.__name__}")
    known = {field.name: field for field in fields(cls)}  # pyrefly: ignore
    check_names(values, [name for name, field in known.items() if field.default is MISSING], known)
    return cls(**{name: from_json(value, known[name].type) for name, value in values.items()})


def from_json(value: Any, expected: Any) -> Any:
    """A value of a file in the form that a field has: lists stand for tuples, named values for dataclasses."""
    if get_origin(expected) is tuple and isinstance(value, list):
        return tuple(value)
    nested = next(filter(is_dataclass, get_args(expected)), None)
    return from_fields(nested, value) if nested and isinstance(value, Mapping) else value  # pyrefly: ignore


def check_types(values: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
    """Raise a UserError unless `values` has the required fields, perhaps the optional ones, each of its type."""
    known = {**required, **optional}
    check_names(values, required, known)
    for name, value in values.items():
        check_type(name, value, known[name])


def check_names(values: Mapping[str, Any], required: Collection[str], known: Collection[str]) -> None:
    if missing := [name for name in required if name not in values]:
        raise UserError(f"it does not have {missing[0]}")
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{short(unknown[0])} is not known; it may be from a newer version")
