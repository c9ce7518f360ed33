"""Errors and Ctrl-C while a script's libraries are loaded end in one line; the package imports this first."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, *(ROOT / "scripts" / folder for folder in ("", "lab", "dev")))  # of scripts


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    else:
        remedy = "; run: source .venv/bin/activate" if issubclass(kind, ModuleNotFoundError) else ""
        text = " ".join(str(error).split())
        print(f"error: {kind.__name__} while libraries were loaded ({text[:200]}){remedy}", file=sys.stderr)


def interrupted(number: int, _frame: FrameType | None) -> None:
    """Nothing has been begun. An exception here could come up in a place that prints it and goes on."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def loaded() -> None:
    """From here on, Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if program.resolve().parent in FOLDERS:  # but not in the programs of others
    sys.excepthook = end_in_one_line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # without stacks in C++ where a process is lost
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
