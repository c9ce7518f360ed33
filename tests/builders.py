"""What tests build from and run with: a tiny model, records, scripts as the command line runs them."""

import csv
import hashlib
import importlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from lit_llama import cli
from lit_llama.adapter import AdapterConfig
from lit_llama.data.batches import Dataset
from lit_llama.data.preparation import Encoder, prepare
from lit_llama.data.records import Conversation, Fields, conversation
from lit_llama.data.sources import read_rows
from lit_llama.finetuned import describe, save_finetuned
from lit_llama.lora import LoRAConfig
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.storage.files import is_plain, named_tensors
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.state import STATE_FILE

import numpy as np
import pytest
import torch
from builders_processes import run_python
from builders_tokenizers import train_byte_tokenizer

TINY = LLaMAConfig(block_size=128, vocab_size=320, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, n_hidden=48)


def random_model(config: LLaMAConfig, seed: int = 0) -> LLaMA:
    """A model whose every weight, the norms' scales too, is random."""
    torch.manual_seed(seed)
    model = LLaMA(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("scale") else 0.0, std=0.2)
    return model.eval()


def randomize(state: dict[str, torch.Tensor], std: float = 0.2) -> None:
    """Random values for LoRA's B and all else that starts at zero and would hide mistakes."""
    for tensor in state.values():
        tensor.normal_(std=std)


def save_file(
    path: Path, method: LoRAConfig | AdapterConfig, model: LLaMA, state: dict[str, torch.Tensor], style: str
) -> None:
    """What finetune_lora.py or finetune_adapter.py would write for this model."""
    save_finetuned(path, describe(method, model.config, style, {}), state)


class Lengths(Dataset):
    """A data set of which only the lengths of the records matter; their prompts have one token."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths, self.target_counts = lengths, lengths - 1
        self.index = np.arange(len(lengths))


RECORDS = [
    {"instruction": f"Count to {n}", "input": "" if n % 3 else "aloud", "output": " ".join(map(str, range(1, n + 1)))}
    for n in range(1, 15)
]


CONVERSATIONS = [conversation(record, Fields()) for record in RECORDS]


def read_records(source: Path, fields: Fields | None = None) -> list[Conversation]:
    """All records of a file or data set; a UserError, as preparing it gives, if some cannot be used."""
    fields = fields or Fields()
    with TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_text(train_byte_tokenizer().to_str())
        prepare(Path(folder) / "data", {"train": source}, Encoder(Tokenizer(tokenizer), "zephyr", fields))
    return [conversation(row, fields) for _, row in read_rows(source)]


def prepare_records(
    data_dir: Path, splits: dict[str, list], tokenizer: Path, style: str = "plain", num_workers: int = 1
) -> None:
    """Prepare records, which are first written next to the folder."""
    sources = {split: data_dir.with_name(f"{data_dir.name}-{split}.json") for split in splits}
    for split, source in sources.items():
        source.write_text(json.dumps(splits[split]))
    prepare(data_dir, sources, Encoder(Tokenizer(tokenizer), style), num_workers=num_workers)


ROOT = Path(__file__).parent.parent
RESULTS = {  # what the finetune scripts write
    "lora": "lit-llama-lora-finetuned.pth",
    "adapter": "lit-llama-adapter-finetuned.pth",
    "full": "lit-llama.pth",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_script(name: str, *arguments: object) -> str | None:
    """Run a script in this process as the command line would; returns the message that it ended with, if any."""
    messages: list[str] = []
    module = importlib.import_module(name)
    constants, argv, handlers = cli.constants(module), sys.argv, [signal.getsignal(number) for number in SIGNALS]
    sys.argv = [name, *map(str, arguments)]
    try:
        with mock.patch.object(cli, "end", lambda message, status: (messages.append(message), sys.exit(status))):
            cli.run(module.main)
    except SystemExit:
        return messages[-1] if messages else None  # --help ends without one
    finally:
        sys.argv = argv
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        for constant, value in constants.items():
            setattr(module, constant, value)
    return None


def content_digest(content: Any) -> str:
    """A sha256 of nested mappings, lists, values and tensors."""

    def describe(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: describe(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [describe(item) for item in value]
        if not is_plain(value):
            return f"{type(value).__name__} {value!r}"
        numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), hashlib.sha256(numbers).hexdigest()

    return hashlib.sha256(repr(describe(content)).encode()).hexdigest()


def state_tensors(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of the training state in a folder."""
    return dict(named_tensors(torch.load(out / STATE_FILE, weights_only=True)))


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


PEAK = """
import re
from pathlib import Path
from unittest import mock
def peak():  # ru_maxrss would begin with what the tests' own process takes
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_of(before: str, action: str) -> int:
    """The most memory, in bytes, that an action takes in a process of its own, beyond what it took before.

    Before, do the same on a tiny model: the first time, libraries load some 80 MB. Only Linux says what is asked for.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say the most memory that a process has had")
    program = f"{PEAK}{before}\nbefore = peak()\n{action}\nprint(peak() - before)"
    with TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program)
        done = run_python(Path(folder) / "program.py")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def peak_of_conversion(script: str, tiny: Path, source: Path, out_dir: Path) -> int:
    """The same for a script that converts a folder, and before it a tiny one."""
    before, action = (
        f"{script}.main(Path({str(folder)!r}), Path({str(out)!r}))"
        for folder, out in ((tiny, out_dir.with_name("tiny-out")), (source, out_dir))
    )
    return peak_of(f"import {script}\n{before}", action)


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv, without the values that a row does not have, and without half a row at its end."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
