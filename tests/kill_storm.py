"""Kills finetuning runs again and again, resumes them, and compares their end with that of a run left alone.

    python tests/kill_storm.py --kills 200
    python tests/kill_storm.py --kills 20 --ranks 4

Two of three kills come at a random moment, one of three within a write: at one of its file operations. Every run must
end in the same bits (weights, optimizer, metrics), must never lose more than `save_interval` steps, and leave nothing
behind. With `--ranks`, runs are sharded over processes, one of which is killed at a random moment; torchrun begins them
anew.
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from lit_llama.model_folder import save_model_folder

import torch
from builders import (
    RECORDS,
    RESULTS,
    TINY,
    content_digest,
    metric_rows,
    prepare_records,
    random_model,
    run_script,
    state_tensors,
)
from builders_tokenizers import train_byte_tokenizer
from killed_writers import KILLED, left_over, on_each_operation
from test_finetune import finetune_arguments
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from tqdm import tqdm

SAVE_INTERVAL = 2  # of finetune_arguments
STATE = "training-state.pth"


def attempt(method: str, folder: Path, out: Path, disturb: Callable[[], None] | None, delay: float | None) -> int:
    """Run or resume in a process of its own, killed after `delay` seconds or by what `disturb` sets up."""
    child = os.fork()
    if not child:
        with open(out.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 2)
        if disturb:
            disturb()
        arguments = finetune_arguments(method, folder / "model" / "lit-llama.pth", folder / "data", out)
        message = run_script(f"finetune_{method}", *arguments, "--resume", (out / STATE).exists())
        print(message, file=sys.stderr, flush=True)
        os._exit(0 if message is None else 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_within_write(rng: random.Random) -> Callable[[], None]:
    k, operations = rng.randrange(60), itertools.count()
    return lambda: on_each_operation(lambda *_: os._exit(KILLED) if next(operations) == k else None)


def saved_step(out: Path) -> int:
    return torch.load(out / STATE, weights_only=True)["step"] if (out / STATE).exists() else 0


def outcome(out: Path, method: str) -> str:
    """All that a run has made, without what tells the time."""
    rows = [
        [row.get(key) for key in ("step", "records", "train_loss", "validation_loss")]
        for row in metric_rows(out / "metrics.csv")
    ]
    result = torch.load(out / RESULTS[method], weights_only=True)
    groups = torch.load(out / STATE, weights_only=True)["optimizer"]["param_groups"]
    tensors = sorted(state_tensors(out).items())
    return content_digest([rows, result.get("state_dict", result), groups, dict(tensors)])


def start_ranks(folder: Path, out: Path, ranks: int, restarts: int) -> BaseProcess:
    """What torchrun does, in forks of this process, which has the libraries loaded."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", out.name]
    options = [*meeting, "--max-restarts", restarts, "--nproc-per-node", ranks, "finetune_full.py"]
    config, _, _ = config_from_args(parse_args(list(map(str, options))))
    arguments = finetune_arguments("full", folder / "model" / "lit-llama.pth", folder / "data", out)
    arguments += ["--devices", ranks, "--resume", "auto"]
    launch = elastic_launch(replace(config, start_method="fork"), run_rank)
    agent = multiprocessing.get_context("fork").Process(target=launch, args=(out.with_suffix(".log"), arguments))
    agent.start()
    return agent


def run_rank(log: Path, arguments: list[object]) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
    message = run_script("finetune_full", *arguments)
    if message:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def ended(run: BaseProcess) -> int | None:
    run.join()
    return run.exitcode


def ranks_of(launcher: int) -> list[int]:
    """The processes that torchrun has started, by its number."""
    children = [path.read_text().split() for path in Path(f"/proc/{launcher}/task").glob("*/children")]
    return [int(child) for each in children for child in each]


