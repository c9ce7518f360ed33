"""Time LoRA training and generation against transformers + PEFT on the same machine, weights, records and batches.

Both sides train r = 8 on query and value with dropout 0.05, on the same micro-batches, and generate greedily:
  random   the records of a micro-batch are drawn at random, as finetune_lora.py draws them
  grouped  they are of similar length, as with Trainer's group_by_length
In each, the peer pads its micro-batches to the longest record, or packs them without padding (position_ids restart at
each record, and transformers masks one from another), whichever is faster. Each measurement runs in a fresh process,
one side after the other, so that a drift of the machine's speed cancels out of the ratios. With --compile true, all
sides train with their blocks compiled.

With --only generation, only generation is timed, in one process and again in turns: ours in float32 and int8, and
with --compile true also compiled, over the peer's `generate` with a growing or a compiled static cache.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.cli import run
from lit_llama.data import BatchSchedule, Dataset, GroupedSchedule
from lit_llama.device import peak_memory
from lit_llama.generation import Sampling, compile_steps, generate
from lit_llama.huggingface import hf_config, to_hf
from lit_llama.lora import LoRAConfig, add_lora, mark_only_lora_as_trainable
from lit_llama.quantize import quantize_int8
from lit_llama.training import compile_blocks, loss_sum

Generator = Callable[[int], Sequence[int]]  # of so many tokens, greedily
PROMPT = list(range(1000, 1040))
WARM_UP = 3  # micro-batches, since compilers learn from the first ones which sizes vary
IGNORED = -100  # the label of what transformers does not train on


@dataclass(frozen=True)
class Setting:
    """What one measurement works on."""

    data_dir: Path
    checkpoint: Path
    n_records: int
    micro_batch_size: int
    block_size: int
    new_tokens: int
    seed: int
    batches: Literal["random", "grouped"]
    compile: bool

    def micro_batches(self) -> tuple[Dataset, list[np.ndarray]]:
        """Micro-batches of the first records, which are the same for all sides and both kinds of batches."""
        dataset = Dataset(self.data_dir, "train", self.block_size, limit=self.n_records)
        kind = BatchSchedule if self.batches == "random" else GroupedSchedule
        schedule = kind(dataset, self.micro_batch_size, self.micro_batch_size, self.seed)
        return dataset, [schedule.step(i).records for i in range(schedule.steps_per_epoch)]


@dataclass(frozen=True)
class Measured:
    """Unpadded tokens per second of training, new tokens per second, and the most memory in GB."""

    training: float
    generation: float
    memory: float


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct/lit-llama.pth"),
    n_records: PositiveInt = 96,
    micro_batch_size: PositiveInt = 4,
    block_size: PositiveInt = 512,
    new_tokens: PositiveInt = 100,
    rounds: PositiveInt = 3,
    only: Literal["generation"] | None = None,
    compile: bool = False,
) -> None:
    """Print a table of our speed and memory over the faster of the peer's two ways.

    Args:
        data_dir: Prepared data, for example Alpaca.
        pretrained_path: The checkpoint.
        n_records: Records to train on in each measurement.
        micro_batch_size: Records in a micro-batch.
        block_size: Tokens after which records are cut.
        new_tokens: Tokens to generate.
        rounds: How often each side is measured.
        only: generation, to time nothing else, and without the training in the same process.
        compile: Compile what is trained; with --only generation, measure compiled steps beside the others.
    """
    if only:
        print(generation_table(pretrained_path, new_tokens, rounds, compile))
        return
    os.environ.pop("OPENBLAS_CORETYPE", None)  # a kernel forced on OpenBLAS for an older machine would slow this one
    sides = {"ours": measure_ours, "peer, padded": measure_padded, "peer, packed": measure_packed}
    print("| batches | training speed | memory | generation speed | tokens/s, ours | padded peer | packed peer |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    kinds: tuple[Literal["random", "grouped"], ...] = ("random", "grouped")
    for batches in kinds:
        results: dict[str, list[Measured]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, measure in sides.items():
                paths = (data_dir, pretrained_path)
                sizes = (n_records, micro_batch_size, block_size, new_tokens)
                measured = in_fresh_process(measure, Setting(*paths, *sizes, number, batches, compile))
                results[side].append(measured)
                print(f"{batches}, round {number + 1}, {side}: {measured}", file=sys.stderr)
        print(table_row(batches, *results.values()))


def table_row(batches: str, ours: list[Measured], padded: list[Measured], packed: list[Measured]) -> str:
    """Medians of the ratios of each round."""
    speeds = [statistics.median(m.training for m in side) for side in (ours, padded, packed)]
    peer = packed if speeds[2] > speeds[1] else padded
    rounds = list(zip(ours, peer, strict=True))
    ratios = (
        statistics.median(one.training / other.training for one, other in rounds),
        statistics.median(one.memory / other.memory for one, other in rounds),
        statistics.median(one.generation / other.generation for one, other in rounds),
    )
    cells = [f"{ratio:.2f} x" for ratio in ratios] + [f"{speed:.0f}" for speed in speeds]
    return f"| {batches} | {' | '.join(cells)} |"


def in_fresh_process(measure: Callable[[Setting], Measured], setting: Setting) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (setting,))


def measure_ours(setting: Setting) -> Measured:
    dataset, micro_batches = setting.micro_batches()
    model = load_model(setting.checkpoint)
    start = time.perf_counter()
    assert len(list(generate(model, PROMPT, Sampling(setting.new_tokens, temperature=0)))) == setting.new_tokens
    generation = setting.new_tokens / (time.perf_counter() - start)
    add_lora(model, LoRAConfig())
    mark_only_lora_as_trainable(model)
    if setting.compile:
        compile_blocks(model)

    def loss_of(records: np.ndarray) -> Tensor:
        batch = dataset.batch(records)
        return loss_sum(model, batch) / len(batch.targets)

    return Measured(timed(model, loss_of, dataset, micro_batches), generation, peak_memory(torch.device("cpu")))


def measure_padded(setting: Setting) -> Measured:
    return measure_peer(setting, padded_inputs)


def measure_packed(setting: Setting) -> Measured:
    return measure_peer(setting, packed_inputs)


def measure_peer(setting: Setting, inputs: Callable[[Dataset, np.ndarray], dict[str, Tensor]]) -> Measured:
    import peft

    dataset, micro_batches = setting.micro_batches()
    model = hf_model(setting.checkpoint)
    prompt = torch.tensor([PROMPT])
    mask, n = torch.ones_like(prompt), setting.new_tokens
    start = time.perf_counter()
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    assert out.size(1) == len(PROMPT) + n
    generation = n / (time.perf_counter() - start)
    if setting.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, lora).train()

    def loss_of(records: np.ndarray) -> Tensor:
        return model(**inputs(dataset, records)).loss

    return Measured(timed(model, loss_of, dataset, micro_batches), generation, peak_memory(torch.device("cpu")))


def generation_table(checkpoint: Path, new_tokens: int, rounds: int, compiled: bool) -> str:
    """Speeds of all sides, and medians over the rounds of their ratios to the peer's fastest."""
    sides = {**our_generators(checkpoint, compiled), **peer_generators(checkpoint, compiled)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, generator in sides.items():
            start = time.perf_counter()
            assert len(generator(new_tokens)) == new_tokens
            if number:  # the first round warms up
                seconds[side].append(time.perf_counter() - start)
                print(f"round {number}, {side}: {new_tokens / seconds[side][-1]:.1f} tokens/s", file=sys.stderr)
    best = min((side for side in sides if side.startswith("transformers")), key=lambda side: min(seconds[side]))
    lines = ["| generation | tokens/s, fastest round | over transformers at its best |", "|---|---:|---:|"]
    for side, times in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[best], times, strict=True))
        lines.append(f"| {side} | {new_tokens / min(times):.1f} | {ratio:.2f} x |")
    return "\n".join(lines)


