"""Export a model folder to Hugging Face's format, tokenizer included, for `AutoModelForCausalLM.from_pretrained`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.model_folder import find_model, load_model, own_template
from lit_llama.progress import progress
from lit_llama.prompt import STYLES, find_template, names_of, stop_ids
from lit_llama.storage.files import (
    check_apart,
    check_finite,
    read_safetensors,
    replacing,
    replacing_folder,
    write_file,
)
from lit_llama.tokenizer import CONFIG_NAME, FILE_NAMES, Tokenizer, find_tokenizer

import torch
from jsonargparse.typing import PositiveFloat
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from tokenizer_files import TOKENIZER_FILES, default, splits
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

HF_FILES = (
    r"config\.json|generation_config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
    rf"|{TOKENIZER_FILES}"
)
LEFT_OUT = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map", "backend")
SPACE = "\u2581"  # how SentencePiece writes it


def main(
    out_dir: Path,
    checkpoint_path: Path | None = None,
    tokenizer_path: Path | None = None,
    prompt_style: str | None = None,
    max_shard_gb: PositiveFloat = 5.0,
) -> None:
    """Write config.json, generation_config.json, the weights as .safetensors, and the tokenizer with its chat template.

    Args:
        out_dir: The folder to write.
        checkpoint_path: The model: a base one, one that finetune_full.py wrote, or one that merge_lora.py wrote.
            Default: checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The chat template: own (the model's, the default), alpaca, chatml or another style of
            lit_llama/prompt.py, or a file that holds one.
        max_shard_gb: The largest file of weights, in GB.
    """
    checkpoint_path = find_model(checkpoint_path)
    check_apart(checkpoint_path.parent, out_dir)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    own = own_template(checkpoint_path)
    template = find_template(prompt_style, own) if prompt_style or own else None
    model = load_model(checkpoint_path)
    tokenizer.check_fits(model.config.vocab_size)
    state = to_hf(model.state_dict(), model.config)
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    fields = hf_config(model.config, model.lm_head.weight.dtype)
    stops = stop_ids(template, tokenizer) if template else tokenizer.end_ids
    eos = [tokenizer.eos_id, *sorted(stops - {tokenizer.eos_id})] if len(stops) > 1 else tokenizer.eos_id
    ends = {"bos_token_id": tokenizer.controls.get(tokenizer.names.get("bos_token", "")), "eos_token_id": eos}
    with replacing_folder(out_dir, HF_FILES) as part:
        for name, content in hf_tokenizer(tokenizer, template).items():
            write_file(part / name, content)
        write_file(part / "generation_config.json", json.dumps(ends, indent=2))
        write_file(part / "config.json", json.dumps(fields | ends, indent=2))
        save_weights(state, part, int(max_shard_gb * 1e9))
    print(f"Saved {out_dir}", file=sys.stderr)


def save_weights(state: dict[str, Tensor], out_dir: Path, max_bytes: int) -> None:
    """Write model.safetensors, or several of at most `max_bytes` with an index. Memory holds one at a time."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for i, shard in enumerate(progress(shards, "Exporting", "shard"), 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(out_dir / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        write_file(out_dir / "model.safetensors.index.json", json.dumps(index, indent=2))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write finite tensors as transformers and PEFT read them, whole or not at all; they are read back first."""
    check_finite(path, tensors)
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
        if not all(torch.equal(tensor, tensors[name]) for name, tensor in read_safetensors(part)):
            raise UserError(f"{path} was not written: what is read back is not the same; try again")


def from_sentencepiece(ours: Tokenizer) -> dict[str, str]:
    """A SentencePiece `tokenizer.model` of BPE as the Hugging Face files that give the same ids.

    SentencePiece merges the pair of neighbours whose union has the highest score: every way to split a piece into two
    others is a merge.
    """
    sp = SentencePieceProcessor(model_proto=ours.files()["tokenizer.model"])
    ids = range(sp.vocab_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    special = [pieces[i] for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    texts = {pieces[i] for i in ids if not sp.is_byte(i)} - {*special}
    merges = []
    for piece in sorted(texts, key=lambda piece: (-sp.get_score(sp.piece_to_id(piece)), piece)):
        merges += splits(piece, texts)
    vocabulary, unk = {piece: i for i, piece in enumerate(pieces)}, pieces[sp.unk_id()]
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = sp.encode_as_pieces("a")[0].startswith(SPACE)  # whether a text begins as if a space came before it
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape] if prefix else [escape])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if ours.bos_id is not None:
        bos = pieces[ours.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ours.bos_id)])
    names = {"unk_token": unk, **ours.names}
    return {"tokenizer.json": tokenizer.to_str(), CONFIG_NAME: json.dumps(names, indent=2)}


def hf_tokenizer(tokenizer: Tokenizer, template: str | None) -> dict[str, bytes | str]:
    """A tokenizer.json and a tokenizer_config.json, which say all that the tokenizer's own files do.

    The class is the one that reads a tokenizer.json as it is, in transformers 4 and 5: others build it anew from its
    vocabulary. In 4, it would also make token_type_ids, with which a LLaMA does not generate. The chat template that
    the tokenizer has stays, be it one of several, if it is this one or if there is no other.
    """
    files: dict[str, bytes | str] = dict(tokenizer.files())
    if "tokenizer.json" not in files:
        files |= from_sentencepiece(tokenizer)
    fields = {name: value for name, value in json.loads(files.get(CONFIG_NAME, "{}")).items() if name not in LEFT_OUT}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    fields |= tokenizer.names
    if template and default(fields.get("chat_template")) != template:
        fields["chat_template"] = portable(template, tokenizer)
    kept = {name: files[name] for name in FILE_NAMES if name in files}
    return {**kept, CONFIG_NAME: json.dumps(fields, indent=2)}


def portable(template: str, tokenizer: Tokenizer) -> str:
    """A template as other programs are to have it, which may have another idea of the bos, if the model has none."""
    has_bos = names_of(template, tokenizer)["bos_token"]
    return template if has_bos or template not in STYLES.values() else template.replace("{{ bos_token }}", "")


if __name__ == "__main__":
    run(main)
