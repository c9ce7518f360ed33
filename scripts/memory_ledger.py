"""Where the memory of a training step goes: a table of the three methods, for a small model and a large one.

Weights, gradients and moments are counted; the step's peak is that of estimate_memory.py, the rest is the difference.
"""

import torch
from estimate_memory import peak_of_training
from jsonargparse.typing import PositiveInt

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig, lora_shapes
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig

TITLES = ("model", "method", "frozen weights", "trained weights", "gradients", "moments", "the rest", "step", "file")


def main(
    models: tuple[str, ...] = ("SmolLM2-135M", "7B"),
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    lora_r: PositiveInt = 8,
) -> None:
    """Print a table in Markdown, in MB.

    Args:
        models: Names of configurations.
        micro_batch_size: Records that a device computes at once.
        block_size: Tokens in each of them.
        lora_r: The rank, on query and value.
    """
    if unknown := set(models) - CONFIGS.keys():
        raise UserError(f"--models are some of {', '.join(CONFIGS)}, not {', '.join(unknown)}")
    print(f"| {' | '.join(TITLES)} |", f"|---|---|{'---:|' * (len(TITLES) - 2)}", sep="\n")
    for model in models:
        for method, count in trained_weights(CONFIGS[model], lora_r).items():
            held = ledger(CONFIGS[model], method, count)
            step = peak_of_training(model, method, micro_batch_size, block_size, lora_r=lora_r)
            file = 2 * count  # finished files are rounded to bfloat16
            cells = [*held, step - sum(held), step, file]
            print(f"| {model} | {method} | {' | '.join(f'{size / 1e6:,.1f}' for size in cells)} |")


def ledger(config: LLaMAConfig, method: str, count: int) -> list[int]:
    """Bytes of frozen weights (bfloat16), trained weights (float32), their gradients and AdamW's two moments.

    Full finetuning stores its moments in bfloat16 by default, the others in float32.
    """
    frozen = 0 if method == "full" else 2 * n_weights(config)
    return [frozen, 4 * count, 4 * count, (4 if method == "full" else 8) * count]


def trained_weights(config: LLaMAConfig, lora_r: int) -> dict[str, int]:
    with torch.device("meta"):
        model = LLaMA(config)
        add_adapter(model, AdapterConfig())
    adapter = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    lora = sum(tensor.numel() for tensor in lora_shapes(config, LoRAConfig(lora_r)).values())
    return {"lora": lora, "adapter": adapter, "full": n_weights(config)}


def n_weights(config: LLaMAConfig) -> int:
    """Those of a tied head and embedding count once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LLaMA(config).parameters())


if __name__ == "__main__":
    run(main)
