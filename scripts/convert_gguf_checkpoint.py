"""Convert a GGUF file of the llama architecture (quantised ones are dequantised) into a model folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor
from tqdm import tqdm

from lit_llama.checkpoint import check_complete, save_model_folder
from lit_llama.cli import UserError, run
from lit_llama.model import LLaMAConfig

TENSOR_NAMES = {  # llama.cpp stores q and k rows in Meta's order, which is ours
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

LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {  # llama.cpp's names for how text is cut before the byte pairs are merged
    "default": [BYTES],
    "gpt-2": [BYTES],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), BYTES],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def main(gguf_path: Path, out_dir: Path) -> None:
    """Convert one GGUF file.

    Args:
        gguf_path: A .gguf file with `general.architecture = llama`.
        out_dir: The model folder to write: lit-llama.pth, config.json and the tokenizer.
    """
    reader = read_gguf(gguf_path)
    config = read_config(reader)
    state = read_weights(reader, config)
    check_complete(gguf_path, state, config)
    save_model_folder(out_dir, state, config, read_tokenizer(reader))
    print(f"Saved {out_dir}", file=sys.stderr)


def read_gguf(path: Path) -> GGUFReader:
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); download it again") from None
    architecture = get(reader, "general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} holds a model of architecture {architecture!r}, expected 'llama'")
    return reader


def get(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_config(reader: GGUFReader) -> LLaMAConfig:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError("this GGUF has no weights, only a vocabulary")
    if "rope_freqs.weight" in tensors:
        raise UserError("this GGUF stores its rotary scaling as a tensor (Llama 3.1 and later), which is not supported")
    return LLaMAConfig(
        block_size=get(reader, "llama.context_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),  # may be padded beyond the tokenizer's
        n_layer=get(reader, "llama.block_count"),
        n_head=get(reader, "llama.attention.head_count"),
        n_embd=get(reader, "llama.embedding_length"),
        n_kv_head=get(reader, "llama.attention.head_count_kv"),
        n_hidden=get(reader, "llama.feed_forward_length"),
        norm_eps=float(f"{get(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # float32 on disk
        rope_base=get(reader, "llama.rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in tensors,
    )


def read_weights(reader: GGUFReader, config: LLaMAConfig) -> dict[str, Tensor]:
    """The state dict of LLaMA, dequantised to float32."""
    state: dict[str, Tensor] = {}
    qkv: dict[str, list[Tensor]] = {}
    for tensor in tqdm(reader.tensors, desc="Dequantising", unit="tensor"):
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        *block, name = tensor.name.removesuffix(".weight").split(".")  # blk, 0, attn_q
        prefix = f"transformer.h.{block[1]}." if block else ""
        if name in ("attn_q", "attn_k", "attn_v"):
            parts = qkv.setdefault(prefix, [torch.empty(0)] * 3)
            parts["qkv".index(name[-1])] = weight
            if all(len(part) for part in parts):
                state[f"{prefix}attn.c_attn.weight"] = torch.cat(qkv.pop(prefix))  # ((nh + 2 nkv) hs, C)
        elif name in TENSOR_NAMES:
            state[prefix + TENSOR_NAMES[name]] = weight
        else:
            raise UserError(f"unexpected tensor {tensor.name} in a llama GGUF")
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def read_tokenizer(reader: GGUFReader) -> dict[str, str]:
    """The byte-level BPE tokenizer as the Hugging Face files tokenizer.json and tokenizer_config.json."""
    kind, pre = get(reader, "tokenizer.ggml.model"), get(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"the GGUF's tokenizer ({kind}, {pre}) is not supported; byte-level BPE is: {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = get(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get(reader, "tokenizer.ggml.merges")]
    tokenizer = HFTokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = get(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    if get(reader, "tokenizer.ggml.add_bos_token", False):
        bos = tokens[get(reader, "tokenizer.ggml.bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    eos = tokens[get(reader, "tokenizer.ggml.eos_token_id")]
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps({"eos_token": eos}, indent=2)}


if __name__ == "__main__":
    run(main)
