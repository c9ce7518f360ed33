"""LLaMA, the whole of it: configuration, rotary embedding, attention, MLP, KV cache.

Shapes: B batch, T tokens of the input, S places attended to (T and those cached before it), C embedding width (n_embd),
nh query heads, nkv key and value heads, hs head size, H hidden width of the MLP, V vocabulary, N selected tokens.
Papers: LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lit_llama.errors import UserError, check_fields
from lit_llama.kernels import (
    Linear,
    Packed,
    SwiGLU,
    attention,
    packed_attention,
    rotate,
    summed_cross_entropy,
    without_autocast,
)  # fmt: skip

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Mask = Tensor | Packed | None  # see `attention_mask`; None: each token attends to all before it
Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `KVCache.append`


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained length: all alike (linear, arXiv 2306.15595).

    With the other three fields, only slow ones are, as Llama 3.1 and later were trained (Meta's `apply_scaling`).
    """

    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_block_size: int = 0

    def __post_init__(self) -> None:
        check_fields(self, factor=(1, 1e6), original_block_size=(0, 2**24), low_freq_factor=(0, 1e6))
        if self.original_block_size and not self.low_freq_factor < self.high_freq_factor <= 1e6:
            raise UserError(f"high_freq_factor is {self.high_freq_factor}, expected {self.low_freq_factor} to 1e6")


