"""Models spread over several devices with FSDP2 (fully_shard), and their state in one piece.

A sharded parameter is a DTensor: each device stores a slice of its rows. FSDP gathers a block's parameters just before
the block is computed and drops them after it. Everything here leaves plain tensors as they are. At the end is how
processes act together.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lit_llama.errors import UserError
from lit_llama.model import LLaMA

import torch
import torch.distributed as dist
from lightning import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def store_as(module: nn.Module, frozen_dtype: torch.dtype, room_on: torch.device | None = None) -> None:
    """Store frozen parameters in `frozen_dtype` and trained ones in float32, in which small updates are not lost.

    With `room_on`, only make room for what is not sharded yet, on that device. Until it is written to, it takes no
    memory on a CPU, so that `fully_shard` can cut it into shares.
    """
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.requires_grad else frozen_dtype
        if room_on is None or isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)
        else:
            parameter.data = torch.empty_like(parameter, dtype=dtype, device=room_on)


def shard(model: LLaMA, mesh: DeviceMesh, compute_dtype: torch.dtype) -> LLaMA:
    """Spread a model over the devices, block by block, so that none of them ever holds all of it.

    `mesh` is Fabric's, which also has a dimension for tensor parallelism; given whole, it would mean replication.
    Parameters are gathered in `compute_dtype`; gradients are summed in float32. The head belongs to the model's own
    group, which stays gathered during a step: its gradient is computed together with the loss, chunk by chunk.
    """
    whole = {name: parameter.data for name, parameter in model.named_parameters()}  # most of it mapped from a file
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    untied = [] if model.config.tie_embeddings else [model.transformer.wte]  # a tied one stays with the head
    for module in (*model.transformer.h, *untied, model):
        store_as(module, compute_dtype, torch.device(mesh.device_type))
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)
    for name, parameter in model.named_parameters():
        fill(parameter, whole[name])
    return model


def in_one_piece(state: Mapping[Any, Any], keep: bool) -> dict[Any, Any]:
    """A state dict with every sharded tensor gathered, on the CPU: called by all processes, for those with `keep`."""
    result: dict[Any, Any] = {}
    for name, value in state.items():  # one by one: no device holds more than one gathered tensor
        if isinstance(value, Mapping):
            result[name] = in_one_piece(value, keep)
        elif isinstance(value, Tensor):
            whole = whole_tensor(value)
            if keep:
                result[name] = whole.detach().cpu()
        else:
            result[name] = value
    return result


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in one piece; called by all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in one piece and in `dtype`, on the CPU; called by all processes if it is sharded.

    It takes memory for one piece, where `full_tensor` takes two.
    """
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", dtype)
    own, mesh = tensor.to_local().to(dtype), tensor.device_mesh
    whole = torch.empty(tensor.shape, dtype=dtype, device=own.device)
    for i, rows in enumerate(whole.chunk(mesh.size())):
        if i == mesh.get_local_rank():
            rows.copy_(own)
        dist.broadcast(rows, i)
    return whole.cpu()


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or if `target` is sharded the rows of it that this process stores; no others are read."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    mesh = target.device_mesh
    rows = dict(enumerate(whole.chunk(mesh.size())))  # fewer than devices if there are few rows
    if mesh.get_local_rank() in rows:
        target.to_local().copy_(rows[mesh.get_local_rank()])


def on_all_processes(fabric: Fabric, action: Callable[..., None], *args: Any) -> None:
    """Do something on all processes. A UserError on any of them is raised on all."""
    problem = None
    try:
        action(*args)
    except UserError as error:
        problem = str(error)
    problems = [problem] * fabric.world_size
    if fabric.world_size > 1:
        dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UserError(problem)


def on_first_process(fabric: Fabric, action: Callable[..., None], *args: Any) -> None:
    """Do something on one process alone, while the others wait. A UserError there is raised on all of them."""
    on_all_processes(fabric, action if fabric.is_global_zero else lambda *_: None, *args)
