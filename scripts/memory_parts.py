"""What the memory of a training step is for, and what the step moves, on one device or on each of several."""

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lit_llama.model import LLaMA
from lit_llama.quantization import NF4Weight
from lit_llama.training.run import shard

import torch
import torch.distributed as dist
from memory_trace import after_a_step, compute_gradients, for_all_blocks, gpu_operations, shapes_of, take_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
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


@dataclass(frozen=True)
class Estimate:
    """Of a training step on each device, in bytes.

    `parts` is what the tensors at the peak were for. `launches` is the number of operations in a step of one
    micro-batch that a GPU needs a kernel for, `traffic` the bytes that they read and write, but for matrix products and
    attention, `received` the bytes that come from other devices. `resume` is the peak when a run is resumed.
    """

    peak: int
    parts: Counter[Kind]
    launches: int
    traffic: int
    received: int
    resume: int


def estimate_step(
    llama: LLaMA,
    lengths: list[int],
    dtype: torch.dtype,
    make_optimizer: Callable[..., Optimizer],
    n_devices: int = 1,
    on_gpu: bool = True,
) -> Estimate:
    """What a step on records of these lengths takes, on each device if the model is spread over several."""

    def trace(blocks: nn.ModuleList) -> Counter:
        with ExitStack() as stack:
            mesh = stack.enter_context(fake_mesh(n_devices)) if n_devices > 1 else None
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(gpu_operations() if on_gpu else nullcontext())
            shapes = shapes_of(llama, blocks, dtype)
            if mesh is not None:
                shard(shapes, mesh, dtype)
            optimizer = after_a_step(shapes, make_optimizer, foreach=on_gpu and mesh is None)
            return Counter(trace_step(shapes, lengths, dtype, optimizer).found())

    total = for_all_blocks(llama, trace, n=4 if n_devices > 1 else 2)  # FSDP gathers blocks ahead
    phase = max(("blocks", "after the blocks"), key=lambda phase: total["peak", phase])
    parts = Counter({key[1:]: size for key, size in total.items() if key[0] == phase})
    resume = parts[WEIGHTS] + parts[MOMENTS]  # which are put back one by one
    launches, traffic, received = (total[name,] for name in ("launches", "traffic", "received"))
    return Estimate(total["peak", phase], parts, launches, traffic, received, resume)


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors while it is active, until they are freed, what they are for, and what operations do.

    `peaks` has the most of each phase: each block adds the same to a phase's peak, but not to that of every phase.
    `parts` has what there was then; for the rest, see `Estimate`.
    """

    def __init__(self, llama: LLaMA, optimizer: Optimizer | None = None) -> None:
        super().__init__()
        self.live, self.phase = 0, "blocks"
        self.peaks: Counter[str] = Counter()
        self.sizes: dict[int, int] = {}  # of storages
        self.vocab_size = llama.config.vocab_size
        self.names = {module: short_name(name) for name, module in llama.named_modules()}
        self.modules: list[str] = []  # that are being computed, the innermost last
        self.kinds: dict[int, Kind] = {}  # of storages
        self.by_kind: Counter[Kind] = Counter()
        self.parts: dict[str, Counter[Kind]] = {}
        self.launches = self.traffic = self.received = 0
        for p in llama.parameters():
            for tensor in p.stored() if isinstance(p, NF4Weight) else (p,):
                self.hold_as(WEIGHTS, tensor)
            if p.grad is not None:
                self.hold_as(GRADIENTS, p.grad)
        for state in optimizer.state.values() if optimizer else ():
            for tensor in state.values():
                self.hold_as(MOMENTS, tensor)

    def __enter__(self) -> "Ledger":
        resize = torch.UntypedStorage.resize_

        def resize_counted(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._hold_as(TRANSFERRED, storage)  # FSDP drops a gathered block so, and makes room for it again

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
        if DTensor in types or NF4Weight in types:
            return NotImplemented  # what they do with the tensors that they are made of comes by here again
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, out))
        for tensor in made:
            if tensor.untyped_storage()._cdata not in self.sizes:
                self.hold_as(self._kind(name, tensor), tensor)
        if func.namespace in ("fsdp", "c10d"):
            self._transferred(name, given)
        if (given or made) and not (func.is_view or func.namespace == "prim" or NO_KERNEL.search(name)):
            self.launches += 1
            if func.namespace == "aten" and not PRODUCT.search(name):
                self.traffic += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*given, *made))
        return out

    def hold_as(self, kind: Kind, tensor: Tensor) -> None:
        """Count what this device stores of a tensor as of this kind, until it is freed."""
        self._hold_as(kind, (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())

    def _hold_as(self, kind: Kind, storage: torch.UntypedStorage) -> None:
        size = self.sizes.get(storage._cdata, 0)
        self.by_kind[self.kinds.get(storage._cdata, kind)] -= size
        self.by_kind[kind] += size
        self.kinds[storage._cdata] = kind
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.resize, storage._cdata, 0)
        self.resize(storage._cdata, storage.nbytes())

    def resize(self, key: int, size: int) -> None:
        grown = size - self.sizes.pop(key, 0)
        self.by_kind[self.kinds[key]] += grown
        self.live += grown
        if size:
            self.sizes[key] = size
        if self.live >= self.peaks[self.phase]:
            self.peaks[self.phase], self.parts[self.phase] = self.live, self.by_kind.copy()

    def end_blocks(self, *_: Any) -> None:
        self.phase = "after the blocks"

    def _kind(self, name: str, tensor: Tensor) -> Kind:
        if tensor.dim() > 1 and tensor.size(-1) == self.vocab_size:
            return LOGITS
        return (SAVED, f"{self.modules[-1]} {name}".strip()) if self.modules else (OTHER, name)

    def _transferred(self, name: str, tensors: list[Tensor]) -> None:
        """Note what FSDP copies or sends."""
        for tensor in tensors:
            if self.kinds[tensor.untyped_storage()._cdata] not in (WEIGHTS, GRADIENTS):
                self.hold_as(TRANSFERRED, tensor)
        whole = max((tensor.nbytes for tensor in tensors), default=0)  # of which each device has its share
        if name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_"):
            n = dist.get_world_size()
            self.received += whole * (n - 1) // n * (2 if name == "allreduce_" else 1)

    def found(self) -> dict[tuple, int]:
        """All that was counted."""
        parts = {(phase, *kind): size for phase, kinds in self.parts.items() for kind, size in kinds.items()}
        moved = {("launches",): self.launches, ("traffic",): self.traffic, ("received",): self.received}
        return parts | moved | {("peak", phase): size for phase, size in self.peaks.items()}


def short_name(module: str) -> str:
    """The name of a module, the same in all blocks."""
    return re.sub(r"^h\.\d+$", "block", re.sub(r"^h\.\d+\.", "", module.removeprefix("transformer.")))


def trace_step(llama: LLaMA, lengths: list[int], dtype: torch.dtype, optimizer: Optimizer) -> Ledger:
    """Count a step of one micro-batch; on several devices, the second of two micro-batches."""
    is_frozen = any(not parameter.requires_grad for parameter in llama.parameters())
    if isinstance(llama, FSDPModule) and is_frozen:  # finetune_full.py sends gradients in every micro-batch
        optimizer.zero_grad()
        llama.set_requires_gradient_sync(False)
    with Ledger(llama, optimizer) as ledger:
        if isinstance(llama, FSDPModule):
            compute_gradients(llama, lengths, dtype)
            llama.set_requires_gradient_sync(True)
            ledger.launches = ledger.traffic = ledger.received = 0
        take_step(llama, lengths, dtype, optimizer, ledger.end_blocks)
    return ledger


@contextmanager
def fake_mesh(n_devices: int) -> Iterator[DeviceMesh]:
    """A mesh as Fabric makes it, of devices to which nothing is sent. Not in a process that has real ones."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_devices)
    try:
        yield init_device_mesh("cpu", (n_devices, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        dist.destroy_process_group()
