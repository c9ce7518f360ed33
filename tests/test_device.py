"""The device that is computed on is said, and is not the CPU by mistake."""

import shutil

from lit_llama.device import check_gpu, default_device
from lit_llama.errors import UserError

import pytest
import torch


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
