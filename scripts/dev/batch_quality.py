"""How good a sample of the data a step's batch is: by our schedule, at random, and by groups of similar length.

The gradient of a step is that of the mean loss over its target tokens. Over an epoch of steps the first table has

  variance   the mean of |g_step - g|^2 / |g|^2, where g is the gradient over all records
  cosine     between g and the mean of all g_step, which is the direction that an epoch goes

They come from the gradient of each record's loss with respect to LoRA's B (at random A and B = 0), all of them for one
fixed model, so no training is involved and the three ways are compared exactly. The second table has the validation
loss of small models after one epoch in steps of 4 records.
"""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lit_llama.cli import run
from lit_llama.data.batches import BatchSchedule, Dataset, loss_sum, single_step
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, mark_only_lora_as_trainable
from lit_llama.model import CONFIGS, LLaMA
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model
from lit_llama.progress import progress
from lit_llama.training.optimizer import LearningRate

import numpy as np
import torch
from benchmark import group_by_length
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path | None = None,
    n_records: PositiveInt = 160,
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    epochs: PositiveInt = 200,
    n_seeds: NonNegativeInt = 4,
) -> None:
    """Print both tables.

    Args:
        data_dir: Prepared data, for example Alpaca.
        pretrained_path: The checkpoint. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        n_records: Records whose gradients are computed, the first ones.
        micro_batch_size: Records in a micro-batch.
        block_size: Tokens after which records are cut.
        epochs: Epochs, each shuffled differently, that the figures are means of.
        n_seeds: Small models to train in each way, on all records; with fewer than 2 there is no second table.
    """
    pretrained_path = find_model(pretrained_path, QUICKSTART_MODEL)
    dataset = Dataset(data_dir, "train", block_size, limit=n_records)
    products = gradient_products(dataset, pretrained_path)
    n_targets = dataset.target_counts
    print("| records per step | variance: ours | random | grouped | cosine: ours | random | grouped |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for batch_size in (4, 16, 32, 128):
        size = min(micro_batch_size, batch_size)
        ways = (
            scheduled(BatchSchedule(dataset, batch_size, size, seed=0), epochs),
            at_random(len(dataset), batch_size, epochs),
            grouped(dataset.lengths, batch_size, size, epochs),
        )
        figures = np.array([noise(products, n_targets, way) for way in ways])  # (3, 2)
        variances, cosines = ([f"{value:.3g}" for value in column] for column in figures.T)
        print(f"| {batch_size} | {' | '.join([*variances, *cosines])} |")
    if n_seeds > 1:
        print("\n| validation loss of | mean | standard deviation of a seed |")
        print("|---|---:|---:|")
        for name in ("ours", "random", "grouped"):
            losses = [loss_after_an_epoch(name, data_dir, block_size, seed) for seed in range(n_seeds)]
            print(f"| {name} | {statistics.mean(losses):.4f} | {statistics.stdev(losses):.4f} |")


def gradient_products(dataset: Dataset, pretrained_path: Path) -> np.ndarray:
    """The scalar products (n, n) of the records' gradients, each of the sum of the record's losses."""
    model = load_model(pretrained_path)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(dropout=0.0))
    mark_only_lora_as_trainable(model)
    gradients: list[Tensor] = []
    for i in progress(range(len(dataset)), "Gradients", "record"):
        model.zero_grad()
        loss_sum(model, dataset.batch([i])).backward()
        parts = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("lora_B")]
        gradients.append(torch.cat([part.flatten() for part in parts if part is not None]))
    assert len(lora_state_dict(model)) == 2 * len(model.transformer.h)
    matrix = torch.stack(gradients).double()
    return (matrix @ matrix.T).numpy()


def scheduled(schedule: BatchSchedule, epochs: int) -> Iterable[list[np.ndarray]]:
    """The steps of each epoch by our schedule."""
    n = schedule.steps_per_epoch
    for epoch in range(epochs):
        yield [schedule.step(epoch * n + i).records for i in range(n)]


def at_random(n_records: int, batch_size: int, epochs: int, seed: int = 1) -> Iterable[list[np.ndarray]]:
    """The steps of each epoch by a plain shuffle."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n_records)
        yield [order[i : i + batch_size] for i in range(0, n_records, batch_size)]


def grouped(lengths: np.ndarray, batch_size: int, size: int, epochs: int, seed: int = 0) -> Iterable[list[np.ndarray]]:
    """The steps of each epoch from micro-batches of records of similar length."""
    rng, n = np.random.default_rng(seed), batch_size // size
    for _ in range(epochs):
        micro_batches = group_by_length(lengths, size, rng)
        yield [np.concatenate(micro_batches[i : i + n]) for i in range(0, len(micro_batches), n)]


def noise(products: np.ndarray, n_targets: np.ndarray, epochs: Iterable[list[np.ndarray]]) -> tuple[float, float]:
    """Variance of a step's gradient and cosine of the mean step's, means over epochs.

    All gradients are combinations of the records' (a step's has weight 1 / its targets on each of its records), so
    their products follow from those of the records.
    """
    whole = np.full(len(products), 1 / n_targets.sum())
    square = whole @ products @ whole
    variances, cosines = [], []
    for steps in epochs:
        weights = np.zeros((len(steps), len(products)))
        for weight, records in zip(weights, steps, strict=True):
            weight[records] = 1 / n_targets[records].sum()
        differences, mean = weights - whole, weights.mean(0)
        variances.append(np.einsum("sn,nm,sm->s", differences, products, differences, optimize=True).mean() / square)
        cosines.append(whole @ products @ mean / np.sqrt(square * (mean @ products @ mean)))
    return float(np.mean(variances)), float(np.mean(cosines))


def loss_after_an_epoch(way: str, data_dir: Path, block_size: int, seed: int) -> float:
    """Validation loss of a small LLaMA that was trained for one epoch in steps of 4 records, from random weights."""
    dataset, validation = Dataset(data_dir, "train", block_size), Dataset(data_dir, "validation", block_size)
    used, tokens = np.unique(dataset.tokens, return_inverse=True)  # a vocabulary of the tokens that occur, for speed
    dataset.tokens = validation.tokens = tokens
    epochs = {
        "ours": scheduled(BatchSchedule(dataset, 4, 4, seed), 1),
        "random": at_random(len(dataset), 4, 1, seed),
        "grouped": grouped(dataset.lengths, 4, 4, 1, seed),
    }
    steps = next(iter(epochs[way]))
    torch.manual_seed(seed)
    shape = CONFIGS["SmolLM2-135M"]
    model = LLaMA(replace(shape, vocab_size=len(used), n_layer=2, n_head=2, n_kv_head=2, n_embd=64, n_hidden=176))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for i, records in enumerate(progress(steps, f"{way}, seed {seed}", "step")):
        optimizer.param_groups[0]["lr"] = LearningRate(1e-3, 20, "linear", len(steps)).at(i)
        batch = dataset.batch(records)
        (loss_sum(model, batch) / len(batch.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        total = sum(float(loss_sum(model, batch)) for batch in single_step(validation, 8).share(0, 1))
    return total / validation.n_targets(range(len(validation)))


if __name__ == "__main__":
    run(main)
