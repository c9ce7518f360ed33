"""Convert a Hugging Face model folder (config.json and .safetensors or .bin shards) into a model folder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lit_llama.cli import run
from lit_llama.errors import UserError, error_context, short
from lit_llama.formats.hf_tokenizer import read_chat_template
from lit_llama.formats.huggingface import config_from_hf, from_hf
from lit_llama.model_folder import check_complete, save_model_folder
from lit_llama.progress import progress
from lit_llama.prompt import tried
from lit_llama.storage.files import check_apart, read_file, read_json, read_safetensors
from lit_llama.tokenizer import FILE_NAMES, find_tokenizer

import torch
from torch import Tensor


def main(checkpoint_dir: Path, out_dir: Path, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> None:
    """Convert one model of the llama architecture.

    Args:
        checkpoint_dir: The folder that was downloaded.
        out_dir: The model folder to write: lit-llama.pth, config.json (with the chat template) and the tokenizer.
        dtype: The type to store the weights in. By default as they are.
    """
    check_apart(checkpoint_dir, out_dir)
    fields = read_json(checkpoint_dir / "config.json")
    name = dtype or fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{checkpoint_dir}/config.json has weights of {short(name)}; choose their type by --dtype")
    try:
        with error_context(checkpoint_dir / "config.json"):
            config = config_from_hf(fields)
        state = from_hf(read_shards(checkpoint_dir), config, getattr(torch, name))
    except UserError as error:
        raise UserError(f"could not convert {checkpoint_dir}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{checkpoint_dir}/config.json does not describe a LLaMA ({error!r}); get it again") from None
    check_complete(checkpoint_dir, state, config)
    files = {}
    if any((checkpoint_dir / name).is_file() for name in FILE_NAMES):
        files = find_tokenizer(checkpoint_dir, checkpoint_dir).files()
    else:
        print(f"No tokenizer in {checkpoint_dir}: put one next to the converted weights", file=sys.stderr)
    save_model_folder(out_dir, state, config, files, tried(read_chat_template(checkpoint_dir)))
    print(f"Saved {out_dir}", file=sys.stderr)


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of all shards, one shard at a time."""
    shards = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise UserError("there are no .safetensors or pytorch_model*.bin files; download them")
    for index in folder.glob(f"*{shards[0].suffix}.index.json"):  # files that it does not name are of another download
        names = sorted(set(read_json(index)["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index} names a file that is not in its folder, {short(outside[0])}; get it again")
        shards = [folder / name for name in names]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is missing; download it")
    for shard in progress(shards, "Converting", "shard"):
        yield from read_file(shard).items() if shard.suffix == ".bin" else read_safetensors(shard)


if __name__ == "__main__":
    run(main)
