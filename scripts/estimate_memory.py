"""How much memory a training step takes, without the memory: the real step is run on tensors that have only shapes.

The figure is the most that tensors occupy at once in two optimizer steps on full records. The step is that of a CPU in
bfloat16; a GPU's differs in details, and needs memory for its own context and for fragments in addition.
"""

import weakref
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_llama.adapter import AdapterConfig, add_adapter, mark_only_adapter_as_trainable
from lit_llama.cli import run
from lit_llama.data import Batch
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.model import CONFIGS, LLaMA
from lit_llama.optimizer import AdamW
from lit_llama.sharding import store_as
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


def peak_of_training(
    model: str,
    method: str,
    micro_batch_size: int,
    block_size: int,
    activation_checkpointing: bool = False,
    lora_r: int = 8,
) -> int:
    """Bytes that a training step takes at most, with a base in bfloat16 and trained weights in float32."""
    with FakeTensorMode(), LiveMemory() as memory:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # else the model would be made in float32 first
        llama = LLaMA(CONFIGS[model])
        torch.set_default_dtype(default)
        if method == "lora":
            add_lora(llama, LoRAConfig(r=lora_r))
            mark_only_lora_as_trainable(llama)
        elif method == "adapter":
            add_adapter(llama, AdapterConfig())
            mark_only_adapter_as_trainable(llama)
        store_as(llama, torch.bfloat16)
        llama.recompute_blocks = activation_checkpointing
        trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=1e-3) if method == "full" else torch.optim.AdamW(trained)
        memory.peak = memory.live
        for _ in range(2):
            select = torch.arange(micro_batch_size * block_size)
            lengths = [block_size] * micro_batch_size
            batch = Batch(torch.zeros_like(select)[None], lengths, select, torch.zeros_like(select))
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_sum(llama, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return memory.peak


def main(
    model: str = "7B",
    method: Literal["lora", "adapter", "full"] = "lora",
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    activation_checkpointing: bool = False,
    lora_r: PositiveInt = 8,
) -> None:
    """Print the memory that a training step takes on one device.

    Args:
        model: The name of a configuration, such as 7B, Llama-3.1-8B or SmolLM2-135M.
        method: lora, adapter or full.
        micro_batch_size: Records that a device computes at once.
        block_size: Tokens in each of them.
        activation_checkpointing: Recompute blocks in the backward pass.
        lora_r: The rank, for lora.
    """
    if model not in CONFIGS:
        raise UserError(f"--model is one of {', '.join(CONFIGS)}, not {model!r}")
    peak = peak_of_training(model, method, micro_batch_size, block_size, activation_checkpointing, lora_r)
    print(f"{peak / 1e9:.1f} GB ({peak / 2**30:.1f} GiB)")


if __name__ == "__main__":
    run(main)
