"""Time LoRA training against transformers + PEFT on the same machine, weights, records and batches.

Both sides train r = 8 on query and value with dropout 0.05, on the device that there is, on the same micro-batches:
  random   the records of a micro-batch are drawn at random, as finetune_lora.py draws them
  grouped  they are of similar length, as with Trainer's group_by_length
In each, the peer pads its micro-batches to the longest record, or packs them without padding (position_ids restart at
each record, and transformers masks one from another), whichever is faster. Each measurement runs in a fresh process,
one side after the other, so that a drift of the machine's speed cancels out of the ratios.
"""

import multiprocessing
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llama.cli import run
from lit_llama.data.batches import Batch, BatchSchedule, Dataset, loss_sum
from lit_llama.device import default_device, default_precision, peak_memory, storage_dtype
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UP = 3  # micro-batches, in which blocks are compiled and memory is allocated
TITLES = ("batches", "speed", "memory", "tokens/s, ours", "padded peer", "packed peer", "matrix rate", "mean loss")
IGNORED = -100  # the label of what transformers does not train on


@dataclass(frozen=True)
class Setting:
    """What one measurement works on."""

    data_dir: Path
    checkpoint: Path
    n_records: int
    micro_batch_size: int
    block_size: int
    seed: int
    batches: Literal["random", "grouped"]
    compile: bool

    def micro_batches(self) -> tuple[Dataset, list[np.ndarray]]:
        """Micro-batches of the first records, which are the same for all sides and both kinds of batches."""
        dataset = Dataset(self.data_dir, "train", self.block_size, limit=self.n_records)
        if self.batches == "grouped":
            return dataset, group_by_length(dataset.lengths, self.micro_batch_size, np.random.default_rng(self.seed))
        schedule = BatchSchedule(dataset, self.micro_batch_size, self.micro_batch_size * self.block_size, self.seed)
        return dataset, [schedule.step(i).records for i in range(schedule.steps_per_epoch)]


def group_by_length(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Micro-batches of records of similar length, in random order: 64 of them at a time are cut from sorted records."""
    order, window = rng.permutation(len(lengths)), 64 * size
    micro_batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        records = order[start : start + window]
        records = records[np.argsort(-lengths[records], kind="stable")]
        micro_batches += [records[i : i + size] for i in range(0, len(records), size)]
    rng.shuffle(micro_batches)
    return micro_batches


@dataclass(frozen=True)
class Measured:
    """One side's speed in unpadded tokens per second, the most memory in GB, and the mean loss of the micro-batches.

    `share` is its rate of computing matrix products, over that of a single large one on this machine.
    """

    speed: float
    memory: float
    loss: float
    share: float


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path | None = None,
    n_records: PositiveInt = 96,
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    rounds: PositiveInt = 3,
    compile: bool = False,
) -> None:
    """Print our speed and memory over those of the peer's faster way, and the matrix rate and mean loss of both.

    Args:
        data_dir: Prepared data, for example Alpaca.
        pretrained_path: The checkpoint. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        n_records: Records to train on in each measurement.
        micro_batch_size: Records in a micro-batch.
        block_size: Tokens after which records are cut.
        rounds: How often each side is measured.
        compile: Compile the blocks of all sides with torch.compile.
    """
    pretrained_path = find_model(pretrained_path, QUICKSTART_MODEL)
    os.environ.pop("OPENBLAS_CORETYPE", None)  # a kernel forced on OpenBLAS for an older machine would slow this one
    sides = {"ours": measure_ours, "peer, padded": measure_padded, "peer, packed": measure_packed}
    print(f"| {' | '.join(TITLES)} |", f"|---|{'---:|' * (len(TITLES) - 1)}", sep="\n")
    kinds: tuple[Literal["random", "grouped"], ...] = ("random", "grouped")
    for batches in kinds:
        results: dict[str, list[Measured]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, run_side in sides.items():
                paths = (data_dir, pretrained_path)
                sizes = (n_records, micro_batch_size, block_size)
                measured = in_fresh_process(run_side, Setting(*paths, *sizes, number, batches, compile))
                results[side].append(measured)
                print(f"{batches}, round {number + 1}, {side}: {measured}", file=sys.stderr)
        print(table_row(batches, *results.values()))


def table_row(batches: str, ours: list[Measured], padded: list[Measured], packed: list[Measured]) -> str:
    """Medians over the rounds: of ratios to the peer's faster way, and of what was measured."""
    speeds = [statistics.median(m.speed for m in side) for side in (ours, padded, packed)]
    peer = packed if speeds[2] > speeds[1] else padded
    faster, smaller = (
        statistics.median(getattr(one, what) / getattr(other, what) for one, other in zip(ours, peer, strict=True))
        for what in ("speed", "memory")
    )
    shares, losses = (
        [statistics.median(getattr(m, w) for m in side) for side in (ours, peer)] for w in ("share", "loss")
    )
    cells = [f"{faster:.2f} x", f"{smaller:.2f} x", *(f"{speed:.0f}" for speed in speeds)]
    cells += [f"{shares[0]:.0%}, {shares[1]:.0%}", f"{losses[0]:.3f}, {losses[1]:.3f}"]
    return f"| {batches} | {' | '.join(cells)} |"


def in_fresh_process(measure: Callable[[Setting], Measured], setting: Setting) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (setting,))


