"""Processes that begin with the libraries loaded, which takes a fresh one eight seconds: forks of one that has them."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["finetune_lora", "torch.distributed.run", "kill_storm"])


def fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Begin a process that calls `target`."""
    process = SERVER.Process(target=target, args=arguments)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server imports as we do
        process.start()
    return process


def start(path: Path, arguments: tuple[object, ...], out: Path, err: Path, **environment: object) -> BaseProcess:
    """Begin what `python PATH ARGUMENTS` would do; its output goes to files."""
    variables = {name: str(value) for name, value in environment.items()}
    return fork(run_file, path, [*map(str, arguments)], (out, err), variables)


def run_file(path: Path, arguments: list[str], outputs: tuple[Path, Path], environment: dict[str, str]) -> None:
    for output, descriptor in zip(outputs, (1, 2), strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def run_python(path: Path, *arguments: object, **environment: object) -> CompletedProcess:
    """What `python PATH ARGUMENTS` gives."""
    return run_together(path, arguments, [environment])


def run_ranks(path: Path, *arguments: object, n: int = 2) -> CompletedProcess:
    """What `torchrun --nproc-per-node N PATH ARGUMENTS --devices 2` gives, without its watching and restarting."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
    return run_together(path, (*arguments, "--devices", 2), ranks)


def run_together(path: Path, arguments: tuple[object, ...], environments: list[dict]) -> CompletedProcess:
    """Run one process for each environment until all have ended; the exit status is that of the first to fail."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        processes = [start(path, arguments, out, err, **environment) for environment in environments]
        for process in processes:
            process.join(300)
            process.kill()
            process.join()
        status = next(filter(None, (process.exitcode for process in processes)), 0)
        return CompletedProcess([path, *arguments], status, out.read_text(), err.read_text())
