"""What stands between a user and a script: module constants as flags, mistakes as one line."""

import ast
import inspect
import os
import re
import signal
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import Parameter
from pathlib import Path
from types import FrameType, ModuleType, NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from lit_llama.errors import Stopped, UserError, interrupted
from lit_llama.storage import files

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

LARGEST = 2**31 - 1  # number that a flag takes
MISTAKE, WRONG_FLAG = 1, 2  # exit statuses; 128 and the signal's number after a signal
LIKENESS = 0.52  # of two words, from 0 to 1: that of checkpoint_path and pretrained_path is just above
LOST_CONNECTION = "(gloo|nccl|c10d|tcpstore).*(connect|closed|reset|abort|remote|timed out)"  # as torch says it
MODEL, OUT = ("pretrained_path", "checkpoint_path"), ("out_dir", "out_path", "data_dir")
OTHER_NAMES = {  # of flags: in other projects, and in the archived Lit-LLaMA (see howto/archive.md)
    **dict.fromkeys(("checkpoint_dir", "model", "base_model"), MODEL),
    **dict.fromkeys(("out", "output", "output_dir", "destination_path", "local_dir"), OUT),
    **dict.fromkeys(("iters", "max_iters"), ("max_steps",)),
    "accelerator": ("devices",),
    "ckpt_dir": ("checkpoint_dir",),
    "eval_iters": ("eval_records",),
    "input_sentence": ("input",),
    "max_seq_length": ("block_size",),
    "rank": ("lora_r",),
    "test_split_size": ("val_split_size",),
    "warmup_iters": ("warmup_steps",),
}
ONLY_IN = {"lora_path": "generate_lora.py", "adapter_path": "generate_adapter.py"}
WORDS: dict[Any, dict[str, Any]] = {bool: {"true": True, "false": False}, NoneType: {"null": None}}
TYPE_WORDS: dict[Any, tuple[str, str]] = {  # of other values: in --help, and in a message
    int: ("INT", "a whole number"),
    NonNegativeInt: ("INT", "a whole number >= 0"),
    PositiveInt: ("INT", "a positive whole number"),
    float: ("NUMBER", "a number"),
    NonNegativeFloat: ("NUMBER", "a number >= 0"),
    PositiveFloat: ("NUMBER", "a positive number"),
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
}


class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End in one line, without argparse's usage."""
        end(f"error: {message.removeprefix('argument ')}; see --help", WRONG_FLAG)


def run(main: Callable[..., None]) -> None:
    """Run a script's `main` with the command line's values for its arguments and for its module's constants.

    A constant is a lowercase name that the module assigns at its top level. Its type is its annotation or that of its
    value, its help is the comment after it. A comment of its own, right above a constant, heads a group in --help.
    """
    module = sys.modules[main.__module__]
    arguments = parse(main, module)
    debug, files.check_all = arguments.pop("debug", False), arguments.pop("check_files", True)
    for name in arguments.keys() & find_constants(module):
        setattr(module, name, arguments.pop(name))
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
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.relpath(place.filename)}, line {place.lineno}"
    return f"error: {type(error).__name__} in {where}: {text[:200]}; add --debug true for the traceback", MISTAKE


def end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def parse(main: Callable[..., None], module: ModuleType) -> dict[str, Any]:
    """What is given of main's arguments, of its module's constants and of the flags of all scripts, by their names."""
    parser = Parser(description=module.__doc__, usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False)
    add_flag(parser, "debug", bool, False, "show the traceback of an error")
    add_flag(parser, "check_files", bool, True, "compare tensors and tokens with their checksums when they are read")
    summary, _, details = str(inspect.getdoc(main)).partition("\n")
    described = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", details, re.MULTILINE))
    parameters, constants = inspect.signature(main).parameters, find_constants(module)
    group = parser.add_argument_group(summary.removesuffix("."))
    for name, parameter in parameters.items():
        add_flag(group, name, parameter.annotation, parameter.default, described.get(name, ""))
    groups: dict[str, Any] = {}
    for name, (comment, heading) in constants.items():
        default = getattr(module, name)
        annotation = inspect.get_annotations(module).get(name, type(default))
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        add_flag(group, name, annotation, default, comment or name.replace("_", " "))
    check_flags(sys.argv[1:], [*parameters, "debug", "check_files", *constants])
    given = vars(parser.parse_args())
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def add_flag(group: Any, name: str, annotation: Any, default: Any, text: str) -> None:
    """A flag for a value, or several of a tuple. Its help is `text` and the default, unless `text` says that."""
    kind, several = annotation, {}
    if get_origin(annotation) is tuple:
        kind, several = get_args(annotation)[0], {"nargs": "+", "action": "extend"}
        default = default and " ".join(map(str, default))
    if default is Parameter.empty:
        text = f"{text} (required)"
    elif default not in (None, "", ()) and "efault" not in text:
        text = f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"
    described = {"metavar": type_words(kind)[0], "help": " ".join(text.split()).replace("%", "%%")}
    required, read = default is Parameter.empty, partial(read_value, kind)
    group.add_argument(f"--{name}", type=read, required=required, default=SUPPRESS, **described, **several)


def read_value(annotation: Any, text: str) -> Any:
    """The value of a type that a user has typed; paths may begin with ~, which a shell leaves within quotes."""
    words, kind = words_of(annotation), kind_of(annotation)
    for word in (text, text.lower()):
        if word in words:
            return words[word]
    try:
        value = kind(os.path.expanduser(text) if kind is Path else text)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"takes {type_words(annotation)[1]}, not {text!r}") from None
    if not isinstance(value, int | float):
        return value
    if not abs(value) <= LARGEST:
        raise ArgumentTypeError(f"takes a number of at most {LARGEST:,}, not {text}")
    return int(value) if isinstance(value, int) else float(value)  # a checkpoint may not hold a PositiveInt


def words_of(annotation: Any) -> dict[str, Any]:
    """The words that stand for values of a type, and these: of `bool | None`, those for true, false and null."""
    if get_origin(annotation) is Literal:
        return {word: word for word in get_args(annotation)}
    if annotation in WORDS:
        return WORDS[annotation]
    return {word: value for kind in get_args(annotation) for word, value in words_of(kind).items()}


def kind_of(annotation: Any) -> Any:
    """The type of the values that are no words, if any: of `Path | None`, Path."""
    return next((kind for kind in (annotation, *get_args(annotation)) if kind in TYPE_WORDS), None)


def type_words(annotation: Any) -> tuple[str, str]:
    """What a value of this type is called in --help, and in a message."""
    words = [word for word in words_of(annotation) if word != "null"]
    return TYPE_WORDS.get(kind_of(annotation), (f"{{{','.join(words)}}}", " or ".join(words)))


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
    return next(iter(candidates + get_close_matches(word, names, n=1, cutoff=LIKENESS)), None)


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
