"""What a script says on stderr while it works: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def say(line: str) -> None:
    """Print a line, if this is the first of the processes on this machine."""
    if not int(os.environ.get("LOCAL_RANK", 0)):
        print(line, file=sys.stderr)


def on_terminal() -> bool:
    """Whether stderr is a terminal that has room for a bar."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def progress(items: Collection[Item], what: str, unit: str, interval: float = 10) -> Iterator[Item]:
    """The same items, counted on their way; where there is no bar, in a line each `interval` seconds and at the end."""
    if on_terminal():
        yield from tqdm(items, desc=what, unit=unit, dynamic_ncols=True)
        return
    start = last = time.perf_counter()
    for i, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last >= interval and i < len(items):
            say(f"{what}: {unit} {i:,} of {len(items):,}")
            last = now
    say(f"{what}: {unit} {len(items):,} of {len(items):,}, {time.perf_counter() - start:.1f} s")
