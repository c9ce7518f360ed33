"""Fixtures: a tiny model folder with a real tokenizer, instruction data prepared with it, a seed for every test."""

import json
import os
from pathlib import Path

from lit_llama.model_folder import save_model_folder

import pytest
import torch
from builders import RECORDS, TINY, prepare_records, random_model
from builders_tokenizers import train_byte_tokenizer
from tokenizers import Tokenizer as HFTokenizer

os.environ["OMP_NUM_THREADS"] = "1"  # for scripts in processes of their own: tiny tensors are slower on several threads
torch.set_num_threads(1)
LONG = [f"test_{name}.py" for name in ("finetune", "distributed", "state", "compile", "memory", "killed_writers")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take minutes go first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def byte_tokenizer() -> HFTokenizer:
    return train_byte_tokenizer()


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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """11 records to train on and 3 to validate on, in the plain style so that they fit the tiny model."""
    folder = tmp_path_factory.mktemp("data")
    prepare_records(folder, {"train": RECORDS[:11], "validation": RECORDS[11:]}, model_folder / "tokenizer.json")
    return folder
