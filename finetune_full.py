"""Finetune all weights of LLaMA on instructions, sharded with FSDP2.

Every setting below is also a command-line flag.
"""

import math
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from lit_llama.cli import constants, run
from lit_llama.data.batches import BatchSchedule, Dataset, matching_tokenizer
from lit_llama.device import TrainingPrecision, default_precision, storage_dtype
from lit_llama.errors import Stopped
from lit_llama.finetuned import describe
from lit_llama.model_folder import WEIGHTS, find_model, identity, own_template
from lit_llama.storage.files import check_apart
from lit_llama.training.log import TrainingLog, make_logger
from lit_llama.training.optimizer import AdamW, LearningRate, LRSchedule, StepCheck, clip_gradients, sum_over_devices
from lit_llama.training.plan import doubts, measured_memory, plan, show_records
from lit_llama.training.run import StopSignal, Strategy, compile_blocks, launch, load_base, validation_loss
from lit_llama.training.state import Resume, TrainingState, save_model

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# optimisation
learning_rate: PositiveFloat = 3e-5  # of AdamW, after the warm-up
batch_size: PositiveInt = 128  # records per optimizer step, over all devices
micro_batch_size: PositiveInt = 4  # long records (or more short ones) computed at once; lower it if memory runs out
micro_batch_tokens: PositiveInt | None = None  # the same in tokens; default: micro_batch_size x block_size
num_epochs: PositiveInt = 5  # passes over the training records
max_steps: PositiveInt | None = None  # stop after this many optimizer steps, if sooner than num_epochs
warmup_steps: NonNegativeInt = 100  # optimizer steps in which the rate rises to its value; at most a tenth of the run
lr_schedule: LRSchedule = "constant"  # after the warm-up; linear and cosine fall to 0 at the end
weight_decay: NonNegativeFloat = 0.0  # of AdamW
moments_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of AdamW; weights are float32, to lose no small updates
max_grad_norm: PositiveFloat | None = None  # gradients of a larger norm are scaled down to it
seed: NonNegativeInt = 1337  # of the order of records, of initial values and of dropout
# data
block_size: PositiveInt = 512  # tokens; longer records are truncated
mask_prompt = True  # train on the responses only
# evaluation and saving
eval_interval: PositiveInt | None = None  # optimizer steps between two validations; default: 100, or a fifth of the run
eval_records: PositiveInt | None = 400  # validate on the first N records (null: on all)
sample_prompt: str | None = None  # answer this at each validation, to see in the log and in samples.txt
patience: PositiveInt | None = None  # stop after this many validations without a new lowest loss
save_interval: PositiveInt = 100  # optimizer steps between two saved states
log_interval: PositiveInt = 1  # optimizer steps between two lines, when not on a terminal
logger: str | None = None  # in addition to metrics.csv: tensorboard, wandb, or the class of another Lightning logger
# devices
devices: PositiveInt = 1  # GPUs (or CPU processes) on each node
num_nodes: PositiveInt = 1  # machines
strategy: Strategy = "auto"  # fsdp on several devices: each stores its share of weights, gradients and moments
activation_checkpointing = True  # recompute blocks in the backward pass: less memory, a third more time
compile = False  # fuse the operations of blocks with torch.compile; needs a C++ compiler
precision: TrainingPrecision | None = None  # default: bf16-mixed on a GPU, 16-mixed on an old one, else 32-true

