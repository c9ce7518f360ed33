"""What is around a training loop: launching, loading, validation, stopping on a signal.

With FSDP2 (fully_shard) a model is spread over several devices. A sharded parameter is a DTensor: each device stores a
slice of its rows. A block's parameters are gathered just before it is computed, and dropped after it.
"""

import os
import signal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lit_llama.data.batches import Dataset, loss_sum, single_step
from lit_llama.device import TrainingPrecision, check_gpu, storage_dtype
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.model_folder import load_model
from lit_llama.progress import say
from lit_llama.quantization import check_compilable
from lit_llama.training.optimizer import sum_over_devices

import torch
import torch.distributed as dist
from lightning import Fabric
from lightning.fabric.loggers import Logger
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

Strategy = Literal["auto", "ddp", "fsdp"]
Quantize = Literal["nf4"]
CPU_PROCESSES = 4  # at most, on each core: they compute no faster, but show how a run on several devices behaves


def launch(
    devices: int, num_nodes: int, strategy: Strategy, precision: TrainingPrecision, logger: Logger | None = None
) -> Fabric:
    """Fabric, with one process running for each device of each node.

    `strategy` is "fsdp" for a model that is spread over the devices, "ddp" or "auto" for a whole one on each.
    """
    check_gpu()
    n, gpus = devices * num_nodes, torch.cuda.device_count()
    if devices > (gpus or CPU_PROCESSES * (os.cpu_count() or 1)):
        has = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"no GPU and {os.cpu_count()} CPU cores"
        raise UserError(f"{devices} devices were requested, but this machine has {has}; lower --devices")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would build a plan for every new length of a record
    if gpus:
        torch.set_float32_matmul_precision("high")  # products of float32 in TF32
    # all processes read the same file and draw the same random numbers
    chosen: Any = DDPStrategy(init_sync=False) if n > 1 else "auto"
    if strategy == "fsdp" and precision == "16-mixed":
        raise UserError("16-mixed is for whole models; with --strategy fsdp, give --precision 32-true or bf16-mixed")
    if strategy == "fsdp":
        spread = partial(shard, compute_dtype=storage_dtype(precision))
        chosen = ModelParallelStrategy(spread, data_parallel_size=n, tensor_parallel_size=1)
    try:
        fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy=chosen, precision=precision, loggers=logger)
        connect_again()
        fabric.launch()
    except (ValueError, RuntimeError, MisconfigurationException) as error:  # what it says of settings is clear enough
        raise UserError(f"could not launch {n} processes: {str(error).splitlines()[0]}") from None
    if (launched := fabric.world_size) != n:
        raise UserError(f"expected {n} processes (devices x nodes), but {launched} were launched; change --devices")
    return fabric


def connect_again() -> None:
    """Connect processes that torchrun has started again; it keeps its store, where they would find dead addresses."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore(f"{attempt}", store), rank=rank, world_size=n)


def load_base(fabric: Fabric, path: Path, dtype: torch.dtype, quantize: Quantize | None = None) -> LLaMA:
    """The pretrained model in `dtype` on this process's device, or mapped from its file if it is to be sharded."""
    if not isinstance(fabric.strategy, ModelParallelStrategy):
        return load_model(path, dtype, fabric.device, quantize == "nf4")
    if quantize:
        raise UserError("a 4-bit base is not sharded: with --quantize, choose --strategy ddp")
    return load_model(path)


def shard(model: LLaMA, mesh: DeviceMesh, compute_dtype: torch.dtype) -> LLaMA:
    """Spread a model over the devices, block by block, so that none of them ever holds all of it.

    Frozen parameters are stored in `compute_dtype`, trained ones in float32, in which small updates are not lost; all
    are gathered in `compute_dtype`, and gradients summed in float32. The head belongs to the model's own group, which
    stays gathered during a step: its gradient is computed together with the loss, chunk by chunk.
    """
    whole = {name: parameter.data for name, parameter in model.named_parameters()}  # most of it mapped from a file
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    untied = [] if model.config.tie_embeddings else [model.transformer.wte]  # a tied one stays with the head
    for module in (*model.transformer.h, *untied, model):
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):  # make room, which takes no memory on a CPU until it is written to
                dtype = torch.float32 if parameter.requires_grad else compute_dtype
                parameter.data = torch.empty_like(parameter, dtype=dtype, device=mesh.device_type)
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)  # the other dimension would replicate it
    for name, parameter in model.named_parameters():
        fill(parameter, whole[name])
    return model


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or if `target` is sharded the rows of it that this process stores; no others are read."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    rank, rows = target.device_mesh.get_local_rank(), whole.chunk(target.device_mesh.size())
    if rank < len(rows):  # fewer than devices if there are few rows
        target.to_local().copy_(rows[rank])


def compile_blocks(llama: LLaMA) -> None:
    """Have torch.compile fuse the operations of each kind of block, once for batches of all sizes."""
    check_compilable(llama)
    for block in llama.transformer.h:
        block.compile(dynamic=True)


@torch.no_grad()
def validation_loss(fabric: Fabric, model: nn.Module, dataset: Dataset, max_tokens: int) -> float | None:
    """The mean cross-entropy per target token of a whole data set (None if that is empty); changes no random state."""
    if not len(dataset):
        return None
    model.eval()
    step = single_step(dataset, max_tokens)
    total = torch.zeros((), device=fabric.device)
    for batch in step.batches(fabric.global_rank, fabric.world_size):
        total += loss_sum(model, fabric.to_device(batch))
    model.train()
    return sum_over_devices(fabric, total) / step.n_targets


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to stop after the running step. A second stops at once."""

    status = 128 + signal.SIGTERM  # if the signal reached another of several processes

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.requested, self.status = True, 128 + number
        say("finishing this step, then saving; a second signal ends the run at once")
        if number == signal.SIGHUP:  # the terminal is gone
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
