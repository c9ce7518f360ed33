"""Several LoRA files in one batch: one base, and each row has the update of its own file (Punica, arXiv 2310.18547).

Shapes: b rows of a batch, T tokens of each, R the most rows of A in any file; the rest as in lora.py.
"""

from typing import Any

from lit_llama.finetuned import FinetunedFile
from lit_llama.lora import LoRALinear
from lit_llama.model import LLaMA

import torch
from torch import Tensor, nn


class ManyLoRALinear(nn.Module):
    """W x + B A x with A and B of the row's file; W x is left to the layer within, in however many bits it computes."""

    def __init__(self, base: Any, n_rows: int, R: int, like: Tensor) -> None:
        super().__init__()
        self.base, (out_features, in_features) = base, base.weight.shape
        self.A = nn.Buffer(like.new_zeros(n_rows, R, in_features))
        self.B = nn.Buffer(like.new_zeros(n_rows, R, out_features))  # transposed, and times alpha / r

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A[: len(x)], self.B[: len(x)]  # (b, R, in), (b, R, out)
        update = x.view(len(x), -1, x.size(-1)) @ A.mT @ B  # (b, T, out)
        return self.base(x) + update.view(*x.shape[:-1], -1)  # (..., out)

    def put(self, row: int, update: LoRALinear | None) -> None:
        """Give a row A and B of its file, filled up with zeros; or zeros if it has none for this layer."""
        n = len(update.lora_A) if update else 0
        if update:
            self.A[row, :n], self.B[row, :n] = update.lora_A, (update.scaling * update.spread_B().float()).T
        self.A[row, n:], self.B[row, n:] = 0, 0


class ManyLoRA:
    """Room in a loaded base model for the updates of a batch of rows. Files stay on the disk until a row is of them."""

    def __init__(self, model: LLaMA, files: list[FinetunedFile], n_rows: int) -> None:
        self.config, self.files = model.config, [*files, None]
        self.rows: list[FinetunedFile | None] = [None] * n_rows
        self.layers: dict[str, ManyLoRALinear] = {}
        updates = [file.lora_layers(model.config) for file in files]
        for name in {name for layers in updates for name in layers}:
            R = max(len(layers[name].lora_A) for layers in updates if name in layers)
            self.layers[name] = ManyLoRALinear(model.get_submodule(name), n_rows, R, model.transformer.wte.weight)
            model.set_submodule(name, self.layers[name])

    @torch.no_grad()
    def choose(self, numbers: list[int]) -> None:
        """Say of which file each row of the next batch is, by its number; -1: of none."""
        for row, file in enumerate(self.files[number] for number in numbers):
            if file is not self.rows[row]:
                updates = file.lora_layers(self.config) if file else {}
                for name, layer in self.layers.items():
                    layer.put(row, updates.get(name))
                self.rows[row] = file
