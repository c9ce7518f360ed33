"""Every writer is disturbed at each of its file operations, and what it leaves behind is looked at.

It makes an older result (number 0), and a process of its own writes a newer one (number 1) over it. A full disk, and a
kill within a file, happen to it again and again: at the first place, at the second and so on. For kills between
operations it writes once: a kill would leave what is in the folder at that moment, which is copied.
"""

import errno
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lit_llama.data.preparation import Encoder, prepare
from lit_llama.errors import UserError
from lit_llama.finetuned import describe, save_finetuned
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model_folder import save_model_folder
from lit_llama.storage.files import release, write_file, write_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.log import COLUMNS, plot_losses
from lit_llama.training.state import TrainingState

import convert_hf_checkpoint
import export_gguf
import export_hf
import export_peft
import import_peft
import merge_lora
import torch
from builders import RECORDS, TINY, random_model, randomize
from builders_tokenizers import train_byte_tokenizer
from lightning import Fabric
from tqdm import tqdm

OWN = "notes.txt"  # a file of the user's, in the folder that is written to
CONFIGS = (replace(TINY, n_layer=1, n_embd=16, n_hidden=24), replace(TINY, n_layer=2, n_embd=16, n_hidden=16))
LORA = (LoRAConfig(2, 4, 0.0), LoRAConfig(4, 8, 0.0, ("key", "mlp")))
ROWS = ("1,1,1,3.0,,,,,,1\n", "2,2,2,3.0,,,,,,2\n")
FABRIC = Fabric(accelerator="cpu", devices=1)
KILLED, TOLD = 137, 3  # exit statuses of the process that writes


@cache
def checkpoint(number: int) -> Path:
    """A model, with a tokenizer of other files than the other number's."""
    folder = Path(tempfile.mkdtemp())
    files = {"tokenizer.json": train_byte_tokenizer().to_str()}
    if number == 0:
        files["tokenizer_config.json"] = json.dumps({"eos_token": "<|im_end|>"})
    save_model_folder(folder, random_model(CONFIGS[number], number).state_dict(), CONFIGS[number], files)
    return folder / "lit-llama.pth"


@cache
def lora_state(number: int) -> dict[str, torch.Tensor]:
    model = random_model(CONFIGS[number])
    add_lora(model, LORA[number])
    state = {name: tensor.detach() for name, tensor in lora_state_dict(model).items()}
    randomize(state)
    return state


@cache
def lora_file(number: int) -> Path:
    folder = Path(tempfile.mkdtemp())
    write_finetuned(folder, number)
    return folder / "lora.pth"


@cache
def exported(number: int) -> Path:
    """What convert_hf_checkpoint.py reads."""
    folder = Path(tempfile.mkdtemp()) / "hf"
    export_hf.main(folder, checkpoint(number))
    return folder


@cache
def peft_folder(number: int) -> Path:
    folder = Path(tempfile.mkdtemp()) / "peft"
    export_peft.main(folder, "a model", lora_file(number), checkpoint(number))
    return folder


@cache
def optimizer(number: int) -> torch.optim.Optimizer:
    """One that has taken a step."""
    parameters = [torch.nn.Parameter(tensor) for tensor in lora_state(number).values()]
    adamw = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    adamw.step()
    return adamw


Writer = Callable[[Path, int], None]


def write_json(out: Path, number: int) -> None:
    write_file(out / "result.json", json.dumps({"number": number}))


def write_mapping(out: Path, number: int) -> None:
    write_tensors(out / "result.pth", {"weight": torch.full((1000,), float(number))})


def write_model_folder(out: Path, number: int) -> None:
    files = {file.name: file.read_bytes() for file in checkpoint(number).parent.glob("tokenizer*")}
    save_model_folder(out, random_model(CONFIGS[number]).state_dict(), CONFIGS[number], files)


def write_hf(out: Path, number: int) -> None:
    export_hf.main(out, checkpoint(number), max_shard_gb=(1e-5, 5.0)[number])


def write_gguf(out: Path, number: int) -> None:
    export_gguf.main(out, checkpoint(number))


def write_peft(out: Path, number: int) -> None:
    export_peft.main(out, "a model", lora_file(number), checkpoint(number))


@cache
def records_file(number: int) -> Path:
    path = Path(tempfile.mkdtemp()) / "records.json"
    path.write_text(json.dumps(RECORDS[: 5 + number]))
    return path


def write_merged(out: Path, number: int) -> None:
    merge_lora.main(out, lora_file(number), checkpoint(number))


def write_converted(out: Path, number: int) -> None:
    convert_hf_checkpoint.main(exported(number), out)


def write_imported(out: Path, number: int) -> None:
    import_peft.main(peft_folder(number), out / "lora.pth", checkpoint(number))


def write_data(out: Path, number: int) -> None:
    encoder = Encoder(Tokenizer(checkpoint(number).with_name("tokenizer.json")), "plain")
    prepare(out, {"train": records_file(number)}, encoder, split_seed=number, n_validation=2)


def write_finetuned(out: Path, number: int) -> None:
    save_finetuned(out / "lora.pth", describe(LORA[number], CONFIGS[number], "plain", {}), lora_state(number))


def write_training_state(out: Path, number: int) -> None:
    about = describe(LORA[number], CONFIGS[number], "plain", {})
    try:
        state = TrainingState(FABRIC, out, [], {}, resume=number == 1)
        state.save(1 + number, about, lora_state(number), optimizer(number))
    finally:
        release()  # as at the end of a script


