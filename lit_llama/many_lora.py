"""Several LoRA files in one batch: one base model, and each row of a batch has the update of its own file.

The product with W is one for all rows; only the thin ones with A and B are taken row by row (as in Punica, arXiv
2310.18547, and S-LoRA, 2311.03285, with kernels for these).

Shapes: F files, r the most rows of A among them, b rows of a batch, T tokens of each; the rest as in lora.py.
"""

from collections.abc import Sequence

from lit_llama.finetuned import FinetunedFile, skeleton
from lit_llama.lora import lora_layers
from lit_llama.model import LLaMA, LLaMAConfig

import torch
from torch import Tensor, nn

Update = tuple[Tensor, Tensor]  # of a layer: A (n r, in), and B (n r, out) times alpha / r


class ManyLoRALinear(nn.Module):
    """W x + B A x with A and B of the row's file; W x is left to the layer within, in however many bits it computes.

    A and B of a smaller rank are filled up with zeros. All zeros: a file without this target; the last, for no file.
    """

    def __init__(self, base: nn.Module, updates: Sequence[Update | None], like: Tensor) -> None:
        super().__init__()
        self.base = base
        A, B = max((update for update in updates if update), key=lambda update: len(update[0]))
        self.A = nn.Buffer(like.new_zeros(len(updates) + 1, *A.shape))  # (F + 1, r, in)
        self.B = nn.Buffer(like.new_zeros(len(updates) + 1, *B.shape))  # (F + 1, r, out)
        self.rows = self.A[-1:], self.B[-1:]  # those of the rows of a batch, here of one without a file
        for i, update in enumerate(updates):
            self.put(i, update)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.rows  # (b, r, in), (b, r, out)
        update = x.view(len(A), -1, x.size(-1)) @ A.mT @ B  # (b, T, out)
        return self.base(x) + update.view(*x.shape[:-1], -1)  # (..., out)

    def put(self, i: int, update: Update | None) -> None:
        """Put an update of at most rank r, or none, in place of that of file i, to be chosen from then on."""
        n = len(update[0]) if update else 0
        if update:
            self.A[i, :n], self.B[i, :n] = update
        self.A[i, n:], self.B[i, n:] = 0, 0


@torch.no_grad()
def updates_of(file: FinetunedFile, base: LLaMAConfig) -> dict[str, Update]:
    """The updates of a LoRA file by the names of their layers."""
    tensors, updates = file.tensors_for(base), {}
    for name, layer in lora_layers(skeleton(base, file.config)[0]):
        layer.lora_B = nn.Parameter(tensors[f"{name}.lora_B"])
        updates[name] = tensors[f"{name}.lora_A"], layer.scaling * layer.spread_B().float().T
    return updates


def add_many_lora(model: LLaMA, files: Sequence[FinetunedFile]) -> None:
    """Put layers with the updates of all files around those of a loaded base model."""
    updates = [updates_of(file, model.config) for file in files]
    for name in {name: None for layers in updates for name in layers}:
        layers = [layers.get(name) for layers in updates]
        model.set_submodule(name, ManyLoRALinear(model.get_submodule(name), layers, model.transformer.wte.weight))


def choose_lora(model: LLaMA, files: Sequence[int]) -> None:
    """Say of which file each row of the next batch is, by its number; -1: of none."""
    index = torch.tensor(files, device=model.transformer.wte.weight.device)
    for layer in model.modules():
        if isinstance(layer, ManyLoRALinear):
            layer.rows = layer.A[index], layer.B[index]  # copies: quicker than by index at each token
