"""How much memory a training step takes, without the memory: the real step is run on tensors that have only shapes.

The figure is the most that tensors occupy at once in an optimizer step. The step is that of a CPU; a GPU's differs in
details, and needs memory for its own context and for fragments in addition.
"""

import copy
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama.data import Batch
from lit_llama.model import LLaMA
from lit_llama.training import loss_sum


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def peak_of_training(llama: LLaMA, lengths: list[int], dtype: torch.dtype, make_optimizer: Any) -> int:
    """Bytes that tensors take at most in optimizer steps on one micro-batch of records of these lengths.

    Args:
        llama: the model as it is trained, on any device, "meta" too; it is not changed.
        dtype: what is computed in.
        make_optimizer: makes the optimizer of a list of parameters.
    """
    with FakeTensorMode(), LiveMemory() as memory:
        llama = copy.deepcopy(llama, {id(parameter): shape_of(parameter) for parameter in llama.parameters()})
        trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
        optimizer: Optimizer = make_optimizer(trained)
        device = trained[0].device
        for _ in range(2):  # the moments come with the first step
            select = torch.arange(sum(lengths), device=device)
            batch = Batch(torch.zeros_like(select).unsqueeze(0), lengths, select, torch.zeros_like(select))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_sum(llama, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return memory.peak


def shape_of(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like it, without data if it is made in FakeTensorMode."""
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def free_memory(device: torch.device) -> int:
    """Bytes that tensors can take on a device: of a GPU, all; of the host, what no other process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    status = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0