def measure_ours(setting: Setting) -> Measured:
    dataset, micro_batches = setting.micro_batches()
    device, dtype = machine()
    model = load_model(setting.checkpoint, dtype, device)
    add_lora(model, LoRAConfig())
    mark_only_lora_as_trainable(model)

    def loss_of(records: np.ndarray) -> Tensor:
        batch = dataset.batch(records)
        ids, select, targets = (part.to(device) for part in (batch.input_ids, batch.select, batch.targets))
        return loss_sum(model, Batch(ids, batch.lengths, select, targets)) / len(targets)

    return measure(model, loss_of, dataset, micro_batches, model.transformer.h if setting.compile else ())


def measure_padded(setting: Setting) -> Measured:
    return measure_peer(setting, padded_inputs)


def measure_packed(setting: Setting) -> Measured:
    return measure_peer(setting, packed_inputs)


def measure_peer(setting: Setting, inputs: Callable[[Dataset, np.ndarray], dict[str, Tensor]]) -> Measured:
    import peft

    dataset, micro_batches = setting.micro_batches()
    model = hf_model(setting.checkpoint)
    blocks = model.model.layers if setting.compile else ()
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, lora).train()

    def loss_of(records: np.ndarray) -> Tensor:
        given = {name: tensor.to(model.device) for name, tensor in inputs(dataset, records).items()}
        return model(**given, use_cache=False).loss  # with a cache, records would see each other

    return measure(model, loss_of, dataset, micro_batches, blocks)


def machine() -> tuple[torch.device, torch.dtype]:
    """The device that there is, and what weights are stored in there, and products computed."""
    return default_device(), storage_dtype(default_precision())


def hf_model(checkpoint: Path) -> Any:
    """The same model in transformers."""
    import transformers

    device, dtype = machine()
    ours = load_model(checkpoint, dtype, device)
    config = transformers.LlamaConfig(**hf_config(ours.config, dtype))
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model.load_state_dict(to_hf(ours.state_dict(), ours.config), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def labelled(dataset: Dataset, records: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of each record, and its labels: the tokens of the response."""
    ids = [dataset.record(i) for i in records]
    labels = [tokens.clone() for tokens in ids]
    for label, i in zip(labels, records, strict=True):
        trained = torch.zeros(len(label), dtype=torch.bool)
        for start, end in dataset.spans(i):
            trained[start:end] = True
        label[~trained] = IGNORED
    return ids, labels


def padded_inputs(dataset: Dataset, records: np.ndarray) -> dict[str, Tensor]:
    ids, labels = labelled(dataset, records)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(tokens) for tokens in ids], batch_first=True)
    padded_labels = pad(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad(ids, batch_first=True), "attention_mask": mask, "labels": padded_labels}


def packed_inputs(dataset: Dataset, records: np.ndarray) -> dict[str, Tensor]:
    ids, labels = labelled(dataset, records)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in ids])
    return {"input_ids": torch.cat(ids)[None], "position_ids": positions[None], "labels": torch.cat(labels)[None]}


def measure(
    model: nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    dataset: Dataset,
    micro_batches: list[np.ndarray],
    blocks: Iterable[nn.Module],
) -> Measured:
    """Train, with an optimizer step after each micro-batch; `blocks` are compiled."""
    for block in blocks:
        block.compile(dynamic=True)
    device, dtype = machine()
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    start, losses, warm_up = 0.0, [], micro_batches[:WARM_UP]
    for i, records in enumerate([*warm_up, *micro_batches]):
        if i == len(warm_up):
            start = time.perf_counter()
        with mixed:
            loss = loss_of(records)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    memory = peak_memory(device)
    with torch.compiler.set_stance("force_eager"), Products() as products:
        for records in micro_batches:
            with mixed:
                loss = loss_of(records)
            loss.backward()
    speed = sum(dataset.n_tokens(records) for records in micro_batches) / seconds
    share = products.operations / seconds / matrix_rate()
    return Measured(speed, memory, statistics.mean(losses[len(warm_up) :]), share)


class Products(TorchDispatchMode):
    """Counts the additions and multiplications of matrix products, except those of attention, which are fused."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.operations += 2 * out.numel() * args[-1].size(-2)
        return out


def matrix_rate(size: int = 2048) -> float:
    """Operations per second of a large matrix product, at its best."""
    device, dtype = machine()
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        product = matrix @ matrix
        product[0, 0].item()  # waits for it

    return 2 * size**3 / min(timeit.repeat(multiply, number=1, repeat=10))


if __name__ == "__main__":
    run(main)
