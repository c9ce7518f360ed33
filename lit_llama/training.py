"""What the training loops share besides the loop: launching, validation, stopping on a signal, training states."""

import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llama.checkpoint import read_file
from lit_llama.cli import UserError
from lit_llama.data import BatchSchedule, Dataset
from lit_llama.model import LLaMA
from lit_llama.tokenizer import find_tokenizer

STATE_FILE = "training-state.pth"


def launch(devices: int, num_nodes: int, strategy: str, precision: str) -> Fabric:
    """Fabric, with one process running for each device."""
    fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def check_tokenizer(dataset: Dataset, model: LLaMA, pretrained_path: Path, tokenizer_path: Path | None) -> None:
    """Raise a UserError if the data was tokenised with another tokenizer than the model's."""
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    if tokenizer.fingerprint() != dataset.meta["tokenizer"] or tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{dataset.data_dir} was not prepared with {tokenizer.path}; prepare it again with that")


def loss_sum(model: nn.Module, input_ids: Tensor, select: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a batch, summed over its targets; 0 where it has none."""
    logits = model(input_ids, select=select)  # (N, V)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@torch.no_grad()
def validation_loss(fabric: Fabric, model: nn.Module, dataset: Dataset, micro_batch_size: int) -> float:
    """The mean cross-entropy per target token of a whole data set (nan if that is empty); changes no random state."""
    if not len(dataset):
        return math.nan
    model.eval()
    schedule = BatchSchedule(dataset.lengths, len(dataset) + micro_batch_size, micro_batch_size, seed=0)  # one step
    total = torch.zeros((), device=fabric.device)
    for records in schedule.share(0, fabric.global_rank, fabric.world_size):
        total += loss_sum(model, *fabric.to_device(dataset.batch(records)))
    model.train()
    return float(fabric.all_reduce(total, reduce_op="sum")) / dataset.n_targets(range(len(dataset)))


class StopSignal:
    """Turns SIGINT and SIGTERM into a request to stop after the step that is running. A second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def check_out_dir(out_dir: Path, resume: bool) -> dict[str, Any] | None:
    """The training state to resume from; refuses to write over a run, and to resume one that is not there."""
    path = out_dir / STATE_FILE
    if resume:
        return read_file(path)
    if path.exists():
        raise UserError(f"{out_dir} holds a run: continue it with --resume true, or give another --out_dir")
    return None
