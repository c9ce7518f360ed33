"""How much memory a training step takes on one device, computed on tensors that have only shapes."""

from functools import partial
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt

from lit_llama.adapter import AdapterConfig, add_adapter, mark_only_adapter_as_trainable
from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable, parse_targets
from lit_llama.memory import peak_of_training
from lit_llama.model import CONFIGS, LLaMA
from lit_llama.optimizer import AdamW
from lit_llama.sharding import store_as

Method = Literal["lora", "adapter", "full"]


def main(
    model: str = "7B",
    method: Method = "lora",
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    activation_checkpointing: bool = False,
    lora_r: PositiveInt = 8,
    lora_targets: str = "query,value",
) -> None:
    """Print the memory that a training step takes, with a base in bfloat16 and trained weights in float32.

    Args:
        model: The name of a configuration, such as 7B, Llama-3.1-8B or SmolLM2-135M.
        method: lora, adapter or full.
        micro_batch_size: Records that a device computes at once.
        block_size: Tokens in each of them.
        activation_checkpointing: Recompute blocks in the backward pass.
        lora_r: The rank, for lora.
        lora_targets: What is updated, for lora.
    """
    if model not in CONFIGS:
        raise UserError(f"--model is one of {', '.join(CONFIGS)}, not {model!r}")
    llama = make_model(model, method, LoRAConfig(lora_r, targets=parse_targets(lora_targets)))
    llama.recompute_blocks = activation_checkpointing
    peak = peak_of_method(method, llama, [block_size] * micro_batch_size)
    print(f"{peak / 1e9:.1f} GB ({peak / 2**30:.1f} GiB)")


def peak_of_method(method: Method, llama: LLaMA, lengths: list[int]) -> int:
    """Bytes that a training step takes at most, with the optimizer that the method's script uses."""
    make_optimizer = partial(AdamW, lr=1e-3) if method == "full" else torch.optim.AdamW
    return peak_of_training(llama, lengths, torch.bfloat16, make_optimizer)


def make_model(name: str, method: Method, lora: LoRAConfig) -> LLaMA:
    """A model as it is trained, without data."""
    with torch.device("meta"):
        llama = LLaMA(CONFIGS[name])
        if method == "lora":
            add_lora(llama, lora)
            mark_only_lora_as_trainable(llama)
        elif method == "adapter":
            add_adapter(llama, AdapterConfig())
            mark_only_adapter_as_trainable(llama)
    store_as(llama, torch.bfloat16)
    return llama


if __name__ == "__main__":
    run(main)
