"""What tests share: a tiny model folder with a real tokenizer, and instruction data prepared with it."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_llama import cli
from lit_llama.checkpoint import save_model_folder
from lit_llama.data import prepare
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tokenizer import Tokenizer

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


@pytest.fixture(scope="session")
def byte_tokenizer() -> HFTokenizer:
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["below is an instruction that describes a task"] * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: HFTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    files = {
        "tokenizer.json": byte_tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"}),
    }
    save_model_folder(folder, random_model(TINY).state_dict(), TINY, files)
    return folder


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path) -> Path:
    return model_folder / "lit-llama.pth"


RECORDS = [
    {"instruction": f"Count to {n}", "input": "" if n % 3 else "aloud", "output": " ".join(map(str, range(1, n + 1)))}
    for n in range(1, 15)
]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """11 records to train on and 3 to validate on, in the plain style so that they fit the tiny model."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "records.json"
    source.write_text(json.dumps(RECORDS))
    splits = {"train": RECORDS[:11], "validation": RECORDS[11:]}
    prepare(folder, splits, Tokenizer(model_folder / "tokenizer.json"), [source], "plain")
    return folder


ROOT = Path(__file__).parent.parent
RESULTS = {  # what the finetune scripts write
    "lora": "lit-llama-lora-finetuned.pth",
    "adapter": "lit-llama-adapter-finetuned.pth",
    "full": "lit-llama.pth",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_script(name: str, *arguments: object) -> str | None:
    """Run a script in this process as the command line would; returns the message that it ended with, if any."""
    module = importlib.import_module(name)
    constants, argv, handlers = cli.constants(module), sys.argv, [signal.getsignal(number) for number in SIGNALS]
    sys.argv = [name, *map(str, arguments)]
    try:
        cli.run(module.main)
    except SystemExit as ended:
        return str(ended.code)
    finally:
        sys.argv = argv
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        for constant, value in constants.items():
            setattr(module, constant, value)
    return None


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def peak_of_conversion(script: str, source: Path, out_dir: Path) -> float:
    """The most memory, in bytes, that converting a folder takes in a process of its own, beyond its imports."""
    program = f"""
import {script}, torch
from pathlib import Path
from lit_llama.log import peak_memory
before = peak_memory(torch.device("cpu"))
{script}.main(Path({str(source)!r}), Path({str(out_dir)!r}))
print(peak_memory(torch.device("cpu")) - before)
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return float(done.stdout) * 1e9
