"""Where the memory of a training step goes: a table of the three methods, for a small model and a large one.

It is counted as by estimate_memory.py, when it is highest; activations are most of the rest.
"""

from typing import get_args

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig
from lit_llama.model import CONFIGS

from estimate_memory import Method, estimate_method, make_model
from jsonargparse.typing import PositiveInt
from memory_parts import GRADIENTS, MOMENTS

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
        for method in get_args(Method):
            llama = make_model(CONFIGS[model], method, LoRAConfig(lora_r))
            frozen, trained = (
                sum(parameter.nbytes for parameter in llama.parameters() if parameter.requires_grad == is_trained)
                for is_trained in (False, True)
            )
            found = estimate_method(method, llama, [block_size] * micro_batch_size)
            held = [frozen, trained, found.parts[GRADIENTS], found.parts[MOMENTS]]
            cells = [*held, found.peak - sum(held), found.peak, trained // 2]  # finished files are rounded to bfloat16
            print(f"| {model} | {method} | {' | '.join(f'{size / 1e6:,.1f}' for size in cells)} |")


if __name__ == "__main__":
    run(main)
