"""LoRA: low-rank updates of a frozen LLaMA (Hu et al. 2021, arXiv 2106.09685).

A linear layer W (out x in) becomes W + (alpha / r) B A with trainable A (r x in) and B (out x r). A starts random and B
at zero, so training starts at the pretrained model. W itself never changes, and after training `merge_lora` folds the
update into it, so that it costs nothing at inference.

The fused attention layer holds three such W, one above the other: queries, keys, values. Each of them that is a target
has its own A and B; they are stacked in `lora_A` (n r x in) and `lora_B` (their rows x r).

Shapes: r rank, n targets in the layer, C embedding width, H hidden width of the MLP, V vocabulary; (..., in) is a batch
of inputs, here usually (batch, tokens, in). B is always LoRA's matrix.
"""

import math
import re
from dataclasses import dataclass, replace

from lit_llama.errors import UserError, check_fields
from lit_llama.model import Linear, LLaMA

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("query", "key", "value", "projection", "mlp", "head")


@dataclass(frozen=True)
class LoRAConfig:
    """What is updated and how much: rank, scale (the update is multiplied by alpha / r), dropout, target layers."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        check_fields(self, r=(1, 2**16), alpha=(-1e9, 1e9), dropout=(0, 0.99))
        unknown = set(self.targets) - set(TARGETS)
        if unknown or not self.targets:
            raise UserError(f"LoRA targets are one or more of {', '.join(TARGETS)}, not {', '.join(unknown) or 'none'}")


def parse_targets(text: str) -> tuple[str, ...]:
    """Targets as users write them: `query,value`, `["query", "value"]`, or `all`, which is all but the head."""
    names = tuple(re.findall(r"[^\s,\[\]\"']+", text))
    return tuple(name for name in TARGETS if name != "head") if names == ("all",) else names


class LoRALinear(Linear):
    """W x + (alpha / r) B A x, where W is the weight of the layer this one replaces."""

    def __init__(self, base: Linear, rows: dict[str, int], config: LoRAConfig) -> None:
        """`rows` names what could be targets in the layer's output, in order, each with its number of rows."""
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        self.weight = base.weight
        self.rows = rows
        self.target_rows = {name: n if name in config.targets else 0 for name, n in rows.items()}
        n_targets, device = sum(n > 0 for n in self.target_rows.values()), base.weight.device
        self.lora_A = nn.Parameter(torch.empty(n_targets * config.r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(sum(self.target_rows.values()), config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)
        self.scaling = config.alpha / config.r

    def forward(self, x: Tensor) -> Tensor:
        Ax = F.linear(self.dropout(x), self.lora_A)  # (..., n r)
        return super().forward(x) + F.linear(self.scaling * Ax, self.spread_B())  # (..., out)

    def spread_B(self) -> Tensor:
        """B as one matrix (out, n r): each target's block in its own columns, zero rows for non-targets."""
        blocks = zip(self.lora_B.split(tuple(self.target_rows.values())), self.rows.values(), strict=True)
        return torch.block_diag(*(block if len(block) else block.new_zeros(n, 0) for block, n in blocks))

    def delta(self) -> Tensor:
        """The update of the whole weight (out, in), in float32."""
        return self.scaling * self.spread_B().float() @ self.lora_A.float()


def add_lora(model: LLaMA, config: LoRAConfig) -> None:
    """Replace the target layers of a built and loaded model by LoRA layers around the same weights."""
    C, H, V = model.config.n_embd, model.config.n_hidden, model.config.vocab_size
    qkv = dict(zip(("query", "key", "value"), model.config.qkv_sizes, strict=True))
    layers: list[tuple[nn.Module, str, dict[str, int]]] = [(model, "lm_head", {"head": V})]
    for block in model.transformer.h:
        layers += [(block.attn, "c_attn", qkv), (block.attn, "c_proj", {"projection": C})]
        layers += [
            (block.mlp, "c_fc1", {"mlp": H}),
            (block.mlp, "c_fc2", {"mlp": H}),
            (block.mlp, "c_proj", {"mlp": C}),
        ]
    for parent, name, rows in layers:
        if rows.keys() & set(config.targets):
            layer = LoRALinear(getattr(parent, name), rows, config)
            setattr(parent, name, layer.train(model.training))


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters alone, under Lit-LLaMA's names."""
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@torch.no_grad()
def merge_lora(model: LLaMA) -> None:
    """Fold all LoRA updates into the weights, in float32, and put plain layers back; a second call does nothing."""
    for name, layer in lora_layers(model):
        weight = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)
        put_plain_layer(model, name, nn.Parameter(weight, requires_grad=layer.weight.requires_grad))
        if name == "lm_head":  # it no longer shares the embedding's weight
            model.config = replace(model.config, tie_embeddings=False)


def remove_lora(model: LLaMA) -> None:
    """Take unmerged LoRA layers out again: the model is the pretrained one, bit for bit, and ready for others."""
    for name, layer in lora_layers(model):
        put_plain_layer(model, name, layer.weight)


def lora_layers(model: LLaMA) -> list[tuple[str, LoRALinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def put_plain_layer(model: LLaMA, name: str, weight: Tensor) -> None:
    assert isinstance(weight, nn.Parameter)  # the very one, which a head may share with the embedding
    with torch.device("meta"):
        layer = Linear(weight.size(1), weight.size(0))
    layer.weight = weight
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
