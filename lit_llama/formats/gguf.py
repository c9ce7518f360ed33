"""GGUF, the format of llama.cpp: its names for our weights and fields, for both directions.

llama.cpp orders the rows of queries and keys as Meta does, which is our order, too.
"""

from lit_llama.model import LLaMAConfig, stretch_frequencies

import torch
from torch import Tensor

TENSOR_NAMES = {
    "token_embd": "transformer.wte.weight",
    "output_norm": "transformer.ln_f.scale",
    "output": "lm_head.weight",
    "attn_norm": "rms_1.scale",
    "attn_output": "attn.c_proj.weight",
    "ffn_norm": "rms_2.scale",
    "ffn_gate": "mlp.c_fc1.weight",
    "ffn_up": "mlp.c_fc2.weight",
    "ffn_down": "mlp.c_proj.weight",
}
FIELDS = {  # of LLaMAConfig
    "block_size": "llama.context_length",
    "n_layer": "llama.block_count",
    "n_head": "llama.attention.head_count",
    "n_embd": "llama.embedding_length",
    "n_kv_head": "llama.attention.head_count_kv",
    "n_hidden": "llama.feed_forward_length",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_base": "llama.rope.freq_base",
}
ROPE_FREQS = "rope_freqs.weight"
ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]  # the ends of an answer
NORMAL, UNUSED, BYTE = 1, 5, 6  # more of SentencePiece's types, which GGUF has taken over for all tokenizers
CHAT_TEMPLATE = "tokenizer.chat_template"


def rope_divisors(config: LLaMAConfig) -> Tensor:
    """By what the scaling of Llama 3.1 divides each rotary frequency, which is all that llama.cpp keeps of it."""
    freqs = config.rope_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)  # (hs / 2,)
    return freqs / stretch_frequencies(freqs, config.rope_scaling) if config.rope_scaling else torch.ones_like(freqs)
