"""Damages every kind of file that the project reads, thousands of times, and counts what comes of it.

    python tests/fuzz.py --seconds 60

A file is cut, flipped, overwritten, or its fields are set to what nobody expects. It must be refused in one line or,
where its content is still right, or is what the library of its format reads, or where nothing could tell, accepted:
without a traceback, a hang over 20 s, memory beyond twice the file and 500 MB, or a file touched elsewhere. Reads run
in processes of their own, one per core.
"""

import argparse
import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.storage import files

import torch
from builders import content_digest
from fuzz_mutations import mutate
from fuzz_targets import TARGETS, Target, make_worlds
from tqdm import tqdm

OUTCOMES = ("one line", "right", "unsealed", "WRONG", "TRACEBACK", "HANG", "MEMORY", "ELSEWHERE")
HANG = 20  # seconds
SPARE = 500e6  # bytes


def memory(name: str) -> int:
    """VmRSS, what the process takes now, or VmHWM, the most since it was reset."""
    return 1024 * int(re.findall(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[0])


class Watch:
    """Notes files that are changed outside of the folder that a trial may change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.elsewhere = str(folder), ""
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
            path, relative = arguments[0], event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if relative or not isinstance(path, str | os.PathLike):  # to a folder that is open, or to no name
                return
            if not str(path).startswith((self.folder, "/dev/", "/proc/")):
                self.elsewhere = str(path)


def trial(number: int, target: Target, worlds: Path, work: Path, watch: Watch, rights: dict[str, str]) -> list[str]:
    """Damage one file and read it: what came of it, and where, if that is a failure."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(worlds / target.world, work)
    path = work / target.file
    how = mutate(path, number)
    size, before, watch.elsewhere = path.stat().st_size, memory("VmRSS"), ""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    said = io.StringIO()
    outcome, what = "", ""
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            read = content_digest(target.read(work))
            outcome = "right" if read == rights[target.name] else "WRONG" if target.is_sealed else "unsealed"
            if outcome == "unsealed" and target.is_right:
                with contextlib.suppress(Exception):  # the library refuses it
                    outcome = "right" if target.is_right(work) else "WRONG"
        outcome = "one line" if outcome == "WRONG" and "warning: " in said.getvalue() else outcome
    except (UserError, OSError) as error:
        outcome = "TRACEBACK" if "\n" in str(error) else "one line"
        what = str(error)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome, what = "TRACEBACK", f"{type(error).__name__}: {error} in {place.filename}:{place.lineno}"
    files.release()
    if memory("VmHWM") - before > 2 * size + SPARE:
        outcome, what = "MEMORY", f"{(memory('VmHWM') - before) / 1e6:.0f} MB"
    if watch.elsewhere:
        outcome, what = "ELSEWHERE", watch.elsewhere
    return [outcome, f"{how}: {' '.join(what.split())[:300]}"]


def work_on(numbers: Any, pipe: int, worlds: Path, rights: dict[str, str]) -> None:
    """Report each trial's number before it, and its outcome after it."""
    work = worlds.parent / f"work-{os.getpid()}"
    watch = Watch(worlds.parent)
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        result = trial(number, TARGETS[number % len(TARGETS)], worlds, work, watch, rights)
        os.write(pipe, f"{json.dumps(result)}\n".encode())
    shutil.rmtree(work, ignore_errors=True)


def run_worker(first: int, stride: int, deadline: float, worlds: Path, rights: dict[str, str]) -> Any:
    """Yield the numbers and outcomes of trials first, first + stride, ...; a worker that hangs or dies is replaced."""
    number = first
    while time.monotonic() < deadline:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                work_on(range(number, sys.maxsize, stride), writing, worlds, rights)
            except BaseException:  # the fuzzer's own; it says of what, before it is replaced
                os.write(writing, f"{json.dumps(['TRACEBACK', traceback.format_exc()])}\n".encode())
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb", buffering=0) as pipe:
            rest = b""
            while time.monotonic() < deadline:
                ready = select.select([pipe], [], [], HANG)[0]
                chunk = os.read(reading, 65536) if ready else b""
                if not chunk:
                    os.kill(child, signal.SIGKILL)
                    status, child = os.waitpid(child, 0)[1], 0
                    died = f"the process died (status {status:#x})"
                    yield number, ["TRACEBACK" if ready else "HANG", died if ready else f"over {HANG} s"]
                    number += stride
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in map(json.loads, lines):
                    if isinstance(line, int):
                        number = line
                    else:
                        yield number, line
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, which says all about it")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread, which a fork would lose
    torch.set_num_threads(1)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        worlds = Path(folder) / "worlds"
        with contextlib.redirect_stderr(io.StringIO()):
            make_worlds(worlds)
            rights = {}
            for target in TARGETS:
                shutil.rmtree(worlds.parent / "work", ignore_errors=True)
                shutil.copytree(worlds / target.world, worlds.parent / "work")
                rights[target.name] = content_digest(target.read(worlds.parent / "work"))
        sys.exit(report(fuzz(options.first, options.workers, time.monotonic() + options.seconds, worlds, rights)))


def fuzz(first: int, n: int, deadline: float, worlds: Path, rights: dict[str, str]) -> dict[str, list[list[str]]]:
    """The outcomes of each target, from `n` processes side by side."""
    results: dict[str, list[list[str]]] = defaultdict(list)
    collectors = []
    for i in range(n):
        reading, writing = os.pipe()
        if not os.fork():
            for number, result in run_worker(first + i, n, deadline, worlds, rights):
                os.write(writing, f"{json.dumps([number, *result])}\n".encode())
            os._exit(0)
        os.close(writing)
        collectors.append(open(reading, encoding="utf-8"))  # noqa: SIM115 - closed with the process
    while collectors:
        for collector in select.select(collectors, [], [])[0]:
            if line := collector.readline():
                number, *result = json.loads(line)
                results[TARGETS[number % len(TARGETS)].name].append([*result, str(number)])
            else:
                collectors.remove(collector)
    return results


def report(results: dict[str, list[list[str]]]) -> int:
    """Print the table and the first failures; 1 if there are any."""
    print(f"{'file':<44}{'trials':>7}" + "".join(f"{name:>11}" for name in OUTCOMES))
    total: Counter[str] = Counter()
    for name in [target.name for target in TARGETS]:
        counts = Counter(outcome for outcome, *_ in results[name])
        total += counts
        print(f"{name:<44}{counts.total():>7}" + "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES))
    print(f"{'all':<44}{total.total():>7}" + "".join(f"{total[outcome]:>11}" for outcome in OUTCOMES))
    bad = [(name, *result) for name, rows in results.items() for result in rows if result[0].isupper()]
    for name, outcome, what, number in bad[:40]:
        print(f"{outcome} {name} (--first {number}): {what}")
    return int(bool(bad))


if __name__ == "__main__":
    main()
