"""What stands between a user and a script: module constants as flags, mistakes as one line."""

import argparse
import ast
import inspect
import json
import os
import re
import signal
import sys
import traceback
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, get_args, get_origin

from lit_llama.errors import Stopped, UserError, interrupted
from lit_llama.storage import files

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LARGEST = 2**31 - 1  # number that a flag takes
MISTAKE, WRONG_FLAG = 1, 2  # exit statuses; 128 and the signal's number after a signal
LOST_CONNECTION = "(gloo|nccl|c10d|tcpstore).*(connect|closed|reset|abort|remote|timed out)"  # as torch says it
MODEL, OUT = ("pretrained_path", "checkpoint_path"), ("out_dir", "out_path", "data_dir")
OTHER_NAMES = {  # of flags: in other projects, and in the archived Lit-LLaMA (see howto/archive.md)
    **dict.fromkeys((*MODEL, "checkpoint_dir", "model", "base_model"), MODEL),
    **dict.fromkeys(("out", "output", "output_dir", "destination_path", "local_dir"), OUT),
    **dict.fromkeys(("iters", "max_iters"), ("max_steps",)), "warmup_iters": ("warmup_steps",), "rank": ("lora_r",),
    "eval_iters": ("eval_records",), "max_seq_length": ("block_size",), "gradient_accumulation_iters": ("batch_size",),
    "accelerator": ("devices",), "ckpt_dir": ("checkpoint_dir",), "datasets": ("text",), "input_sentence": ("input",),
    "mask_inputs": ("mask_prompt",), "test_split_size": ("val_split_size",),
}  # fmt: skip
ONLY_IN = {"lora_path": "generate_lora.py", "adapter_path": "generate_adapter.py"}
TYPE_WORDS: dict[Any, tuple[str, str]] = {  # of values: in --help, and in a message
    bool: ("{true,false}", "true or false"),
    int: ("INT", "a whole number"),
    NonNegativeInt: ("INT", "a whole number >= 0"),
    PositiveInt: ("INT", "a positive whole number"),
    float: ("NUMBER", "a number"),
    NonNegativeFloat: ("NUMBER", "a number >= 0"),
    PositiveFloat: ("NUMBER", "a positive number"),
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
}


class HelpFormatter(DefaultHelpFormatter):
    """Help with defaults as they would be typed, and without Python's types."""

    def _get_help_string(self, action: Action) -> str:
        """The help of a flag with its default, unless the help says it or there is none."""
        text, value = (action.help or "").replace("%", "%%"), action.default
        if action.required:
            return f"{text} (required)"
        if value in (None, "", (), SUPPRESS) or "efault" in text:
            return text
        words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return f"{text} (default: {words.lower() if isinstance(value, bool) else words})"


