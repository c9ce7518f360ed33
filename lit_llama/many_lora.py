"""Several LoRA files in one batch: one base model, and each row of a batch has the update of its own file.

The product with W is one for all rows; only the thin ones with A and B are taken row by row (as in Punica, arXiv
2310.18547, and S-LoRA, 2311.03285, with kernels for these).

Shapes: F files, r the most rows of A among them, b rows of a batch, T tokens of each.
"""

from collections.abc import Sequence

from lit_llama.finetuned import FinetunedFile
from lit_llama.lora import LoRALinear, add_lora, lora_layers
from lit_llama.model import LLaMA, LLaMAConfig

import torch
from torch import Tensor, nn


class ManyLoRALinear(nn.Module):
    """W x + B A x with A and B of the row's file; W x is left to the layer within, in however many bits it computes.

    A and B of a smaller rank are filled up with zeros. All zeros: a file without this target; the last, for no file.
    """

    def __init__(self, base: nn.Module, updates: Sequence[LoRALinear | None], like: Tensor) -> None:
        super().__init__()
        sizes = [(len(update.lora_A), update.in_features, update.out_features) for update in updates if update]
        n, (r, n_in, n_out) = len(updates) + 1, max(sizes)
        self.base, self.files = base, torch.tensor([-1])  # the rows' files, (b,)
        self.A = nn.Buffer(like.new_zeros(n, r, n_in))  # (F + 1, r, in)
        self.B = nn.Buffer(like.new_zeros(n, r, n_out))  # (F + 1, r, out), times alpha / r
        for i, update in enumerate(updates):
            self.put(i, update)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A[self.files], self.B[self.files]  # (b, r, in), (b, r, out)
        update = x.view(len(A), -1, x.size(-1)) @ A.mT @ B  # (b, T, out)
        return self.base(x) + update.view(*x.shape[:-1], -1)  # (..., out)

    def put(self, i: int, update: LoRALinear | None) -> None:
        """Put an update of at most rank r, or none, in place of that of file i."""
        self.A[i], self.B[i] = 0, 0
        if update:
            n = len(update.lora_A)
            self.A[i, :n], self.B[i, :n] = update.lora_A, update.scaling * update.spread_B().T


def updates_of(file: FinetunedFile, base: LLaMAConfig) -> dict[str, LoRALinear]:
    """The layers of a LoRA file by their names, with A and B, but around no weights."""
    with torch.device("meta"):
        model = LLaMA(base)
        add_lora(model, file.config)
    model.load_state_dict(file.tensors_for(base), strict=False, assign=True)
    return dict(lora_layers(model))


@torch.no_grad()
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
            layer.files = index
