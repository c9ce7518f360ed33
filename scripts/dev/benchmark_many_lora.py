"""Measure a batch whose rows have different LoRA files, beside a merged model and beside PEFT's mixed batch."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_llama.cli import run
from lit_llama.finetuned import FinetunedFile, describe, read_finetuned, save_finetuned, skeleton
from lit_llama.generation import Sampling, generate_batch
from lit_llama.lora import LoRAConfig, merge_lora, parse_targets
from lit_llama.many_lora import ManyLoRA
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model

import torch
from benchmark import hf_model, machine
from export_peft import peft_config, to_peft
from jsonargparse.typing import PositiveInt

PROMPT = list(range(1000, 1040))
Answers = list[list[int]]


def main(
    pretrained_path: Path | None = None,
    n_files: PositiveInt = 16,
    lora_r: PositiveInt = 8,
    lora_targets: str = "query,value",
    new_tokens: PositiveInt = 32,
    rounds: PositiveInt = 3,
) -> None:
    """Print a table of speeds, each of the fastest round and over that of the merged model, and what a file takes.

    All sides answer the same batch greedily, with a row for each file.

    Args:
        pretrained_path: The checkpoint. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        n_files: Files of random weights, and rows of the batch.
        lora_r: Their rank.
        lora_targets: What they update, as in finetune_lora.py.
        new_tokens: Tokens to generate, in each row.
        rounds: How often each side is measured.
    """
    pretrained_path = find_model(pretrained_path, QUICKSTART_MODEL)
    device, dtype = machine()
    config = LoRAConfig(int(lora_r), 2.0 * lora_r, 0.0, parse_targets(lora_targets))
    merged = load_model(pretrained_path, dtype, device).eval()
    files = [random_file(merged.config, config, seed) for seed in range(n_files)]
    files[0].add_to(merged)
    merge_lora(merged)
    many = load_model(pretrained_path, dtype, device).eval()
    batch = ManyLoRA(many, files, n_files)
    batch.choose([*range(n_files)])
    prompts, sampling = [PROMPT] * n_files, Sampling(new_tokens, temperature=0)
    sides: dict[str, Callable[[], Answers]] = {
        "one merged file": lambda: generate_batch(merged, prompts, sampling),
        f"{n_files} files": lambda: generate_batch(many, prompts, sampling),
        f"{n_files} files, PEFT": peft_generator(pretrained_path, files, prompts, new_tokens),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, generator in sides.items():
            start = time.perf_counter()
            answers = generator()
            assert len(answers) == n_files
            if number:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
                print(f"round {number}, {side}: {seconds[side][-1]:.2f} s", file=sys.stderr)
    lines = [f"| a batch of {n_files} | tokens/s, fastest round | over the merged model |", "|---|---:|---:|"]
    for side, times in seconds.items():
        ratio = min(seconds["one merged file"]) / min(times)
        lines.append(f"| {side} | {n_files * new_tokens / min(times):.1f} | {ratio:.2f} x |")
    print(*lines, sep="\n")
    rows = [tensor for layer in batch.layers.values() for tensor in (layer.A, layer.B)]
    sizes = [sum(tensor.nbytes for tensor in tensors) / 1e6 for tensors in (merged.parameters(), rows)]
    read, put = swap_milliseconds(batch, config)
    print(f"\nIn memory: base {sizes[0]:.1f} MB, updates of {n_files} rows {sizes[1]:.1f} MB. A file is read and")
    print(f"checked in {read:.0f} ms, and takes the place of a row's in {put:.0f} ms (medians of 9).")


def random_file(base: LLaMAConfig, config: LoRAConfig, seed: int) -> FinetunedFile:
    torch.manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape) / 50 for name, tensor in skeleton(base, config)[1].items()}
    return FinetunedFile(Path(f"{seed}.pth"), config, tensors, base=base)


def peft_generator(
    checkpoint: Path, files: list[FinetunedFile], prompts: Answers, new_tokens: int
) -> Callable[[], Answers]:
    """transformers' `generate` with PEFT's `adapter_names`: a file for each row."""
    import peft

    names = [f"file{i}" for i in range(len(files))]
    model: Any = None
    for name, file in zip(names, files, strict=True):
        fields = {key: value for key, value in peft_config(file.config, "base").items() if key != "peft_type"}
        config = peft.LoraConfig(**fields)
        if model is None:
            model = peft.get_peft_model(hf_model(checkpoint), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        assert file.base
        peft.set_peft_model_state_dict(model, to_peft(file.tensors, file.base, file.config), adapter_name=name)
    model.eval()
    idx = torch.tensor(prompts, device=machine()[0])
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "adapter_names": names}

    def generator() -> Answers:
        with torch.inference_mode():
            return model.generate(input_ids=idx, attention_mask=torch.ones_like(idx), **settings)[:, len(PROMPT) :]

    return generator


def swap_milliseconds(batch: ManyLoRA, config: LoRAConfig) -> tuple[float, float]:
    """How long it takes to read and check a file, and to put it in the place of a row's."""
    times = []
    with TemporaryDirectory() as folder:
        path, file = Path(folder) / "lora.pth", random_file(batch.config, config, 99)
        save_finetuned(path, describe(config, batch.config, "plain", {}), file.tensors)
        for _ in range(9):
            start = time.perf_counter()
            batch.files[0] = read_finetuned(path, "lora")
            read = time.perf_counter()
            batch.choose([0])
            times.append((read - start, time.perf_counter() - read))
    read, put = (1000 * statistics.median(part) for part in zip(*times, strict=True))
    return read, put


if __name__ == "__main__":
    run(main)
