"""What a script says on stderr while it works: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
INTERVAL = 10.0  # seconds between two lines


def say(line: str) -> None:
    """Print a line, if this is the first of the processes on this machine."""
    if not int(os.environ.get("LOCAL_RANK", 0)):
        print(line, file=sys.stderr)


def on_terminal() -> bool:
    """Whether stderr is a terminal that has room for a bar."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def progress(items: Iterable[Item], what: str, unit: str, count: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
    """The same items, counted on their way: with a bar, or without a terminal in a line each INTERVAL and at the end.

    `count` says how many units an item is; by default it is one.
    """
    n = len(items) if isinstance(items, Sized) else None
    start, terminal = time.perf_counter(), on_terminal()
    last, done = start, 0
    with tqdm(total=n, desc=what, unit=unit, dynamic_ncols=True, disable=not terminal) as bar:
        for item in items:
            yield item
            done += count(item)
            bar.update(count(item))
            if not terminal and time.perf_counter() - last >= INTERVAL and done != n:
                say(f"{what}: {unit} {done:,}{'' if n is None else f' of {n:,}'}")
                last = time.perf_counter()
    if not terminal:
        say(f"{what}: {unit} {done:,} of {done:,}, {time.perf_counter() - start:.1f} s")
