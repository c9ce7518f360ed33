"""Finetune LLaMA on instructions with LLaMA-Adapter (arXiv 2303.16199).

Every setting below is also a command-line flag.
"""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter, mark_only_adapter_as_trainable
from lit_llama.cli import constants, run
from lit_llama.data.batches import BatchSchedule, Dataset, matching_tokenizer
from lit_llama.device import TrainingPrecision, default_precision, storage_dtype
from lit_llama.errors import Stopped
from lit_llama.finetuned import describe
from lit_llama.model_folder import find_model, identity, own_template
from lit_llama.training.log import TrainingLog, make_logger
from lit_llama.training.optimizer import LearningRate, LRSchedule, StepCheck, clip_gradients, sum_over_devices
from lit_llama.training.plan import doubts, measured_memory, plan, show_records
from lit_llama.training.run import Quantize, StopSignal, Strategy, compile_blocks, launch, load_base, validation_loss
from lit_llama.training.state import Resume, TrainingState, save_weights

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# optimisation
learning_rate: PositiveFloat = 1.1e-3  # as in LLaMA-Adapter's recipe: 9e-3 for 256 records per step, scaled to its 32
batch_size: PositiveInt = 128  # records per optimizer step, over all devices
micro_batch_size: PositiveInt = 4  # long records (or more short ones) computed at once; lower it if memory runs out
micro_batch_tokens: PositiveInt | None = None  # the same in tokens; default: micro_batch_size x block_size
num_epochs: PositiveInt = 5  # passes over the training records
max_steps: PositiveInt | None = None  # stop after this many optimizer steps, if sooner than num_epochs
warmup_epochs: NonNegativeFloat = 2  # in which the learning rate rises to its value; at most two fifths of the run
lr_schedule: LRSchedule = "constant"  # after the warm-up; linear and cosine (its authors') fall to 0 at the end
weight_decay: NonNegativeFloat = 0.02  # of AdamW
max_grad_norm: PositiveFloat | None = None  # gradients of a larger norm are scaled down to it
seed: NonNegativeInt = 1337  # of the order of records, of initial values and of dropout
# data
block_size: PositiveInt = 512  # tokens; longer records are truncated
mask_prompt = True  # train on the responses only
# adapter
prompt_length: PositiveInt = 10  # prefix vectors per layer
start_layer: NonNegativeInt = 2  # the first layer that gets a prefix, counted from 0
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
strategy: Strategy = "auto"  # ddp: the whole model on each device; fsdp: spread over them, if it does not fit on one
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, up to half more time
compile = False  # fuse the operations of blocks with torch.compile; needs a C++ compiler
precision: TrainingPrecision | None = None  # default: bf16-mixed on a GPU, 16-mixed on an old one, else 32-true
quantize: Quantize | None = None  # nf4: the matrices of the blocks take 4 bits a weight; slower

ADAPTER_FILE, BEST_FILE = "lit-llama-adapter-finetuned.pth", "lit-llama-adapter-finetuned-best.pth"


def main(
    data_dir: Path = Path("data/alpaca"),
    pretrained_path: Path | None = None,
    out_dir: Path = Path("out/adapter/alpaca"),
    tokenizer_path: Path | None = None,
    resume: Resume = False,
    dry_run: bool = False,
) -> None:
    """Finetune, and write lit-llama-adapter-finetuned.pth.

    Args:
        data_dir: Folder written by one of scripts/prepare_*.py.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        out_dir: Gets the adapter file (and the best one so far), the training state, metrics.csv and loss.png.
        tokenizer_path: The base model's tokenizer, if it is not next to the checkpoint.
        resume: Continue the run in out_dir from its last saved state. auto: if there is one, else begin.
        dry_run: End before the first step: show the plan, on a GPU the memory that the largest micro-batch of that step
            takes, and two records with what is trained on marked.
    """
    pretrained_path = find_model(pretrained_path)
    precision_name = precision or default_precision()
    dtype = storage_dtype(precision_name)  # of the frozen weights and of what is written
    fabric = launch(devices, num_nodes, strategy, precision_name, make_logger(logger, out_dir))
    train_data = Dataset(data_dir, "train", block_size, mask_prompt)
    val_data = Dataset(data_dir, "validation", block_size, mask_prompt, limit=eval_records)
    settings = {**constants(sys.modules[__name__]), "data": train_data.fingerprint, **identity(pretrained_path)}
    state = TrainingState(fabric, out_dir, [ADAPTER_FILE, BEST_FILE], settings, resume, dry_run)
    schedule = BatchSchedule(train_data, batch_size, micro_batch_tokens or micro_batch_size * block_size, seed)

    torch.manual_seed(seed)
    llama = load_base(fabric, pretrained_path, dtype, quantize)
    tokenizer = matching_tokenizer(train_data, llama, pretrained_path, tokenizer_path)
    config = AdapterConfig(prompt_length, start_layer)
    add_adapter(llama, config)
    mark_only_adapter_as_trainable(llama)
    llama.recompute_blocks = activation_checkpointing
    model = fabric.setup(llama)
    trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay))
    metadata = describe(config, llama.config, train_data.prompt_style, settings)
    weights = adapter_state_dict(llama)
    first_step = state.restore(weights, optimizer)
    limits = {"--max_steps": max_steps or sys.maxsize, "--num_epochs": num_epochs * schedule.steps_per_epoch}
    n_steps = min(limits.values())
    validate_every = eval_interval or min(100, math.ceil(n_steps / 5))
    rate = LearningRate(
        learning_rate, round(warmup_epochs * schedule.steps_per_epoch), lr_schedule, n_steps, longest_warmup=0.4
    )
    if state.is_complete(limits, patience, out_dir / ADAPTER_FILE):
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
        for i, batch in enumerate(batches, 1):
            input_ids, lengths, select, targets = fabric.to_device(batch)
            with fabric.no_backward_sync(model, enabled=i < len(batches)):
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
                save_weights(fabric, out_dir / BEST_FILE, metadata, weights, dtype)
        stopping = fabric.strategy.reduce_boolean_decision(stop.requested, all=False)
        if done % save_interval == 0 or done == n_steps or stopping or state.is_patience_over(patience):
            state.save(done, metadata, weights, optimizer)
        if stopping:
            raise Stopped(f"stopped after step {done} as requested; continue with --resume true", stop.status)

    path = out_dir / ADAPTER_FILE
    log.close(f"{pretrained_path.parent.name}, LLaMA-Adapter with {prompt_length} prefix vectors")
    save_weights(fabric, path, metadata, weights, dtype)  # last: where this is, a run is complete
    if fabric.is_global_zero:
        recommended, verdict = state.recommend(path, out_dir / BEST_FILE)
        log.say(f"{verdict}Saved {path} ({path.stat().st_size / 1e6:.1f} MB). Ask it something:")
        flags = ["--adapter_path", str(recommended), "--pretrained_path", str(pretrained_path)]
        flags += ["--tokenizer_path", str(tokenizer_path)] if tokenizer_path else []
        log.say(f'python generate_adapter.py {shlex.join(flags)} --prompt "..."')


if __name__ == "__main__":
    run(main)
