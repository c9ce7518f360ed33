"""Ctrl-C ends a script in one line, also while its libraries are still being loaded; imported before all of them."""

import sys
from pathlib import Path
from types import TracebackType

SCRIPTS = (Path(__file__).parents[1], Path(__file__).parents[1] / "scripts")


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if (
    Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent in SCRIPTS
):  # not in others' programs
    sys.excepthook = end_in_one_line
