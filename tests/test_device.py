"""The device that is computed on is said, and is not the CPU by mistake."""

import shutil
from pathlib import Path
from typing import Any

from lit_llama.device import check_gpu, default_device
from lit_llama.errors import UserError

import pytest
import torch
from builders import run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def test_a_gpu_that_torch_does_not_see_is_an_error_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"there is an NVIDIA GPU, but torch .* does not see it"):
        default_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpu()


class WithoutFloat64(TorchDispatchMode):
    """Fails where an operation makes numbers that Apple's GPUs do not have."""

    n_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.dtype not in (torch.float64, torch.complex128) for tensor in made), func
        self.n_calls += 1
        return found


@pytest.mark.slow
def test_training_and_generating_need_no_float64(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    step = ("--data_dir", data_dir, "--out_dir", tmp_path, "--max_steps", 1, "--block_size", 64, "--eval_records", 4)
    with WithoutFloat64() as mode:
        assert run_script("finetune_lora", "--pretrained_path", checkpoint, *step, "--sample_prompt", "Hi") is None
        trained = mode.n_calls
        flags = ("--lora_path", tmp_path, "--max_new_tokens", 3)
        assert run_script("generate_lora", "--pretrained_path", checkpoint, *flags) is None
    assert trained > 1000
    assert mode.n_calls > trained + 100
