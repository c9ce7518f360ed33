"""Kills finetuning runs again and again, resumes them, and compares their end with that of a run left alone.

    python tests/kill_storm.py --kills 200

Two of three kills come at a random moment, one of three within a write: at one of its file operations. Every run must
end in the same bits (weights, optimizer, metrics), must never lose more than `save_interval` steps, and leave nothing
behind.
"""

import argparse
import gc
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from builders import RECORDS, RESULTS, TINY, prepare_records, random_model, run_script
from builders_tokenizers import train_byte_tokenizer
from killed_writers import KILLED, left_over, on_each_operation
from test_finetune import finetune_arguments
from tqdm import tqdm

from lit_llama.checkpoint import save_model_folder
from lit_llama.integrity import checksum
from lit_llama.log import read_metrics

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
        for row in read_metrics(out / "metrics.csv")
    ]
    contents = []
    for name in (RESULTS[method], STATE):
        content = torch.load(out / name, weights_only=True)
        contents.append([content.get("state_dict", content), content.get("optimizer")])
    return checksum([rows, contents])


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
            reached = max((int(row["step"]) for row in read_metrics(out / "metrics.csv")), default=0)
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
        problems = storm(folder, options.kills, random.Random(options.seed))
    print("\n".join(problems) or "all ended in the same bits")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
