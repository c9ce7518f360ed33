"""How much memory a training step takes, without the memory: the real step is run on tensors that have only shapes.

The figure is the most that tensors occupy at once; a GPU needs some for its own context and for fragments, too. No GPU
is needed: the step runs on the CPU, with a GPU's operations in place of those that a CPU computes otherwise.
"""

import copy
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lit_llama.data.batches import Batch, loss_sum
from lit_llama.model import LLaMA
from lit_llama.quantization import NF4Weight, quantize_blocks
from lit_llama.training.distributed import fill, shard
from lit_llama.training.state import room_for

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = tuple[str, str]  # what a storage is for and, where that does not say it, the module and operation that made it
WEIGHTS, GRADIENTS, MOMENTS, LOGITS = ("weights", ""), ("gradients", ""), ("moments", ""), ("logits", "")
TRANSFERRED = ("gathered weights, gradients to be summed", "")
SAVED, OTHER = "activations", "backward pass, optimizer"
NO_KERNEL = re.compile("^(empty|new_empty|_unsafe_view|_local_scalar_dense|lift)")
PRODUCT = re.compile("^(mm|bmm|addmm|baddbmm)$|attention")


class Count(TorchDispatchMode):
    """Counts what operations do while it is active, on tensors with or without data.

    `live` is the bytes of all storages that were made or held and are alive, `peak` the most there were, `parts` what
    those were for. `launches` is the number of operations that a GPU needs a kernel for, `traffic` the bytes that they
    read and write, but for matrix products and attention, `received` the bytes that come from other devices.
    """

    def __init__(self, llama: LLaMA) -> None:
        super().__init__()
        self.vocab_size = llama.config.vocab_size
        self.names = {module: short_name(name) for name, module in llama.named_modules()}
        self.modules: list[str] = []  # that are being computed, the innermost last
        self.storages: dict[int, tuple[int, Kind]] = {}
        self.by_kind: Counter[Kind] = Counter()
        self.parts: Counter[Kind] = Counter()
        self.live = self.peak = self.launches = self.traffic = self.received = 0
        for parameter in llama.parameters():
            for tensor in parameter.stored() if isinstance(parameter, NF4Weight) else (parameter,):
                self.hold(tensor, WEIGHTS)

    def __enter__(self) -> "Count":
        resize = torch.UntypedStorage.resize_

        def resize_counted(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._hold(storage, TRANSFERRED)  # FSDP drops a gathered block so, and makes room for it again

        self.undo = ExitStack()
        self.undo.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_counted))
        before = register_module_forward_pre_hook(lambda module, _: self.modules.append(self.names.get(module, "")))
        after = register_module_forward_hook(lambda *_: self._leave(), always_call=True)
        self.undo.callback(before.remove)
        self.undo.callback(after.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.undo.close()

    def _leave(self) -> None:
        self.modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does with its local tensor comes by here again
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, out))
        for tensor in made:
            if tensor.untyped_storage()._cdata not in self.storages:
                self.hold(tensor, self._kind(name, tensor))
        if func.namespace in ("fsdp", "c10d"):
            self._transferred(name, given)
        if (given or made) and not (func.is_view or func.namespace == "prim" or NO_KERNEL.search(name)):
            self.launches += 1
            if func.namespace == "aten" and not PRODUCT.search(name):
                self.traffic += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*given, *made))
        return out

    def hold(self, tensor: Tensor, kind: Kind) -> None:
        """Count what this device stores of a tensor as of this kind, until it is freed."""
        self._hold((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage(), kind)

    def _hold(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        if storage._cdata not in self.storages:
            weakref.finalize(storage, self._set, storage._cdata, 0, None)
        self._set(storage._cdata, storage.nbytes(), kind)

    def _set(self, key: int, size: int, kind: Kind | None) -> None:
        before, old_kind = self.storages.pop(key, (0, LOGITS))
        if size < before and self.live == self.peak:
            self.parts = self.by_kind.copy()
        self.by_kind[old_kind] -= before
        self.live += size - before
        self.peak = max(self.peak, self.live)
        if kind is not None:
            self.by_kind[kind] += size
            self.storages[key] = size, kind

    def _kind(self, name: str, tensor: Tensor) -> Kind:
        if tensor.dim() > 1 and tensor.size(-1) == self.vocab_size:
            return LOGITS
        return (SAVED, f"{self.modules[-1]} {name}".strip()) if self.modules else (OTHER, name)

    def _transferred(self, name: str, tensors: list[Tensor]) -> None:
        """Note what FSDP copies or sends."""
        for tensor in tensors:
            if self.storages[tensor.untyped_storage()._cdata][1] not in (WEIGHTS, GRADIENTS):
                self.hold(tensor, TRANSFERRED)
        whole = max((tensor.nbytes for tensor in tensors), default=0)  # of which each device has its share
        if name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_"):
            n = dist.get_world_size()
            self.received += whole * (n - 1) // n * (2 if name == "allreduce_" else 1)


def short_name(module: str) -> str:
    """The name of a module, the same in all blocks."""
    return re.sub(r"^h\.\d+$", "block", re.sub(r"^h\.\d+\.", "", module.removeprefix("transformer.")))


def count_step(llama: LLaMA, lengths: list[int], dtype: torch.dtype, optimizer: Optimizer) -> Count:
    """Count an optimizer step on two micro-batches of records of these lengths, computed in `dtype`.

    Gradients and moments are there in the second micro-batch, as they are in most of a run. `launches`, `traffic` and
    `received` are those of a step on one.
    """
    trained = [parameter for parameter in llama.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    count = Count(llama)
    for state in optimizer.state.values():
        for tensor in state.values():
            count.hold(tensor, MOMENTS)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: count.hold(p.grad, GRADIENTS)) for p in trained]
    with count:
        for last in (False, True):
            if isinstance(llama, FSDPModule) and len(trained) < len(list(llama.parameters())):
                llama.set_requires_gradient_sync(last)  # as the scripts do, but for finetune_full.py
            count.launches = count.traffic = count.received = 0
            select = torch.arange(sum(lengths))
            batch = Batch(torch.zeros_like(select).unsqueeze(0), lengths, select, torch.zeros_like(select))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_sum(llama, batch)
            loss.backward()
            del loss
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return count


def count_resume(llama: LLaMA, optimizer: Optimizer) -> Count:
    """Count what it takes to put weights and moments back, as `TrainingState.restore` does, one by one."""
    count = Count(llama)
    with torch.no_grad(), count:
        for parameter in optimizer.param_groups[0]["params"]:
            fill(parameter, torch.empty(parameter.shape))
            saved = torch.empty(parameter.shape, dtype=getattr(optimizer, "moments_dtype", torch.float32))
            optimizer.state[parameter] = {i: room_for(saved, parameter) for i in range(2)}
            for moment in optimizer.state[parameter].values():
                fill(moment, saved)
    return count


@contextmanager
def without_data(
    llama: LLaMA,
    dtype: torch.dtype,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    n_devices: int = 1,
    on_gpu: bool = True,
) -> Iterator[tuple[LLaMA, Optimizer]]:
    """A model as it is trained, and its optimizer, of tensors that have only shapes.

    Args:
        llama: the model, not sharded, on any device, "meta" too; it is not changed.
        dtype: what is computed in.
        n_devices: over which the model is spread, if they are more than one.
        on_gpu: whether what a GPU does is to be counted, or what a CPU does.
    """
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_mesh(n_devices)) if n_devices > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # bitsandbytes has tables
        if on_gpu:
            stack.enter_context(mock.patch.multiple(F, **ON_GPU))
        shapes = copy.deepcopy(llama, {id(parameter): shape_of(parameter) for parameter in llama.parameters()})
        if any(isinstance(parameter, NF4Weight) for parameter in llama.parameters()):
            quantize_blocks(shapes, "cpu", dtype)
        if mesh is not None:
            shard(shapes, mesh, dtype)
        optimizer = make_optimizer([parameter for parameter in shapes.parameters() if parameter.requires_grad])
        for group in optimizer.param_groups:
            if "foreach" in group and on_gpu and mesh is None:  # torch's default there
                group["foreach"] = True
        yield shapes, optimizer


