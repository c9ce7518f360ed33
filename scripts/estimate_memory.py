"""How much memory a training step takes on each device, and for what, computed on tensors that have only shapes."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Literal

from lit_llama.adapter import AdapterConfig, add_adapter, mark_only_adapter_as_trainable
from lit_llama.cli import run
from lit_llama.device import TrainingPrecision, storage_dtype
from lit_llama.errors import UserError, error_context
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable, parse_targets
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig
from lit_llama.model_folder import WEIGHTS, file_in, read_config
from lit_llama.quantization import quantize_blocks
from lit_llama.storage.files import CONFIG, read_file, read_json
from lit_llama.training.optimizer import AdamW
from lit_llama.training.run import Quantize

import torch
from convert_hf_checkpoint import config_from_hf
from jsonargparse.typing import NonNegativeInt, PositiveInt
from memory_parts import Estimate, estimate_step

Method = Literal["lora", "adapter", "full"]
GPUS = (8, 12, 16, 24, 40, 48, 80)  # sizes in GiB
OUTSIDE = 0.8e9  # bytes that are not for tensors: CUDA's context, workspaces of libraries, gaps
BETWEEN = 3e9  # beside them where a model is spread over GPUs: NCCL's buffers, memory that FSDP's streams do not share
MOST_SHOWN = 6  # of the operations whose results are kept


def main(
    model: str = "7B",
    method: Method = "lora",
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    activation_checkpointing: bool = False,
    lora_r: PositiveInt = 8,
    lora_targets: str = "query,value",
    precision: TrainingPrecision = "bf16-mixed",
    quantize: Quantize | None = None,
    devices: PositiveInt = 1,
    fit_gpu: NonNegativeInt = 0,
) -> None:
    """Print the most memory that the tensors of a training step take on a GPU, what they are for, and where it fits.

    Args:
        model: The name of a configuration, such as 7B or Llama-3.1-8B, a model folder or a config.json, also of a
            model that is not converted yet.
        method: lora, adapter or full.
        micro_batch_size: Records that a device computes at once.
        block_size: Tokens in each of them.
        activation_checkpointing: Recompute blocks in the backward pass.
        lora_r: The rank, for lora.
        lora_targets: What is updated, for lora.
        precision: What is computed in. Frozen weights are stored in it, trained ones in float32.
        quantize: nf4 for a base in 4 bits a weight.
        devices: Over which the model is spread, as by --strategy fsdp.
        fit_gpu: Print instead the largest micro_batch_size that fits a GPU of this many GiB.
    """
    if devices > 1 and (quantize or precision == "16-mixed"):
        raise UserError("neither a 4-bit base nor 16-mixed is spread over devices; leave out --devices")
    if quantize and method == "full":
        raise UserError("a 4-bit base is frozen, so it goes with --method lora or adapter")
    dtype = storage_dtype(precision)
    llama = make_model(model_config(model), method, LoRAConfig(lora_r, targets=parse_targets(lora_targets)), dtype)
    llama.recompute_blocks = activation_checkpointing
    if quantize:
        quantize_blocks(llama, "meta", dtype)
    step = partial(estimate_method, method, llama, dtype=dtype, devices=devices)
    if fit_gpu:
        fits = largest(cache(lambda size: step([block_size] * size).peak), room(fit_gpu, devices))
        print(f"micro_batch_size {fits} fits" if fits else "not even one record fits", f"a GPU of {fit_gpu} GiB")
        return
    found = step([block_size] * micro_batch_size)
    print(*table(found), sep="\n")
    print(f"{found.launches:,} kernels in a step of one micro-batch")
    print(f"{gb(found.traffic)} read and written by those but matrix products and attention")
    if devices > 1:
        print(f"{gb(found.received)} come from other devices in it")
    print(f"{gb(found.resume)} when a run is resumed")
    left = {size: room(size, devices) - max(found.peak, found.resume) for size in GPUS}
    fits = ", ".join(f"{size} GiB ({gb(most)} left)" for size, most in left.items() if most >= 0)
    print(f"fits a GPU of {fits}" if fits else "fits no GPU of a usual size")


def largest(peak: Callable[[int], int], most: float) -> int:
    """The largest micro-batch whose peak is at most so many bytes, 0 if none is."""
    fits, above = 0, 1
    while peak(above) <= most:
        fits, above = above, 2 * above
    while above - fits > 1:  # where a straight line between the two would say
        guess = fits + int((above - fits) * (most - peak(fits)) / (peak(above) - peak(fits)))
        guess = min(max(guess, fits + 1), above - 1)
        fits, above = (guess, above) if peak(guess) <= most else (fits, guess)
    return fits


def table(found: Estimate) -> Iterator[str]:
    """The peak and what it is for, in GB; of the activations, the operations that made most."""
    yield f"{gb(found.peak)} ({found.peak / 2**30:.1f} GiB) at most:"
    purposes: Counter[str] = Counter()
    for (purpose, _), size in found.parts.items():
        purposes[purpose] += size
    for purpose, size in purposes.most_common():
        yield f"{size / 1e9:9.2f}  {purpose}"
        if purpose == "activations":
            made = Counter({operation: size for (kind, operation), size in found.parts.items() if kind == purpose})
            for operation, size in made.most_common(MOST_SHOWN):
                yield f"{size / 1e9:17.2f}  {operation}"


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def room(gpu: int, devices: int = 1) -> float:
    """Bytes that tensors can take on a GPU of so many GiB."""
    return gpu * 2**30 - OUTSIDE - (BETWEEN if devices > 1 else 0)


def model_config(name: str) -> LLaMAConfig:
    """The configuration of this name, or that of a model folder or of a config.json, ours or Hugging Face's."""
    if name in CONFIGS:
        return CONFIGS[name]
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"--model is one of {', '.join(CONFIGS)}, or a model folder or config.json, not {name!r}")
    file = path / CONFIG if path.is_dir() else path
    if file.is_file() and "model_type" in (fields := read_json(file)):
        with error_context(file, "get it again"):
            return config_from_hf(fields)
    checkpoint = file.with_name(WEIGHTS) if file.is_file() else file_in(path)
    return read_config(checkpoint, {} if file.is_file() else read_file(checkpoint))


def estimate_method(
    method: Method, llama: LLaMA, lengths: list[int], dtype: torch.dtype = torch.bfloat16, devices: int = 1
) -> Estimate:
    """What a training step takes, with the optimizer that the method's script uses."""
    make_optimizer = partial(AdamW, lr=1e-3) if method == "full" else torch.optim.AdamW
    return estimate_step(llama, lengths, dtype, make_optimizer, devices)


def make_model(config: LLaMAConfig, method: Method, lora: LoRAConfig, dtype: torch.dtype = torch.bfloat16) -> LLaMA:
    """A model as it is trained, without data."""
    with torch.device("meta"):
        llama = LLaMA(config)
        if method == "lora":
            add_lora(llama, lora)
            mark_only_lora_as_trainable(llama)
        elif method == "adapter":
            add_adapter(llama, AdapterConfig())
            mark_only_adapter_as_trainable(llama)
    store_as(llama, dtype)
    return llama


def store_as(llama: LLaMA, dtype: torch.dtype) -> None:
    """Store frozen parameters in `dtype` and trained ones in float32, as training does."""
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


if __name__ == "__main__":
    run(main)
