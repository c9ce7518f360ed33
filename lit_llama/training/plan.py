"""What a run says before its first step: what it will do, what is probably not meant, and what is trained on."""

import os
import re
import sys
from collections.abc import Iterator

from lit_llama.data.batches import BatchSchedule, Dataset, loss_sum
from lit_llama.device import describe_machine, free_memory
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.prompt import name_of, stop_ids
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.optimizer import LearningRate
from lit_llama.training.state import TrainingState

import numpy as np
import torch
from lightning import Fabric
from torch import nn
from torch.optim import Optimizer

SPELLED = ("[INST]", "<|assistant|>", "</s>")  # of templates whose control tokens a tokenizer may not have
FEW = 200  # records that are looked at, or tokens that say little
COLOUR, PLAIN = ("\033[32m", "\033[0m"), ("[[", "]]")  # around what is trained on


def plan(
    schedule: BatchSchedule,
    val_data: Dataset,
    rate: LearningRate,
    llama: LLaMA,
    state: TrainingState,
    patience: int | None,
) -> Iterator[str]:
    """Lines about the machine, the records, the steps, the learning rate and the trained parameters of a run."""
    if patience and not len(val_data):
        raise UserError("--patience needs validation records, and there are none; leave it out, or prepare some")
    n, free = state.fabric.world_size, free_memory(state.fabric.device)
    where = (
        f"on {f'{n} devices: ' if n > 1 else ''}{describe_machine()}, in {state.fabric.strategy.precision.precision}"
    )
    yield f"{where}, {free / 1e9:.1f} GB of memory free" if free else where
    data, epochs = schedule.dataset, rate.n_steps / schedule.steps_per_epoch
    yield (
        f"{len(data):,} records to train on, {data.n_cut:,} truncated, {data.n_dropped:,} dropped (prompt fills "
        f"block_size); {len(val_data):,} to validate on"
    )
    size = min(schedule.batch_size, len(data))
    most = "at most " if len(data) % size else ""
    unit = "epoch" if epochs == 1 else "epochs"
    yield f"{rate.n_steps:,} steps of {most}{size} records, {epochs:.{1 if epochs < 0.1 else 3}g} {unit}"
    yield str(rate)
    if state.saved and (now := rate.at(state.saved["step"])) > 2 * (last := state.last_rate):
        yield f"warning: the learning rate goes back up from {last:.3g} to {now:.3g}"
    trained = sum(parameter.numel() for parameter in llama.parameters() if parameter.requires_grad)
    yield f"{trained:,} trained parameters of {sum(parameter.numel() for parameter in llama.parameters()):,}"


def doubts(
    data: Dataset, val_data: Dataset, llama: LLaMA, tokenizer: Tokenizer, own: str | None, rate: float
) -> Iterator[str]:
    """What is probably not meant, with numbers; nothing of a run that is in order. `own` is the model's template."""
    if own and own != data.prompt_style and len(data.documents) < len(data.offsets) - 1:
        style = name_of(data.prompt_style).replace("own", "of a file")
        yield f"note: the data is in the prompt style {style}, not in the model's own"
    some = [i for i in range(min(FEW, len(data))) if data.is_whole(i)]
    tokens, ends = [data.record(i).tolist() for i in some], stop_ids(data.prompt_style, tokenizer)
    controls = {*tokenizer.controls.values()}
    texts = [tokenizer.decode([i for i in ids if i not in controls]) for ids in tokens]
    of = f"of {len(some)} records"
    if n := sum(ids[-1] not in ends for ids in tokens):
        yield f"warning: {n} {of} do not end in a token that ends an answer, so the model does not learn to stop"
    if n := sum(ids[:2] == [tokenizer.bos_id] * 2 for ids in tokens):
        yield f"warning: {n} {of} begin with two bos; prepare them without the bos that is in their text"
    words = [re.escape(word) for word in SPELLED if word not in data.prompt_style]  # its own are text here, too
    pattern = "|".join([tokenizer.control_pattern, *words])
    if (n := sum(bool(re.search(pattern, text)) for text in texts)) > len(some) / 20:
        yield f"warning: {n} {of} spell control tokens, which are text here; do they hold a chat template already?"
    if data.n_cut > len(data) / 5:
        yield f"warning: {data.n_cut:,} of {len(data):,} records are truncated; raise --block_size"
    held_out = {val_data.record(i).numpy().tobytes() for i in range(len(val_data))}
    alike = np.flatnonzero(np.isin(signs(data), signs(val_data)))  # only these are read
    if n := sum(data.record(i).numpy().tobytes() in held_out for i in alike.tolist()):
        yield f"warning: {n:,} of the records to train on are also validated on, so the validation loss is too low"
    if 0 < (n := val_data.n_targets(range(len(val_data)))) < FEW:
        yield f"warning: there are {n} tokens to validate on, so the validation loss says little; hold out more records"
    trained = {name: parameter.numel() for name, parameter in llama.named_parameters() if parameter.requires_grad}
    is_lora, is_adapter = (any(part in name for name in trained) for part in ("lora_", "adapter_"))
    usual = 5e-4 * (2000 / llama.config.n_embd) ** 0.781 * (1 if is_lora else 0.1)  # Tinker's rule
    if not is_adapter and not usual / 30 < rate < 30 * usual:
        yield f"warning: --learning_rate is {rate:.2g}; {usual:.1g} is usual for {llama.config.n_embd} channels"
    n, capacity = data.n_targets(range(len(data))), sum(trained.values())
    if is_lora and n > 2 * capacity:  # about 2 bits a parameter, and 1 bit a token
        yield f"warning: {n:,} tokens are trained on, more than {capacity:,} parameters can hold; raise --lora_r"


def signs(data: Dataset) -> np.ndarray:
    """A number for each record, which equal ones share: its length and one of its tokens."""
    return data.lengths.astype(np.int64) << 32 | data.tokens[data.starts + data.lengths // 2]


def measured_memory(fabric: Fabric, model: nn.Module, optimizer: Optimizer, schedule: BatchSchedule) -> str:
    """A line about the memory of a step: on CUDA, the fullest micro-batch of the first one is computed to find out."""
    if fabric.device.type != "cuda":
        return "for the memory of a step, see scripts/estimate_memory.py, or the first step, which has the most tokens"
    step = schedule.step(0)
    batch = fabric.to_device(next(step.batches(fabric.global_rank, fabric.world_size)))
    for _ in range(2):  # the second time beside the optimizer's moments
        fabric.backward(loss_sum(model, batch) / step.n_targets)
        optimizer.step()
    return f"the largest micro-batch takes {torch.cuda.max_memory_reserved(fabric.device) / 1e9:.1f} GB"


def show_records(dataset: Dataset, tokenizer: Tokenizer, n: int = 2) -> str:
    """The text of the first records as a model sees it, what is trained on marked: green on a terminal, else [[so]]."""
    begin, end = COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else PLAIN
    texts = []
    for i in range(min(n, len(dataset))):
        tokens, end_of_last, text = dataset.record(i).tolist(), 0, ""
        for start, stop in dataset.spans(i):
            text += tokenizer.show(tokens[end_of_last:start]) + begin + tokenizer.show(tokens[start:stop]) + end
            end_of_last = stop
        texts.append(text + tokenizer.show(tokens[end_of_last:]))
    return "\n\n".join(texts)