def run(main: Callable[..., None]) -> None:
    """Run a script's `main` with the command line's values for its arguments and for its module's constants.

    A constant is a lowercase name that the module assigns at its top level. Its type is its annotation or that of its
    value, its help is the comment after it. A comment of its own, right above a constant, heads a group in --help.
    """
    module = sys.modules[main.__module__]
    arguments = parse(main, module)
    for name in find_constants(module):
        setattr(module, name, to_builtin(arguments.pop(name)))
    debug, files.check_all = arguments.pop("debug"), arguments.pop("check_files")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, terminated)
    try:
        if signal.getsignal(signal.SIGINT) is interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(**arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, status = explain(error)
        if isinstance(error, Stopped | KeyboardInterrupt) and int(os.environ.get("LOCAL_RANK", 0)):
            sys.exit(status)  # the first of several processes says it
        end(message, status)
    finally:
        files.release()


def to_builtin(value: Any) -> Any:
    """A number as Python's own type: a checkpoint may not hold a PositiveInt."""
    for builtin in (bool, int, float):
        if isinstance(value, builtin):
            return builtin(value)
    return value


def terminated(number: int, _frame: FrameType | None) -> NoReturn:
    """End by an exception, so that what is being written is removed. A training run saves first, see StopSignal."""
    end("terminated", 128 + number)


def explain(error: BaseException) -> tuple[str, int]:
    """The line in which a script ends because of an exception, and its exit status."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, Stopped):
        return text, error.status
    if isinstance(error, UserError | OSError):
        return f"error: {text}", MISTAKE
    if isinstance(error, RuntimeError) and re.search(LOST_CONNECTION, text, re.IGNORECASE):
        return f"error: another process of this run has ended ({text[:200]}); continue with --resume auto", MISTAKE
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        remedy = "when training, add --activation_checkpointing true or lower --micro_batch_size"
        return f"error: out of memory; {remedy} ({text[:200]})", MISTAKE
    if "InvalidCxxCompiler" in text:
        return "error: --compile needs a compiler for C++, such as g++; install one, or leave it out", MISTAKE
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.relpath(place.filename)}, line {place.lineno}"
    return f"error: {type(error).__name__} in {where}: {text[:200]}; add --debug true for the traceback", MISTAKE


def end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def parse(main: Callable[..., None], module: ModuleType) -> dict[str, Any]:
    """The values of main's arguments, of its module's constants and of the flags of all scripts."""
    parser = ArgumentParser(
        description=module.__doc__,
        usage="%(prog)s [--FLAG VALUE ...]",
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    parser.add_function_arguments(main, fail_untyped=True)
    parser.add_argument("--debug", type=bool, default=False, help="show the traceback of an error")
    check = "compare tensors and tokens with their checksums when they are read"
    parser.add_argument("--check_files", type=bool, default=True, help=check)
    types = {**inspect.get_annotations(main), "debug": bool, "check_files": bool}
    groups: dict[str, Any] = {}
    for name, (comment, heading) in find_constants(module).items():
        default = getattr(module, name)
        types[name] = inspect.get_annotations(module).get(name, type(default))
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        group.add_argument(f"--{name}", type=types[name], default=default, help=comment or name.replace("_", " "))
    for action in parser._actions:
        if action.dest in types:
            action.metavar = type_words(types[action.dest])[0]  # such as INT
    lists = {f"--{name}" for name, annotation in types.items() if get_origin(annotation) is tuple}
    given = join_lists(sys.argv[1:], lists)
    check_flags(given, types)
    try:
        values = {name: expand_home(value) for name, value in vars(parser.parse_args(given)).items()}
    except ArgumentError as error:
        end(f"error: {explain_parse_error(str(error), types, given)}; see --help", WRONG_FLAG)
    for name, value in values.items():
        if isinstance(value, int | float) and abs(value) > LARGEST:
            end(f"error: --{name} takes a number of at most {LARGEST:,}, not {value}; see --help", WRONG_FLAG)
    return values


def type_words(annotation: Any) -> tuple[str, str]:
    """What a value of this type is called in --help, and in a message."""
    choices = [choice for choice in get_args(annotation) if choice not in (type(None), ...)]
    if bool in choices[:-1]:  # or one of some words
        choices = ["true", "false", *get_args(choices[-1])]
    if choices and isinstance(choices[0], str):
        return f"{{{','.join(choices)}}}", f"one of {', '.join(choices)}"
    if get_origin(annotation) is tuple:
        metavar, words = type_words(choices[0])
        return f"{metavar} ...", f"{words}, or several"
    return type_words(choices[0]) if choices else TYPE_WORDS.get(annotation, ("VALUE", "a value"))


def check_flags(given: Sequence[str], names: Collection[str]) -> None:
    """End if a flag is not spelled out, so that none is taken for another one; suggest the nearest."""
    for flag in (word.partition("=")[0] for word in given if word.startswith("--")):
        if flag not in ("--", "--help", *(f"--{name}" for name in names)):
            name = flag.strip("-").replace("-", "_").lower()
            near = nearest(name, names)
            suggestion = f"did you mean --{near}? --help lists all" if near else "see --help"
            suggestion = f"it is one of {ONLY_IN[name]}" if name in ONLY_IN else suggestion
            end(f"error: {flag} is not a flag of this script; {suggestion}", WRONG_FLAG)


def nearest(word: str, names: Collection[str]) -> str | None:
    """The name that a word stands for: by initials (lr), a part (epochs) or its beginning; else the most similar."""
    parts = {name: name.split("_") for name in names}
    candidates = [name for name in OTHER_NAMES.get(word, ()) if name in names]
    candidates += [name for name in names if word in (name, "".join(part[0] for part in parts[name])) and len(word) > 1]
    candidates += [name for name in names if word in parts[name]] + [name for name in names if name.startswith(word)]
    similar = [] if word in OTHER_NAMES else get_close_matches(word, names, n=1)
    return next(iter(candidates + similar), None)


def expand_home(value: Any) -> Any:
    """A path with ~ replaced by the user's home, which a shell does not do within quotes or after =."""
    if isinstance(value, tuple):
        return tuple(expand_home(item) for item in value)
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def explain_parse_error(message: str, types: dict[str, Any], given: list[str]) -> str:
    """What jsonargparse says of a value, in words for users."""
    message = " ".join(message.split())
    key = re.match(r'(?:Parser key "|argument --)(\w+)', message)
    if key is None or key[1] not in types:
        return message
    flag = f"--{key[1]}"
    values = [
        word.partition("=")[2] or after for word, after in pairwise([*given, ""]) if word.partition("=")[0] == flag
    ]
    found = values[-1] if values else ""
    found = f"not {found!r}" if found and not found.startswith("--") else "and none is given"
    return f"{flag} takes {type_words(types[key[1]])[1]}, {found}"


def join_lists(arguments: list[str], flags: Collection[str]) -> list[str]:
    """Flags that take several values, given as `--x a b` or `--x a --x b`, in jsonargparse's form `--x=["a", "b"]`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for flag in flags:
        parser.add_argument(flag, nargs="*", action="extend")
    found, others = parser.parse_known_args(arguments)
    return others + [
        f"--{name}={json.dumps(values)}" if values else f"--{name}" for name, values in vars(found).items()
    ]


def constants(module: ModuleType) -> dict[str, Any]:
    """The names and present values of a module's constants, to be stored with what the script writes."""
    return {name: getattr(module, name) for name in find_constants(module)}


def find_constants(module: ModuleType) -> dict[str, tuple[str, str]]:
    """The names of a module's constants, with the comments after them, and above them or above those before them."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    lines, heading = source.splitlines(), "settings"
    found = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
                comment = re.search(r"#\s*(.*)$", lines[node.lineno - 1])
                above = re.match(r"#\s*(.*)$", lines[node.lineno - 2])
                heading = above[1] if above else heading
                found[target.id] = (comment[1] if comment else "", heading)
    return found
