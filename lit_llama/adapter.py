"""LLaMA-Adapter: a learned prefix for the upper layers, faded in by zero-initialised gates (arXiv 2303.16199).

From layer `start_layer` on, each attention gets `prompt_length` learned prefix vectors. Its queries attend to them
apart from the text, in a softmax of their own, and what they gather is added, scaled by a gate for each head (section
3.2). All gates start at 0, so training starts at the pretrained model. Only prefixes and gates are trained. As in
Lit-LLaMA, a gate is used as it is, without a tanh.

Shapes: B batch, T tokens, P prompt length, C embedding width, nh query heads, nkv key and value heads, hs head size.
"""

from dataclasses import dataclass

from lit_llama.errors import UserError, check_fields
from lit_llama.model import CausalSelfAttention, LLaMA, Mask, attention

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterConfig:
    """How many prefix vectors a layer gets, and the first layer (counted from 0) that gets them."""

    prompt_length: int = 10
    start_layer: int = 2

    def __post_init__(self) -> None:
        check_fields(self, prompt_length=(1, 2**16), start_layer=(0, 1023))


class AdapterAttention(CausalSelfAttention):
    """Replaces an attention layer: same weights plus a gated prefix."""

    def __init__(self, base: CausalSelfAttention, config: AdapterConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.c_attn, self.c_proj = base.config, base.c_attn, base.c_proj
        device = base.c_proj.weight.device
        self.adapter_wte = nn.Embedding(config.prompt_length, self.config.n_embd, device=device)
        self.gating_factor = nn.Parameter(torch.zeros(1, self.config.n_head, 1, 1, device=device))
        self.cached_prefix: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        ak, av = self.cached_prefix or self.prefix()
        ak, av = (tensor.expand(len(q), -1, -1, -1) for tensor in (ak, av))  # (B, nkv, P, hs); fused kernels want B
        gathered = attention(q, ak, av, is_causal=False)  # (B, nh, T, hs)
        return super().attend(q, k, v, mask) + self.gating_factor.to(q.dtype) * gathered

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values (1, nkv, P, hs) of the prefix. It comes before all positions, so they are not rotated."""
        _, ak, av = self.heads(self.c_attn(self.adapter_wte.weight.unsqueeze(0)))
        return ak, av


def add_adapter(model: LLaMA, config: AdapterConfig) -> None:
    """Replace the attention of the upper layers of a built and loaded model by one with a prefix."""
    if config.start_layer >= model.config.n_layer:
        raise UserError(
            f"the model has {model.config.n_layer} layers, so an adapter cannot start at {config.start_layer}"
        )
    for block in model.transformer.h[config.start_layer :]:
        block.attn = AdapterAttention(block.attn, config)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to the adapter."""
    return name.endswith(("adapter_wte.weight", "gating_factor"))


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_adapter(name)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters alone, under Lit-LLaMA's names."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}


@torch.no_grad()
def cache_prefix(model: LLaMA) -> None:
    """Compute the keys and values of all prefixes once, for generation. Not for a model that is trained on."""
    for block in model.transformer.h:
        if isinstance(block.attn, AdapterAttention):
            block.attn.cached_prefix = block.attn.prefix()
