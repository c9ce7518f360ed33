"""Time LoRA training and generation against transformers + PEFT on the same machine, weights and records.

Both sides train r = 8 on query and value with dropout 0.05, micro-batches of the same size, and generate greedily. Ours
groups records by length, as finetune_lora.py does; theirs takes them at random and pads each micro-batch to its
longest, which is the usual recipe. Each measurement runs in a fresh process, ours and theirs in turn, so that a drift
of the machine's speed cancels out of the ratios.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.cli import run
from lit_llama.data import BatchSchedule, Dataset
from lit_llama.generation import generate
from lit_llama.huggingface import hf_config, to_hf
from lit_llama.log import peak_memory
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.training import loss_sum

PROMPT = list(range(1000, 1040))


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct/lit-llama.pth"),
    n_records: int = 96,
    micro_batch_size: int = 4,
    block_size: int = 512,
    new_tokens: int = 100,
    rounds: int = 3,
) -> None:
    """Print tokens per second (padding not counted), peak memory, and the ratios.

    Args:
        data_dir: Prepared data, for example Alpaca.
        pretrained_path: The checkpoint.
        n_records: Records to train on in each round, drawn at random; the same for both sides.
        micro_batch_size: Records in a micro-batch.
        block_size: Tokens after which records are cut.
        new_tokens: Tokens to generate.
        rounds: How often each side is measured.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[tuple[float, float, float]]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for side, measure in (("ours", measure_ours), ("theirs", measure_theirs)):
            arguments = (data_dir, pretrained_path, n_records, micro_batch_size, block_size, new_tokens, number)
            with context.Pool(1) as pool:
                results[side].append(pool.apply(measure, arguments))
            train, generation, memory = results[side][-1]
            line = f"training {train:.1f} tokens/s (peak {memory:.2f} GB), generation {generation:.1f} tokens/s"
            print(f"round {number + 1}, {side}: {line}", file=sys.stderr)
    for i, name in enumerate(("training speed", "generation speed", "peak memory")):
        ratios = [ours[i] / theirs[i] for ours, theirs in zip(results["ours"], results["theirs"], strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} times that of transformers + PEFT (median of {rounds})")


def draw(data_dir: Path, block_size: int, n_records: int, seed: int) -> tuple[Dataset, np.ndarray]:
    dataset = Dataset(data_dir, "train", block_size)
    return dataset, np.random.default_rng(seed).permutation(len(dataset))[:n_records]


def timed(train_step: Callable[[np.ndarray], Tensor], micro_batches: list[np.ndarray], dataset: Dataset) -> float:
    """Unpadded tokens per second of forward and backward passes."""
    train_step(micro_batches[0])
    start = time.perf_counter()
    for records in micro_batches:
        train_step(records)
    return sum(dataset.n_tokens(records) for records in micro_batches) / (time.perf_counter() - start)


def measure_ours(
    data_dir: Path, checkpoint: Path, n_records: int, micro_batch_size: int, block_size: int, new_tokens: int, seed: int
) -> tuple[float, float, float]:
    dataset, records = draw(data_dir, block_size, n_records, seed)
    model = load_model(checkpoint)
    start = time.perf_counter()
    assert len(list(generate(model, PROMPT, new_tokens, temperature=0))) == new_tokens
    generation = new_tokens / (time.perf_counter() - start)

    add_lora(model, LoRAConfig())
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def train_step(micro_batch: np.ndarray) -> Tensor:
        batch = dataset.batch(micro_batch)
        loss = loss_sum(model, *batch) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    schedule = BatchSchedule(dataset.lengths[records], n_records, micro_batch_size, seed)
    speed = timed(train_step, [records[i] for i in schedule[0]], dataset)
    return speed, generation, peak_memory(torch.device("cpu"))


def measure_theirs(
    data_dir: Path, checkpoint: Path, n_records: int, micro_batch_size: int, block_size: int, new_tokens: int, seed: int
) -> tuple[float, float, float]:
    import peft
    import transformers

    dataset, records = draw(data_dir, block_size, n_records, seed)
    ours = load_model(checkpoint)
    config = transformers.LlamaConfig(**hf_config(ours.config, torch.float32))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(to_hf(ours.state_dict(), ours.config), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    del ours
    prompt = torch.tensor([PROMPT])
    start = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    assert out.size(1) == len(PROMPT) + new_tokens
    generation = new_tokens / (time.perf_counter() - start)

    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def train_step(micro_batch: np.ndarray) -> Tensor:
        width = int(dataset.lengths[micro_batch].max())
        ids = torch.zeros(len(micro_batch), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(micro_batch):
            start, length = dataset.offsets[dataset.index[i]], dataset.lengths[i]
            ids[row, :length] = torch.from_numpy(dataset.tokens[start : start + length].astype(np.int64))
            mask[row, :length] = 1
            labels[row, dataset.first_targets[i] : length] = ids[row, dataset.first_targets[i] : length]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    model.train()
    micro_batches = [records[i : i + micro_batch_size] for i in range(0, n_records, micro_batch_size)]
    return timed(train_step, micro_batches, dataset), generation, peak_memory(torch.device("cpu"))


if __name__ == "__main__":
    run(main)
