"""Finds out that a process of a run on several devices has died, and ends the others in one line that names it.

Without it they would fail in a collective with what gloo says of a socket, or hang in it (NCCL). Each process has a
thread that writes a beat to the store of torch.distributed every second and reads those of the others. A process that
is busy, even for hours, still has its thread; one that has died is silent.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning import Fabric

PERIOD, LIMIT, LIMIT_AFTER_ERROR = 1.0, 45.0, 5.0  # seconds: between two beats, of silence, if a collective has failed
FINISHED = "finished"
running: "Heartbeat | None" = None  # of this process


class Heartbeat(threading.Thread):
    """Ends the process if it finds another one silent for too long."""

    def __init__(self, rank: int, n: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.n, self.limit, self.done = rank, n, LIMIT, threading.Event()
        self.store = dist.PrefixStore("heartbeat", common_store(LIMIT))
        self.heard = [("", time.monotonic())] * n  # of each process: its latest beat and when that was new

    def run(self) -> None:
        beat = 0
        while True:
            beat += 1
            over = self.done.is_set()
            beats = self._exchange(FINISHED if over else str(beat))
            now = time.monotonic()
            self.heard = [
                (new, now if new != old else last) for new, (old, last) in zip(beats, self.heard, strict=True)
            ]
            waiting_for = [rank for rank, (beat_of, _) in enumerate(self.heard) if beat_of != FINISHED]
            if over and (self.rank > 0 or not waiting_for):  # the store may end with process 0, so that waits
                return
            silent = [rank for rank in waiting_for if now - self.heard[rank][1] > self.limit]
            if silent:
                self._end(silent)
            self.done.wait(PERIOD) if not over else time.sleep(PERIOD / 10)

    def _exchange(self, beat: str) -> list[str]:
        """Beats of all processes; if the store cannot be reached, that of process 0, which has it, is an old one."""
        try:
            self.store.set(str(self.rank), beat)
            return [text.decode() for text in self.store.multi_get([str(rank) for rank in range(self.n)])]
        except RuntimeError:
            return [self.heard[0][0], *(f"{time.monotonic()}" for _ in range(1, self.n))]

    def _end(self, silent: list[int]) -> None:
        if self.rank == min({*range(self.n)} - {*silent}):
            who = f"process{'es' * (len(silent) > 1)} {', '.join(map(str, silent))} of {self.n} (counted from 0) died"
            print(f"error: {who}; start it again with --resume auto", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(3 * PERIOD * (self.rank == 0))  # in which the others read the store
        os._exit(1)


def common_store(seconds: float) -> dist.Store:
    """The store of key-value pairs that all processes share; what is read is waited for so long.

    torchrun keeps it when it starts processes again: each time, they get keys of their own.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=seconds)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def connect() -> None:
    """Connect the processes that torchrun has started. Left to Fabric, they would find the addresses of dead ones."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=common_store(300), rank=rank, world_size=n)


def start(fabric: Fabric) -> None:
    """Begin to watch; called by all processes, once they are launched."""
    global running
    if fabric.world_size > 1:
        running = Heartbeat(fabric.global_rank, fabric.world_size)
        running.store.set(str(running.rank), "0")
        fabric.barrier()
        running.start()


def finish() -> None:
    """Say that this process ends as it should; process 0 waits for the others."""
    if running:
        running.done.set()
        running.join()


def wait_for_verdict() -> None:
    """After an error that another process may have caused: return only if none is found to have died."""
    if running:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which would end those who could tell
        running.limit = LIMIT_AFTER_ERROR
        running.join(LIMIT_AFTER_ERROR + 10 * PERIOD)
