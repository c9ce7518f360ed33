"""What ends a script while its libraries are still being loaded is one line, too; imported before all of them."""

import sys
from pathlib import Path
from types import TracebackType

SCRIPTS = (Path(__file__).parents[1], Path(__file__).parents[1] / "scripts")


def end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        remedy = "; run: source .venv/bin/activate" if issubclass(kind, ModuleNotFoundError) else ""
        text = " ".join(str(error).split())
        print(f"error: {kind.__name__} while libraries were loaded ({text[:200]}){remedy}", file=sys.stderr)


program = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if program.resolve().parent in SCRIPTS:  # but not in the programs of others
    sys.excepthook = end_in_one_line