def kill_a_rank(run: BaseProcess, ranks: int, seconds: float, killed: set[int], rng: random.Random) -> bool:
    """Wait until torchrun has started all processes (again), and some time; False if the run has ended by then."""
    while run.is_alive():
        found = ranks_of(run.pid)
        if len(found) == ranks and not killed & {*found}:
            time.sleep(rng.uniform(0, seconds))
            killed.update(found)
            victim = rng.choice(found)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(victim, signal.SIGKILL)
                print(f"killed {found.index(victim)}", file=sys.stderr)
                return True
        time.sleep(0.1)
    return False


def storm_of_ranks(folder: Path, kills: int, ranks: int, rng: random.Random) -> list[str]:
    """Kill one of the ranks of sharded runs until so many kills have hit; returns whatever went wrong."""
    start, whole, restarts = time.monotonic(), folder / "whole", 3
    assert ended(start_ranks(folder, whole, ranks, 0)) == 0
    reference, seconds = outcome(whole, "full"), time.monotonic() - start
    problems, hits = [], 0
    for number in itertools.count():
        if hits >= kills:
            break
        out, killed = folder / f"run-{number}", set()
        run = start_ranks(folder, out, ranks, restarts)
        for _ in range(min(restarts, kills - hits)):
            hits += kill_a_rank(run, ranks, seconds, killed, rng)
        if ended(run) or outcome(out, "full") != reference or left_over(out):
            problems.append(
                f"{out.name}: {left_over(out)} or another end: {out.with_suffix('.log').read_text()[-300:]}"
            )
    print(f"{number} runs on {ranks} ranks, {hits} kills")
    return problems


def storm(folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Run and kill until so many kills have hit; returns whatever went wrong."""
    problems, references, seconds = [], {}, {}
    for method in RESULTS:
        start, out = time.monotonic(), folder / f"whole-{method}"
        assert attempt(method, folder, out, None, None) == 0
        references[method], seconds[method] = outcome(out, method), time.monotonic() - start
    hits = {"at any time": 0, "within a write": 0}
    for run in itertools.count():
        if sum(hits.values()) >= kills:
            break
        method = list(RESULTS)[run % len(RESULTS)]
        out = folder / f"run-{run}"
        for _ in range(4):
            in_write = rng.random() < 0.4
            disturb = kill_within_write(rng) if in_write else None
            before = saved_step(out)
            status = attempt(method, folder, out, disturb, None if in_write else rng.uniform(0, seconds[method]))
            if status in (KILLED, -signal.SIGKILL):
                hits["within a write" if in_write else "at any time"] += 1
            elif status:
                problems.append(
                    f"{out.name}, {method}: ended with {status}: {out.with_suffix('.log').read_text()[-300:]}"
                )
            reached = max((int(row["step"]) for row in metric_rows(out / "metrics.csv")), default=0)
            if saved_step(out) < before or reached - saved_step(out) > SAVE_INTERVAL:
                problems.append(f"{out.name}, {method}: step {reached} was reached, {saved_step(out)} saved")
        if attempt(method, folder, out, None, None) or outcome(out, method) != references[method]:
            problems.append(f"{out.name}, {method}: another end: {out.with_suffix('.log').read_text()[-300:]}")
        if left_over(out):
            problems.append(f"{out.name}, {method}: left {left_over(out)}")
    print(f"{run} runs, {hits['at any time']} kills at any time, {hits['within a write']} within a write")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread, which a fork would lose
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    gc.disable()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        folder = Path(name)
        tokenizer = {"tokenizer.json": train_byte_tokenizer().to_str()}
        tokenizer["tokenizer_config.json"] = '{"eos_token": "<|im_end|>"}'
        save_model_folder(folder / "model", random_model(TINY).state_dict(), TINY, tokenizer)
        splits = {"train": RECORDS[:11], "validation": RECORDS[11:]}
        prepare_records(folder / "data", splits, folder / "model" / "tokenizer.json")
        rng = random.Random(options.seed)
        if options.ranks > 1:
            problems = storm_of_ranks(folder, options.kills, options.ranks, rng)
        else:
            problems = storm(folder, options.kills, rng)
    print("\n".join(problems) or "all ended in the same bits")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