@dataclass(frozen=True)
class LLaMAConfig:
    """The shape of a model. The defaults are those of LLaMA 7B."""

    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    n_embd: int = 4096
    n_kv_head: int = 0  # 0: as many as query heads
    n_hidden: int = 0  # 0: two thirds of 4 n_embd, rounded up to 256s
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        check_fields(  # the limits are far beyond any published model
            self, block_size=(1, 2**24), vocab_size=(1, 2**22), n_layer=(1, 1024), n_head=(1, 4096), n_embd=(2, 2**17),
            n_kv_head=(0, 4096), n_hidden=(0, 2**20), norm_eps=(0, 0.1), rope_base=(1, 1e12),
        )  # fmt: skip
        if not self.n_kv_head:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if not self.n_hidden:
            object.__setattr__(self, "n_hidden", math.ceil(int(8 * self.n_embd / 3) / 256) * 256)
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or self.head_size % 2:
            raise UserError(f"{self.n_embd=} must be an even multiple of {self.n_head=}, that one of {self.n_kv_head=}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of `c_attn.weight` that make queries, keys and values."""
        return self.n_embd, self.n_kv_head * self.head_size, self.n_kv_head * self.head_size


_llama_2 = LLaMAConfig(block_size=4096, norm_eps=1e-5)
LLAMA_3_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
_llama_3 = replace(_llama_2, block_size=131072, vocab_size=128256, n_kv_head=8, n_hidden=14336, rope_base=500000.0)
_llama_3_2 = replace(_llama_3, n_hidden=8192, rope_scaling=replace(LLAMA_3_SCALING, factor=32.0), tie_embeddings=True)
_smollm2 = LLaMAConfig(block_size=8192, vocab_size=49152, norm_eps=1e-5, rope_base=100000.0, tie_embeddings=True)

CONFIGS = {  # of published models
    "7B": LLaMAConfig(),
    "13B": LLaMAConfig(n_layer=40, n_head=40, n_embd=5120),
    "30B": LLaMAConfig(n_layer=60, n_head=52, n_embd=6656),
    "65B": LLaMAConfig(n_layer=80, n_head=64, n_embd=8192, norm_eps=1e-5),
    "Llama-2-7B": _llama_2,
    "Llama-2-13B": replace(_llama_2, n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, n_hidden=13824),
    "Llama-2-70B": replace(_llama_2, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, n_hidden=28672),
    "TinyLlama-1.1B": LLaMAConfig(n_layer=22, n_kv_head=4, n_embd=2048, n_hidden=5632, norm_eps=1e-5),
    "Llama-3.1-8B": replace(_llama_3, rope_scaling=LLAMA_3_SCALING),
    "Llama-3.2-1B": replace(_llama_3_2, n_layer=16, n_embd=2048),
    "Llama-3.2-3B": replace(_llama_3_2, n_layer=28, n_head=24, n_embd=3072),
    "SmolLM2-135M": replace(_smollm2, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536),
    "SmolLM2-360M": replace(_smollm2, n_layer=32, n_head=15, n_kv_head=5, n_embd=960, n_hidden=2560),
    "SmolLM2-1.7B": replace(_smollm2, n_layer=24, n_embd=2048, n_hidden=8192, rope_base=130000.0),
}


class LLaMA(nn.Module):
    """Token ids in, logits of the next token out."""

    transformer: Any  # a ModuleDict of modules with a type of their own: wte, h, ln_f
    compiled: Callable[..., Tensor] | None = None  # forward for a single token, see `compile_steps` of generation.py

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False  # in the backward pass: less memory, a third more time (arXiv 1604.06174)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight, if the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        idx: Tensor,
        cache: "KVCache | None" = None,
        select: Tensor | None = None,
        n_pad: Tensor | None = None,
        lengths: list[int] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for token ids idx (B, T), or, with targets, the loss.

        Args:
            cache: keys and values of the tokens before `idx`, from `new_cache`; those of `idx` are added in place.
            select: indices (N,) into the B * T tokens; only their logits (N, V) are computed (training needs no more).
            n_pad: how many tokens (B,) at the start of each sequence are padding. (Right padding needs no mask.)
            lengths: of sequences packed one after the other into a single row idx (1, T); none of them sees another.
            targets: the tokens (N,) that follow the selected ones; the result is their cross-entropy, summed.
        """
        T = idx.size(1)
        past, room = (cache.length, cache.room) if cache else (0, 0)
        S = past + T if isinstance(past, int) else room
        places = torch.arange(T, device=idx.device) + past  # (T,)
        needs_mask = n_pad is not None or isinstance(past, Tensor) or 1 < T < S
        mask = attention_mask(places, S, n_pad) if needs_mask else lengths and Packed.of(lengths, idx.device)
        positions = torch.cat([places[:n] for n in lengths]) if lengths else places  # (T,)
        if n_pad is not None:
            positions = positions - n_pad[:, None]  # (B, T)
        rope = rotary_table(self.config, positions)
        x = self.transformer.wte(idx)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if self.recompute_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, partial(cache.append, i, places, S) if cache else None)
        if cache:
            cache.length += T
        if select is not None:
            x = x.flatten(0, 1).index_select(0, select)  # (N, C)
        x = self.transformer.ln_f(x)
        return self.lm_head(x) if targets is None else summed_cross_entropy(self.lm_head, x, targets)

    def new_cache(self, batch_size: int, room: int) -> "KVCache":
        """An empty cache, for `batch_size` sequences of at most `room` tokens each."""
        weight = self.transformer.wte.weight
        shape = (self.config.n_layer, 2, batch_size, self.config.n_kv_head, room, self.config.head_size)
        return KVCache(torch.zeros(shape, dtype=weight.dtype, device=weight.device))


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, mask: Mask, append: Append | None = None) -> Tensor:
        x = x + self.attn(self.rms_1(x), rope, mask, append)
        return x + self.mlp(self.rms_2(x))  # (B, T, C)


class CausalSelfAttention(nn.Module):
    """Attention over the token itself and those before it, with grouped queries (arXiv 2305.13245)."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, sum(config.qkv_sizes))  # q, k and v in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, rope: Tensor, mask: Mask, append: Append | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, (nh + 2 nkv) hs)
        q, k, v = self.heads(rotate(qkv, rope, self.config.n_head + self.config.n_kv_head))  # but not the values
        if append is not None:
            k, v = append(k, v)  # (B, nkv, S, hs)
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, nh, T, hs), keys and values (B, nkv, T, hs) of qkv (B, T, (nh + 2 nkv) hs)."""
        sizes = self.config.n_head, self.config.n_kv_head, self.config.n_kv_head
        heads = qkv.unflatten(-1, (-1, self.config.head_size))  # (B, T, nh + 2 nkv, hs)
        return tuple(part.transpose(1, 2) for part in heads.split(sizes, dim=2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attention output of the last T of S tokens: queries (B, nh, T, hs), keys and values (B, nkv, S, hs)."""
        if isinstance(mask, Packed):
            return packed_attention(q, k, v, mask)
        if q.size(2) == 1:  # the heads that share a key are like tokens that attend to it
            grouped = q.reshape(len(q), k.size(1), -1, q.size(3))  # (B, nkv, nh / nkv, hs)
            return attention(grouped, k, v, mask, is_causal=False).reshape(q.shape)
        return attention(q, k, v, mask)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = Linear(config.n_embd, config.n_hidden)  # gate
        self.c_fc2 = Linear(config.n_embd, config.n_hidden)  # up
        self.c_proj = Linear(config.n_hidden, config.n_embd)  # down

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(SwiGLU.apply(self.c_fc1(x), self.c_fc2(x)))  # (B, T, C)


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (arXiv 1910.07467), computed in float32 and returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):  # which would return float32, to be cast back and forth
            return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of all layers: preallocated and filled in place.

    `length` is how many tokens it holds. If that is a tensor (), it never leaves the device, and all the room is
    attended to, under a mask: a step then has the same shapes at every length, so that it is compiled only once.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.layers = [(k, v) for k, v in buffer]  # (B, nkv, room, hs) each
        self.room = buffer.size(-2)
        self.length: int | Tensor = 0

    def append(self, layer: int, places: Tensor, S: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, nkv, T, hs) at places (T,) of a layer; returns its first S (B, nkv, S, hs)."""
        keys, values = self.layers[layer]
        return keys.index_copy_(2, places, k)[:, :, :S], values.index_copy_(2, places, v)[:, :, :S]


def attention_mask(places: Tensor, S: int, n_pad: Tensor | None) -> Tensor:
    """Which of S tokens those at `places` (T,) attend to, (T, S) or (B, 1, T, S): all up to their own but padding."""
    others = torch.arange(S, device=places.device)  # (S,)
    mask = others <= places[:, None]  # (T, S)
    if n_pad is not None:
        is_text = others >= n_pad[:, None]  # (B, S)
        itself = others == places[:, None]  # for padding, since softmax over an empty row is NaN
        mask = mask & is_text[:, None, None] | itself  # (B, 1, T, S)
    return mask


def rotary_table(config: LLaMAConfig, positions: Tensor) -> Tensor:
    """Cosines and sines (..., T, hs / 2, 2) of the angles by which pairs of channels are rotated (arXiv 2104.09864).

    `positions` (..., T) are those of the tokens.

    Always float32: in bfloat16, 2048 positions would share 641 angles. Computed anew in each forward pass, they cost
    next to nothing and leave no state to cast, move or save.
    """
    exponents = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32) / config.head_size
    freqs = 1.0 / config.rope_base**exponents  # (hs / 2,)
    if config.rope_scaling is not None:
        freqs = stretch_frequencies(freqs, config.rope_scaling)
    angles = positions.float().unsqueeze(-1) * freqs  # (..., T, hs / 2), one for each pair of channels
    return torch.stack((angles.cos(), angles.sin()), -1)  # (..., T, hs / 2, 2)


def stretch_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide slow rotations by `factor`, leave fast ones, blend in between; or, in the linear way, divide all."""
    if not scaling.original_block_size:
        return freqs / scaling.factor
    turns = scaling.original_block_size * freqs / (2 * math.pi)  # within the original length
    keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / scaling.factor