def our_generators(checkpoint: Path, compiled: bool) -> dict[str, Generator]:
    sides: dict[str, Generator] = {}
    for quantized in (False, True):
        for is_compiled in (False, True)[: 1 + compiled]:
            model = load_model(checkpoint, torch.float32).eval()
            if quantized:
                quantize_int8(model, torch.float32, torch.device("cpu"))
            if is_compiled:
                compile_steps(model)
            name = f"ours, {'int8' if quantized else 'float32'}{', compiled' if is_compiled else ''}"
            sides[name] = lambda n, model=model: list(generate(model, PROMPT, Sampling(n, temperature=0)))
    return sides


def peer_generators(checkpoint: Path, compiled: bool) -> dict[str, Generator]:
    """transformers' `generate` with its two caches; the static one is there to be compiled."""
    prompt, sides = torch.tensor([PROMPT]), {}
    for cache in ("dynamic", "static")[: 1 + compiled]:
        model = hf_model(checkpoint).eval()
        if cache == "static":
            model.forward = torch.compile(model.forward, fullgraph=True)

        def generator(n: int, model: Any = model, cache: str = cache) -> Sequence[int]:
            mask, lengths = torch.ones_like(prompt), {"max_new_tokens": n, "min_new_tokens": n}
            kind = {} if cache == "dynamic" else {"cache_implementation": "static"}
            return model.generate(prompt, attention_mask=mask, do_sample=False, **lengths, **kind)[
                0, len(PROMPT) :
            ].tolist()

        sides[f"transformers, {cache} cache{', compiled' if cache == 'static' else ''}"] = generator
    return sides


def hf_model(checkpoint: Path) -> Any:
    """The same model in transformers."""
    import transformers

    ours = load_model(checkpoint)
    config = transformers.LlamaConfig(**hf_config(ours.config, torch.float32))
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model.load_state_dict(to_hf(ours.state_dict(), ours.config), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
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


def timed(
    model: torch.nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    dataset: Dataset,
    micro_batches: list[np.ndarray],
) -> float:
    """Unpadded tokens per second of optimizer steps of one micro-batch."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    start = 0.0
    for i, records in enumerate([*micro_batches[:WARM_UP], *micro_batches]):
        if i == WARM_UP:
            start = time.perf_counter()
        loss_of(records).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(dataset.n_tokens(records) for records in micro_batches) / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
