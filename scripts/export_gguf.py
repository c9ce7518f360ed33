"""Export a model folder, or a LoRA file alone, to GGUF for llama.cpp, with a Modelfile for Ollama."""

import os
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.formats.gguf import CHAT_TEMPLATE, lora_to_gguf, model_metadata, to_gguf, tokenizer_metadata
from lit_llama.formats.tokenizers import TEMPLATE_NAME, portable
from lit_llama.model_folder import find_model, load_model, own_template, read_config
from lit_llama.progress import progress
from lit_llama.prompt import find_template, stop_ids
from lit_llama.storage.files import check_apart, check_finite, read_file, replacing_folder, write_file
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import numpy as np
from modelfile import modelfile
from torch import Tensor

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape, quantize
except ImportError:
    sys.exit("error: GGUF files need one more library; run: pip install -e '.[gguf]'")

FILES = r"{}-(F32|F16|Q8_0)\.gguf|Modelfile|chat_template\.jinja"
FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
Q8_0_BLOCK = 32  # numbers that share a scale


class Content(NamedTuple):
    """What a GGUF holds, and the template that goes with it."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    template: str | None


def main(
    out_dir: Path,
    checkpoint_path: Path | None = None,
    tokenizer_path: Path | None = None,
    lora_path: Path | None = None,
    lora_alpha: float | None = None,
    base_model: str | None = None,
    dtype: Literal["F32", "F16", "Q8_0"] = "F16",
    prompt_style: str | None = None,
    force: bool = False,
) -> None:
    """Write model-F16.gguf or, of a LoRA file, lora-F16.gguf and chat_template.jinja; and a Modelfile.

    Args:
        out_dir: The folder to write.
        checkpoint_path: The model: a base one, one that finetune_full.py wrote, or one that merge_lora.py wrote.
            Default: checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        lora_path: A file that finetune_lora.py wrote, to export it alone; the checkpoint is then that of its base.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        base_model: With a LoRA file, its base for the Modelfile: a GGUF, or a name that Ollama knows.
        dtype: Type of the matrices. Q8_0 is 8 bits with a scale for each 32 numbers; rows that do not divide by 32
            are F16.
        prompt_style: The chat template: own (that of the LoRA file or the model: the default), alpaca, chatml or
            another style of lit_llama/prompt.py, or a file that holds one.
        force: Use the LoRA file even if it was trained on a different base model of the same shape.
    """
    checkpoint_path = find_model(checkpoint_path)
    if base_model and lora_path is None:
        raise UserError("--base_model goes with --lora_path: a whole model has no other base")
    check_apart(checkpoint_path.parent, out_dir)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    if lora_path is None:
        content = read_model(checkpoint_path, tokenizer, prompt_style)
        model, adapter = f"./model-{dtype}.gguf", None
    elif base_model is None:
        raise UserError("a Modelfile names the base of a LoRA; add --base_model, a GGUF or a name that Ollama knows")
    else:
        content = read_lora(lora_path, checkpoint_path, lora_alpha, force)
        content = content._replace(template=find_template(prompt_style, content.template))
        model, adapter = base_model, f"./lora-{dtype}.gguf"
        if (path := Path(base_model).expanduser()).is_file():  # a Modelfile names it from its own folder on
            model = os.path.join(".", os.path.relpath(path.resolve(), out_dir.resolve()))
    ollama = modelfile(model, adapter, content.template, tokenizer)
    with replacing_folder(out_dir, FILES.format("lora" if adapter else "model")) as part:
        write_gguf(part / (adapter or model), content, dtype)
        write_file(part / "Modelfile", ollama)
        if adapter and content.template:
            write_file(part / TEMPLATE_NAME, portable(content.template, tokenizer))
    print(f"Saved {out_dir}", file=sys.stderr)


def read_model(path: Path, tokenizer: Tokenizer, style: str | None) -> Content:
    own, model = own_template(path), load_model(path)
    template = find_template(style, own) if style or own else None
    tokenizer.check_fits(model.config.vocab_size)
    name = {"general.name": path.absolute().parent.name}
    stops = stop_ids(template, tokenizer) if template else ()
    metadata = name | model_metadata(model.config) | tokenizer_metadata(tokenizer, model.config.vocab_size, stops)
    if template:
        metadata[CHAT_TEMPLATE] = portable(template, tokenizer)
        if not any(name and name in template for name in ("bos_token", tokenizer.names.get("bos_token"))):
            metadata["tokenizer.ggml.add_bos_token"] = False  # llama.cpp would put one before the template
    return Content(metadata, dict(to_gguf(model.state_dict(), model.config)), template)


def read_lora(path: Path, base_path: Path, alpha: float | None, force: bool) -> Content:
    base = read_config(base_path, read_file(base_path))
    lora = read_finetuned(path, "lora", alpha, base_path, force)
    metadata = {"general.name": lora.path.stem, "general.type": "adapter", "adapter.type": "lora"}
    metadata |= {"adapter.lora.alpha": float(lora.config.alpha)}
    return Content(metadata, dict(lora_to_gguf(lora.tensors_for(base), base, lora.config)), lora.prompt_style)


def write_gguf(path: Path, content: Content, dtype: str) -> None:
    """Write one file; memory holds one converted tensor at a time."""
    check_finite(path, content.tensors)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "Q8_0":
        writer.add_quantization_version(2)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in content.metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    types = {name: stored_type(tensor, dtype) for name, tensor in content.tensors.items()}
    for name, tensor in content.tensors.items():
        shape = quant_shape_to_byte_shape(tensor.shape, types[name])
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), int(np.prod(shape)), types[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in progress(content.tensors.items(), "Exporting", "tensor"):
            writer.write_tensor_data(converted(path, name, tensor, types[name]))
    finally:
        writer.close()


def stored_type(tensor: Tensor, dtype: str) -> GGMLQuantizationType:
    """Matrices are stored as asked; vectors, which are small and which llama.cpp wants exact, in float32."""
    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if dtype == "Q8_0" and tensor.size(-1) % Q8_0_BLOCK else dtype]


def converted(path: Path, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers of a tensor as they are stored."""
    if kind == GGMLQuantizationType.F16 and tensor.abs().max() > np.finfo(np.float16).max:
        raise UserError(f"{path} was not written: {name} has numbers beyond 65504; use --dtype F32")
    return quantize(tensor.detach().float().contiguous().numpy(), kind)


if __name__ == "__main__":
    run(main)
