"""What the training loops share besides the loop: launching, validation, stopping on a signal, training states."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llama.checkpoint import load_model, read_file, storage_dtype
from lit_llama.cli import UserError
from lit_llama.data import BatchSchedule, Dataset
from lit_llama.model import LLaMA
from lit_llama.sharding import shard
from lit_llama.tokenizer import Tokenizer, find_tokenizer

STATE_FILE = "training-state.pth"
MAY_CHANGE = (  # between the parts of a run; all else must stay as it was
    "learning_rate", "num_epochs", "max_steps", "warmup_steps", "warmup_epochs", "eval_interval", "eval_records",
    "save_interval", "log_interval", "devices", "num_nodes", "strategy", "activation_checkpointing", "logger",
)  # fmt: skip


def launch(devices: int, num_nodes: int, strategy: str, precision: str, logger: Logger | None = None) -> Fabric:
    """Fabric, with one process running for each device of each node.

    Args:
        strategy: "ddp" for a whole model on each device, "fsdp" for a model that is spread over them, "auto" for the
            former if there is more than one device.
    """
    n, gpus = devices * num_nodes, torch.cuda.device_count()
    if devices > (gpus or os.cpu_count() or 1):
        has = f"{gpus} GPUs" if gpus else f"no GPU and {os.cpu_count()} CPU cores"
        raise UserError(f"{devices} devices were asked for, this machine has {has}; lower --devices")
    if devices < 1 or num_nodes < 1 or strategy not in ("auto", "ddp", "fsdp"):
        raise UserError("expected --devices and --num_nodes from 1 on, and --strategy auto, ddp or fsdp")
    if precision not in ("32-true", "bf16-mixed"):  # others store what is trained in too few digits
        raise UserError(f"--precision is 32-true or bf16-mixed for training, not {precision!r}")
    chosen: Any = "auto"
    if strategy == "fsdp":
        spread = partial(shard, compute_dtype=storage_dtype(precision))
        chosen = ModelParallelStrategy(spread, data_parallel_size=n, tensor_parallel_size=1)
    elif n > 1:
        chosen = DDPStrategy(init_sync=False)  # all processes read the same file and draw the same random numbers
    try:
        fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy=chosen, precision=precision, loggers=logger)
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:  # what it says of settings is clear enough
        raise UserError(f"could not launch {n} processes: {str(error).splitlines()[0]}") from None
    if fabric.world_size != n:
        raise UserError(f"expected {n} processes (devices x nodes), {fabric.world_size} were launched; adapt --devices")
    return fabric


def load_base(fabric: Fabric, path: Path, dtype: torch.dtype) -> LLaMA:
    """The pretrained model in `dtype` on this process's device, or mapped from its file, if it is to be sharded."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        return load_model(path)
    return load_model(path, dtype, fabric.device)


def check_data(dataset: Dataset, model: LLaMA, pretrained_path: Path, tokenizer_path: Path | None) -> Tokenizer:
    """The model's tokenizer, or a UserError if the data was tokenised with another one or is too long for the model."""
    if dataset.block_size > model.config.block_size:
        raise UserError(f"--block_size {dataset.block_size} is more than the model's {model.config.block_size} tokens")
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    tokenizer.check_fits(model.config.vocab_size)
    if tokenizer.fingerprint() != dataset.meta["tokenizer"]:
        raise UserError(f"{dataset.data_dir} was not prepared with {tokenizer.path}; prepare it again with that")
    return tokenizer


def loss_sum(model: nn.Module, input_ids: Tensor, select: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a batch, summed over its targets; 0 where it has none."""
    logits = model(input_ids, select=select)  # (N, V)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@torch.no_grad()
def validation_loss(fabric: Fabric, model: nn.Module, dataset: Dataset, micro_batch_size: int) -> float | None:
    """The mean cross-entropy per target token of a whole data set (None if that is empty); changes no random state."""
    if not len(dataset):
        return None
    model.eval()
    schedule = BatchSchedule.of_one_step(dataset.lengths, micro_batch_size)
    total = torch.zeros((), device=fabric.device)
    for records in schedule.share(0, fabric.global_rank, fabric.world_size):
        total += loss_sum(model, *fabric.to_device(dataset.batch(records)))
    model.train()
    return float(fabric.all_reduce(total, reduce_op="sum")) / dataset.n_targets(range(len(dataset)))


def on_first_process(fabric: Fabric, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Do something on one process alone, while the others wait. A UserError there is raised on all of them."""
    problem = None
    if fabric.is_global_zero:
        try:
            action(*args, **kwargs)
        except UserError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem:
        raise UserError(problem)


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to stop after the step that is running. A second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def check_out_dir(out_dir: Path, resume: bool, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The training state to resume from; refuses to write over a run, and to resume one with other settings."""
    path = out_dir / STATE_FILE
    if resume:
        state = read_file(path)
        if not {"step", "optimizer", "hyperparameters"} <= state.keys():
            raise UserError(f"{path} is no training state")
        for name, value in state["hyperparameters"].items():
            if name not in MAY_CHANGE and settings.get(name) != value:
                raise UserError(f"cannot resume: the run in {out_dir} has {name} {value}, not {settings.get(name)}")
        return state
    if path.exists():
        raise UserError(f"{out_dir} holds a run: continue it with --resume true, or give another --out_dir")
    return None