def write_picture(out: Path, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.csv"
        metrics.write_text("\n".join((",".join(COLUMNS), *ROWS[: 1 + number])))
        plot_losses(metrics, out / "loss.png", "title")


WRITERS: dict[str, Writer] = {
    name.removeprefix("write_"): function
    for name, function in globals().items()
    if name.startswith("write_") and name != "write_file"
}


def is_operation(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an event of `sys.addaudithook`, which comes before what it tells of, is of a change to files."""
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if event == "ctypes.dlsym":  # the system's call that exchanges two folders comes right after
        return arguments[1] == "renameat2"
    return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate")


def takes_space(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "os.fsync" or (event in ("open", "os.mkdir", "os.link") and is_operation(event, arguments))


def on_each_operation(action: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call `action` before every file operation; fsync has no event of its own."""
    sys.addaudithook(lambda event, arguments: action(event, arguments) if is_operation(event, arguments) else None)
    os.fsync = lambda descriptor: action("os.fsync", (descriptor,))


def copy_before_each_operation(work: Path, copies: Path) -> None:
    numbers, copying = itertools.count(), False

    def copy(*_: Any) -> None:
        nonlocal copying
        if not copying:  # which takes operations, too
            copying = True
            shutil.copytree(work, copies / str(next(numbers)))
            copying = False

    on_each_operation(copy)


def fill_disk_at_operation(k: int) -> None:
    """From the k-th operation that takes space on, the disk is full."""
    operations = itertools.count()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if takes_space(event, arguments) and next(operations) >= k:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_each_operation(refuse)


def limit_size(k: int, kill: bool) -> None:
    """Within a file, after 4**k bytes, writing fails or kills: this is the middle of a file, even in native code."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4**k, 4**k))


def attempt(write: Writer, out: Path, disturb: Callable[[], None]) -> tuple[int, str]:
    """Write the newer result in a process of its own; returns its exit status and the message that it ended with."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        message, status = "", 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what scripts print is not to be limited in size
        try:
            disturb()
            write(out, 1)
        except UserError as error:
            message, status = str(error), TOLD
        except BaseException as error:
            message, status = repr(error), 1
        os.write(writing, message.encode()[:4096])
        os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        message = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if not file.name.endswith((".part", ".lock"))}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".old", ".lock"))]


def disturbed(write: Writer, disturb: Callable[[int], None] | None, kills: bool) -> tuple[int, list[str]]:
    """Disturb a writer at its first place, at its second ..., until it is done before; how often, and what was wrong.

    Without `disturb`, it is killed before each of its operations.
    """
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        work, older, copies = (Path(folder) / name for name in ("work", "older", "copies"))
        out = work / "out"  # always the same, since some results name their place
        out.mkdir(parents=True)
        (out / OWN).write_text(json.dumps(RECORDS))
        write(out, 0)
        shutil.copytree(out, older)
        write(out, 1)
        wholes = [contents(older), contents(out)]
        assert wholes[0] != wholes[1]
        if disturb is None:
            put(older, work, out)
            ended = attempt(write, out, partial(copy_before_each_operation, work, copies))
            assert ended == (0, ""), ended
        tried = set()
        for k in itertools.count():
            status, message = 0, ""
            if disturb:
                put(older, work, out)
                status, message = attempt(write, out, partial(disturb, k))
            elif (copies / str(k)).exists():
                put(copies / str(k), work, work)
                status = KILLED
            else:
                break
            found = contents(out) if out.exists() else {}
            if found not in wholes:
                problems.append(f"{k}: neither the older nor the newer result is whole: {sorted(found)}")
            if status not in ((0, KILLED, -signal.SIGXFSZ) if kills else (0, TOLD)) or "\n" in message:
                problems.append(f"{k}: ended with {status}: {message}")
            if not kills and left_over(work):
                problems.append(f"{k}: left {left_over(work)}")
            state = (found == wholes[0], *sorted(map(str, work.rglob("*"))))  # what is left over is never read
            if kills and state not in tried:
                tried.add(state)
                write(out, 1)
                if contents(out) != wholes[1] or left_over(work):
                    problems.append(f"{k}: writing once more left {left_over(work) or 'another result'}")
            if status == 0:
                break
    return k, problems


def put(source: Path, work: Path, target: Path) -> None:
    """Copy a folder to one within an empty `work`, or to that itself."""
    shutil.rmtree(work)
    shutil.copytree(source, target)


DISTURBANCES: dict[str, tuple[Callable[[int], None] | None, bool]] = {
    "killed": (None, True),
    "killed within a file": (partial(limit_size, kill=True), True),
    "disk full": (fill_disk_at_operation, False),
    "disk full within a file": (partial(limit_size, kill=False), False),
}


def serve(questions: Connection) -> None:
    """Answer, in a process that may fork, for names of writers and disturbances."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    tqdm.monitor_interval = 0  # no thread, which a fork would lose
    tqdm.set_lock(threading.RLock())  # instead of one that processes share, which a killed one would not give back
    os.fsync = lambda _: None  # only a machine that goes down loses what was not flushed
    memory = Path("/dev/shm")  # files on a disk take twice the time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as tempfile.tempdir:
        gc.disable()  # it would touch, and so copy, every page in each process
        while (question := questions.recv()) is not None:
            writer, how = question
            questions.send(disturbed(WRITERS[writer], *DISTURBANCES[how]))