BEST_FOLDER = "best"


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path | None = None,
    out_dir: Path = Path("out/full/alpaca"),
    tokenizer_path: Path | None = None,
    resume: Resume = False,
    dry_run: bool = False,
) -> None:
    """Finetune, and write a model folder.

    Args:
        data_dir: Folder written by one of scripts/prepare_*.py.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        out_dir: Gets lit-llama.pth with its config and tokenizer, the best one so far in the folder best, the training
            state, metrics.csv and loss.png.
        tokenizer_path: The base model's tokenizer, if it is not next to the checkpoint.
        resume: Continue the run in out_dir from its last saved state. auto: if there is one, else begin.
        dry_run: End before the first step: show the plan, on a GPU the memory that the largest micro-batch of that step
            takes, and two records with what is trained on marked.
    """
    pretrained_path = find_model(pretrained_path)
    precision_name = precision or default_precision()
    strategy_name: Strategy = "fsdp" if strategy == "auto" and devices * num_nodes > 1 else strategy
    dtype = storage_dtype(precision_name)  # of what is written
    fabric = launch(devices, num_nodes, strategy_name, precision_name, make_logger(logger, out_dir))
    train_data = Dataset(data_dir, "train", block_size, mask_prompt)
    val_data = Dataset(data_dir, "validation", block_size, mask_prompt, limit=eval_records)
    settings = {**constants(sys.modules[__name__]), "data": train_data.fingerprint, **identity(pretrained_path)}
    check_apart(pretrained_path, out_dir / WEIGHTS)
    state = TrainingState(fabric, out_dir, [WEIGHTS, "config.json", BEST_FOLDER], settings, resume, dry_run)
    schedule = BatchSchedule(train_data, batch_size, micro_batch_tokens or micro_batch_size * block_size, seed)

    torch.manual_seed(seed)
    llama = load_base(fabric, pretrained_path, torch.float32)
    tokenizer = matching_tokenizer(train_data, llama, pretrained_path, tokenizer_path)
    llama.recompute_blocks = activation_checkpointing
    model = fabric.setup(llama)
    trained = list(llama.parameters())
    moments = getattr(torch, moments_dtype)
    adamw = AdamW(trained, lr=learning_rate, weight_decay=weight_decay, moments_dtype=moments)
    optimizer: Any = fabric.setup_optimizers(adamw)
    metadata = describe(None, llama.config, train_data.prompt_style, settings)
    weights = llama.state_dict(keep_vars=True)  # a tied head is the embedding itself, and saved once
    first_step = state.restore(weights, optimizer)
    limits = {"--max_steps": max_steps or sys.maxsize, "--num_epochs": num_epochs * schedule.steps_per_epoch}
    n_steps = min(limits.values())
    validate_every = eval_interval or min(100, math.ceil(n_steps / 5))
    rate = LearningRate(learning_rate, warmup_steps, lr_schedule, n_steps)
    if state.is_complete(limits, patience, out_dir / WEIGHTS, out_dir / "config.json"):
        return

    found = doubts(train_data, val_data, llama, tokenizer, own_template(pretrained_path), learning_rate)
    lines = (*plan(schedule, val_data, rate, llama, state, patience), *found)
    fabric.print(*lines, sep="\n", file=sys.stderr)
    if compile:
        compile_blocks(llama)
    if dry_run:
        fabric.print(measured_memory(fabric, model, optimizer, schedule), file=sys.stderr)
        fabric.print(show_records(train_data, tokenizer))
        return
    log = TrainingLog(fabric, out_dir, n_steps, first_step, log_interval, settings)
    stop, check_step = StopSignal(), StepCheck(log, llama, fabric.strategy.precision)
    if first_step == 0:
        val_loss = validation_loss(fabric, model, val_data, schedule.max_tokens)
        log.validation(0, val_loss)
        log.sample(0, model, tokenizer, train_data.prompt_style, sample_prompt)
        state.is_best(0, val_loss)  # the best file has to beat the untrained model, too
    # A step depends on nothing but its number and the state before it: a resumed run ends like an uninterrupted one.
    for step in range(first_step, n_steps):
        if state.is_patience_over(patience):
            log.say(f"Stopped after step {step} of {n_steps}: no new lowest validation loss (--patience {patience}).")
            break
        for group in optimizer.param_groups:
            group["lr"] = rate.at(step)

        # The model sums the cross-entropy of the selected tokens' logits with the targets, the tokens that follow them.
        # The loss is the mean over all targets of the step, whichever micro-batch and device they are on.
        data = schedule.step(step)
        batches = data.share(fabric.global_rank, fabric.world_size)
        step_loss = torch.zeros((), device=fabric.device)
        for batch in batches:  # gradients are reduced each time: kept apart on each device they would not fit
            input_ids, lengths, select, targets = fabric.to_device(batch)
            loss = model(input_ids, lengths=lengths, select=select, targets=targets) / data.n_targets
            fabric.backward(loss * fabric.world_size)  # gradients are averaged over the devices
            step_loss += loss.detach()
        mean_loss = sum_over_devices(fabric, step_loss)
        gradient_norm = clip_gradients(fabric, model, optimizer, max_grad_norm)
        check_step(data, step, mean_loss, gradient_norm)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        log.step(done, data, mean_loss, rate.at(step), gradient_norm)
        if done % validate_every == 0 or done == n_steps:
            val_loss = validation_loss(fabric, model, val_data, schedule.max_tokens)
            log.validation(done, val_loss)
            log.sample(done, model, tokenizer, train_data.prompt_style, sample_prompt)
            if state.is_best(done, val_loss):
                save_model(fabric, out_dir / BEST_FOLDER, metadata, weights, dtype, tokenizer.files())
        stopping = fabric.strategy.reduce_boolean_decision(stop.requested, all=False)
        if done % save_interval == 0 or done == n_steps or stopping or state.is_patience_over(patience):
            state.save(done, metadata, weights, optimizer)
        if stopping:
            raise Stopped(f"stopped after step {done} as requested; continue with --resume true", stop.status)

    log.close(f"{pretrained_path.parent.name}, all weights")
    save_model(fabric, out_dir, metadata, weights, dtype, tokenizer.files())
    path = out_dir / WEIGHTS
    if fabric.is_global_zero:
        recommended, verdict = state.recommend(path, out_dir / BEST_FOLDER / WEIGHTS)
        log.say(f"{verdict}Saved {path} ({path.stat().st_size / 1e6:.1f} MB). Ask it something:")
        flags = shlex.join(["--checkpoint_path", str(recommended)])
        log.say(f'python generate.py {flags} --prompt "..."')


if __name__ == "__main__":
    run(main)
