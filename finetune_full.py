"""Finetune all weights of LLaMA on instructions, on several devices with FSDP2. The settings below are flags, too."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning import Fabric
from torch import nn
from torch.optim import Optimizer

from lit_llama.checkpoint import default_precision, save_finetuned, save_model_folder, storage_dtype
from lit_llama.cli import UserError, constants, run
from lit_llama.data import BatchSchedule, Dataset
from lit_llama.log import TrainingLog, find_logger
from lit_llama.optimizer import AdamW
from lit_llama.sharding import in_one_piece, load_training_state
from lit_llama.training import (
    STATE_FILE,
    StopSignal,
    check_data,
    check_out_dir,
    launch,
    load_base,
    loss_sum,
    on_first_process,
    validation_loss,
)

learning_rate = 3e-5
batch_size: PositiveInt = 128  # records an optimizer step, over all devices
micro_batch_size: PositiveInt = 4  # records that a device computes at once; lower it if memory runs out
num_epochs: PositiveInt = 5
max_steps: PositiveInt | None = None  # optimizer steps to end after, where that is before num_epochs
warmup_steps = 100  # optimizer steps in which the learning rate rises to its value
weight_decay = 0.0
block_size: PositiveInt = 512  # tokens; longer records are cut
mask_prompt = True  # train on the responses alone
moments_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of AdamW; weights are float32, to lose no small updates
eval_interval: PositiveInt = 100  # optimizer steps
eval_records: PositiveInt | None = 400  # the first ones of the validation split; null: all
save_interval: PositiveInt = 100  # optimizer steps
log_interval: PositiveInt = 1  # optimizer steps between two lines, where there is no terminal
seed = 1337
devices: PositiveInt = 1  # per node
num_nodes: PositiveInt = 1
strategy = "auto"  # fsdp on several devices, each of which stores its share of weights, gradients and moments
activation_checkpointing = True  # compute blocks anew in the backward pass: less memory, a third more time
logger: str | None = None  # besides metrics.csv: tensorboard, or the class of another Lightning logger
precision: str | None = None  # null: bf16-mixed on a GPU that has bfloat16, else 32-true


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    out_dir: Path = Path("out/full/alpaca"),
    tokenizer_path: Path | None = None,
    resume: bool = False,
) -> None:
    """Finetune, and write a model folder.

    Args:
        data_dir: What one of scripts/prepare_*.py wrote.
        pretrained_path: The checkpoint of the base model.
        out_dir: Gets lit-llama.pth with its config and tokenizer, the training state, metrics.csv and loss.png.
        tokenizer_path: The base model's tokenizer, if it does not lie beside the checkpoint.
        resume: Continue the run in out_dir from its last saved state.
    """
    numerics = precision or default_precision()
    sharded = "fsdp" if devices * num_nodes > 1 else "auto"
    fabric = launch(
        devices, num_nodes, sharded if strategy == "auto" else strategy, numerics, find_logger(logger, out_dir)
    )
    train_data = Dataset(data_dir, "train", block_size, mask_prompt)
    val_data = Dataset(data_dir, "validation", block_size, mask_prompt, limit=eval_records)
    settings = {**constants(sys.modules[__name__]), "data": train_data.fingerprint}
    state = check_out_dir(out_dir, resume, settings)
    schedule = BatchSchedule(train_data.lengths, batch_size, micro_batch_size, seed)

    torch.manual_seed(seed)
    llama = load_base(fabric, pretrained_path, torch.float32)
    tokenizer = check_data(train_data, llama, pretrained_path, tokenizer_path)
    llama.recompute_blocks = activation_checkpointing
    model = fabric.setup(llama)
    moments = getattr(torch, moments_dtype)
    adamw = AdamW(llama.parameters(), lr=learning_rate, weight_decay=weight_decay, moments_dtype=moments)
    optimizer = fabric.setup_optimizers(adamw)
    first_step = load_training_state(out_dir / STATE_FILE, state, llama.state_dict(), adamw) if state else 0
    last_step = min(max_steps or sys.maxsize, num_epochs * schedule.steps_per_epoch)

    log = TrainingLog(fabric, out_dir, last_step, first_step, log_interval)
    log.say(f"{len(train_data):,} records ({train_data.n_dropped} dropped: no room for a response), {last_step} steps")
    log.say(f"{sum(parameter.numel() for parameter in llama.parameters()):,} trained parameters")
    about = {"prompt_style": train_data.meta["prompt_style"], "hyperparameters": settings}

    def save_state(step: int) -> None:
        weights = in_one_piece(llama.state_dict(), fabric.is_global_zero)
        progress = {"step": step, "optimizer": in_one_piece(optimizer.state_dict(), fabric.is_global_zero)}
        path = out_dir / STATE_FILE
        on_first_process(fabric, save_finetuned, path, "full", None, llama, weights, **about, **progress)

    steps = range(first_step, last_step)
    train(fabric, model, optimizer, schedule, train_data, val_data, log, save_state, steps, warmup_steps)
    weights = in_one_piece(llama.state_dict(), fabric.is_global_zero)
    path = out_dir / "lit-llama.pth"
    weights = {name: tensor.to(storage_dtype(numerics)) for name, tensor in weights.items()}
    on_first_process(fabric, save_model_folder, out_dir, weights, llama.config, tokenizer.files())
    log.close(f"{pretrained_path.parent.name}, all weights")
    if fabric.is_global_zero:
        log.say(f"Saved {path} ({path.stat().st_size / 1e6:.1f} MB). Ask it something:")
        log.say(f'python generate.py --checkpoint_path {path} --prompt_style {about["prompt_style"]} --prompt "..."')


def train(
    fabric: Fabric,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: BatchSchedule,
    train_data: Dataset,
    val_data: Dataset,
    log: TrainingLog,
    save_state: Callable[[int], None],
    steps: range,
    warmup_steps: int,
) -> None:
    """Take `steps` of a run. Each depends on nothing but its number and the state before it."""
    stop = StopSignal()
    if steps.start not in log.validated and (steps.start % eval_interval == 0 or not steps):
        log.validation(steps.start, validation_loss(fabric, model, val_data, micro_batch_size))
    for step in steps:
        torch.manual_seed(seed + step * fabric.world_size + fabric.global_rank)  # for the dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, warmup_steps))

        # The loss is the mean over all target tokens of the step, whichever micro-batch and device they are on.
        records = np.concatenate(schedule[step])
        n_targets = train_data.n_targets(records)
        micro_batches = schedule.share(step, fabric.global_rank, fabric.world_size)
        loss = torch.zeros((), device=fabric.device)
        for micro_batch in micro_batches:  # each sums its gradients over the devices: kept apart, they would not fit
            batch = fabric.to_device(train_data.batch(micro_batch))
            part = loss_sum(model, *batch) / n_targets
            fabric.backward(part * fabric.world_size)  # gradients are averaged over the devices
            loss += part.detach()
        mean_loss = float(fabric.all_reduce(loss, reduce_op="sum"))
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss of step {step + 1} is {mean_loss}; try a lower --learning_rate")
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        log.step(done, mean_loss, optimizer.param_groups[0]["lr"], len(records), train_data.n_tokens(records))
        stopping = fabric.strategy.reduce_boolean_decision(stop.requested, all=False)
        if done % save_interval == 0 or done == steps.stop or stopping:
            save_state(done)
        if stopping:
            raise UserError(f"stopped after step {done} as asked; continue with --resume true")
        if done % eval_interval == 0 or done == steps.stop:
            log.validation(done, validation_loss(fabric, model, val_data, micro_batch_size))


if __name__ == "__main__":
    run(main)
