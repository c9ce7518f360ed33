"""Models spread over several devices with FSDP2 (fully_shard), and their state in one piece.

A sharded parameter is a DTensor: each device stores a slice of its rows. FSDP gathers a block's parameters just before
the block is computed and drops them after it. Everything here leaves plain tensors as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_llama.model import LLaMA


def store_as(module: nn.Module, frozen_dtype: torch.dtype) -> None:
    """Store frozen parameters in `frozen_dtype` and trained ones in float32, in which small updates are not lost."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)


def shard(model: LLaMA, mesh: DeviceMesh, compute_dtype: torch.dtype) -> LLaMA:
    """Spread a model over the devices, block by block, so that none of them ever holds all of it.

    `mesh` is Fabric's, which also has a dimension for tensor parallelism; given whole, it would mean replication.
    Parameters are gathered in `compute_dtype`; gradients are summed in float32. The head belongs to the model's own
    group, which stays gathered during a step: its gradient is computed together with the loss, chunk by chunk.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    untied = [] if model.config.tie_embeddings else [model.transformer.wte]  # a tied one stays with the head
    for module in (*model.transformer.h, *untied, model):
        store_as(module, compute_dtype)
        fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)
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


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """`whole` sharded as `target` is; `whole` itself if that is a plain tensor."""
    if isinstance(target, DTensor):
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return whole