@contextmanager
def fake_mesh(n_devices: int) -> Iterator[DeviceMesh]:
    """A mesh as Fabric makes it, of devices to which nothing is sent. Not in a process that has real ones."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_devices)
    try:
        yield init_device_mesh("cpu", (n_devices, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        dist.destroy_process_group()


def shape_of(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like it, without data if it is made in FakeTensorMode."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def dropout(x: Tensor, p: float, training: bool, *_: Any) -> Tensor:
    """On a GPU: it keeps a mask of booleans, a CPU one of numbers."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """On a GPU: FlashAttention, or for float32 the memory-efficient kernel, which takes no grouped queries."""
    if mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if enable_gqa:
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, 0.0, is_causal, enable_gqa=True)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)[0]


def rms_norm(x: Tensor, _shape: list[int], scale: Tensor, _eps: float) -> Tensor:
    """On a GPU: it keeps the norm of each row, a CPU all of x in float32."""
    return FusedRMSNorm.apply(x, scale)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps and moves what a GPU's kernels for F.rms_norm do: one forward, one or two backward. Its values are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, _, _ = ctx.saved_tensors
        return grad + x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None


ON_GPU = {"dropout": dropout, "rms_norm": rms_norm, "scaled_dot_product_attention": attention}


def free_memory(device: torch.device) -> int:
    """Bytes that tensors can take on a device: of a GPU, all; of the host, what no other process uses; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    status = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0
