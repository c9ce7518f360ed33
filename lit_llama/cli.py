"""What stands between a user and a script: module constants as flags, mistakes as one line."""

import ast
import inspect
import json
import os
import re
import signal
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_origin

import torch
from jsonargparse import ArgumentParser

from lit_llama import files, start
from lit_llama.errors import Stopped, UserError
from lit_llama.locks import release

MISTAKE, WRONG_FLAG = 1, 2  # exit statuses; 128 and the signal's number after a signal


def run(main: Callable[..., None]) -> None:
    """Run a script's `main` with the command line's values for its arguments and for its module's constants.

    A constant is a lowercase name that the module assigns at its top level. Its type is its annotation or that of its
    value, its help is the comment after it.
    """
    module = sys.modules[main.__module__]
    parser = ArgumentParser(description=module.__doc__, exit_on_error=False)
    parser.add_function_arguments(main, fail_untyped=True)
    comments = find_constants(module)
    for name, comment in comments.items():
        default = getattr(module, name)
        kind = inspect.get_annotations(module).get(name, type(default))
        parser.add_argument(f"--{name}", type=kind, default=default, help=comment or name.replace("_", " "))
    parser.add_argument("--debug", type=bool, default=False, help="show the traceback of an error")
    check = "compare tensors with their checksums when they are read (2.4 GB a second and core)"
    parser.add_argument("--check_files", type=bool, default=True, help=check)
    annotations = inspect.get_annotations(main).items()
    lists = {f"--{name}" for name, annotation in annotations if get_origin(annotation) is tuple}
    try:
        arguments = vars(parser.parse_args(join_lists(sys.argv[1:], lists)))
    except ArgumentError as error:
        end(f"error: {' '.join(str(error).split())}; see --help", WRONG_FLAG)
    for name in comments:
        value = arguments.pop(name)
        plain = next((kind for kind in (bool, int, float) if isinstance(value, kind)), lambda same: same)
        setattr(module, name, plain(value))  # a checkpoint may not hold a PositiveInt
    debug, files.check_all = arguments.pop("debug"), arguments.pop("check_files")
    try:
        start.loaded()
        main(**arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        end(*explain(error))
    finally:
        release()


def explain(error: BaseException) -> tuple[str, int]:
    """The line in which a script ends because of an exception, and its exit status."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, Stopped):
        return text, error.status
    if isinstance(error, UserError | OSError):
        return f"error: {text}", MISTAKE
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        remedy = "when training, add --activation_checkpointing true or lower --micro_batch_size"
        return f"error: out of memory; {remedy} ({text[:200]})", MISTAKE
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.relpath(place.filename)}, line {place.lineno}"
    return f"error: {type(error).__name__} in {where}: {text[:200]}; add --debug true for the traceback", MISTAKE


def end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def join_lists(arguments: list[str], flags: set[str]) -> list[str]:
    """Flags that take several values, given as `--x a b` or `--x a --x b`, in jsonargparse's form `--x=["a", "b"]`."""
    joined: dict[str, list[str]] = {}
    others, current = [], ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            current = flag
        if current not in flags:
            others.append(argument)
        elif flag != current:
            joined[current].append(argument)
        else:
            joined.setdefault(flag, []).extend([value] if equals else [])
    return others + [f"{flag}={json.dumps(values)}" for flag, values in joined.items()]


def constants(module: ModuleType) -> dict[str, Any]:
    """The names and present values of a module's constants, to be stored with what the script writes."""
    return {name: getattr(module, name) for name in find_constants(module)}


def find_constants(module: ModuleType) -> dict[str, str]:
    """The names of a module's constants, each with the comment after it."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
                comment = re.search(r"#\s*(.*)$", lines[node.lineno - 1])
                found[target.id] = comment[1] if comment else ""
    return found
