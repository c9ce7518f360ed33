"""Model folders: `lit-llama.pth` (the weights), `config.json` and the tokenizer.

`config.json` has the fields of LLaMAConfig, as "prompt_style" the chat template that the model was trained with, if any
(in earlier folders, the name of one of ours), and, under "files", fingerprints of the others. Where it does not say,
nothing is compared.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError, check_type, error_context, short
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig
from lit_llama.progress import say
from lit_llama.prompt import stored_template
from lit_llama.quantization import quantize_blocks
from lit_llama.storage import files
from lit_llama.storage.checks import from_fields
from lit_llama.storage.files import CONFIG, is_plain, read_file, read_json, write_file
from lit_llama.storage.integrity import digest, fingerprint

import torch
from torch import Tensor

WEIGHTS = "lit-llama.pth"
DEFAULT_MODEL = Path("checkpoints/lit-llama/7B/lit-llama.pth")
QUICKSTART_MODEL = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct/lit-llama.pth")  # of what compares or measures
MODEL_FILES = (
    r"(lit-llama\.pth|config\.json|generation_config\.json|tokenizer\.model|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json)(\.part)?"
)

FOREIGN = {  # names by which files of others are known
    r"adapter_(config|model)\.(json|safetensors|bin)": "a PEFT adapter: run scripts/import_peft.py --peft_dir {folder}",
    r"lit_model\.pth": "LitGPT's: run litgpt convert_from_litgpt, save its model.pth as pytorch_model.bin beside the "
    "config.json, and run scripts/convert_hf_checkpoint.py",
    r"(model|pytorch_model).*\.(safetensors|bin|index\.json)": "in Hugging Face's format: run "
    "scripts/convert_hf_checkpoint.py --checkpoint_dir {folder}",
    r"consolidated\.\d+\.pth": "in Meta's format: run scripts/convert_meta_checkpoint.py --checkpoint_dir {folder}",
    r".+\.gguf": "a GGUF: run scripts/convert_gguf_checkpoint.py --gguf_path {file}",
}


def save_model_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: LLaMAConfig,
    texts: Mapping[str, bytes | str],
    prompt_style: str | None = None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a model folder, in place of an older one as a whole; `texts` are the tokenizer's files.

    With `tensors`, those of a training run, `state` tells only their shapes and dtypes. The run's folder holds other
    things, so the files are written one by one, the weights last.
    """
    with files.replacing_folder(folder, MODEL_FILES) if tensors is None else nullcontext(folder) as part:
        fields = {**asdict(config), "prompt_style": prompt_style}
        for name, content in texts.items():
            write_file(part / name, content)
        write_file(part / CONFIG, json.dumps(fields, indent=2))
        layout = dict(state if tensors else sorted(state.items()))  # the same, whatever it was converted from
        if config.tie_embeddings:
            layout["lm_head.weight"] = layout["transformer.wte.weight"]  # stored once
        files.write_tensors(part / WEIGHTS, layout, tensors)
        prints = {WEIGHTS: fingerprint(part / WEIGHTS), **{name: digest(part / name) for name in texts}}
        write_file(part / CONFIG, json.dumps({**fields, "files": prints}, indent=2))


def load_model(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", nf4: bool = False
) -> LLaMA:
    """The model of a folder, or of its `lit-llama.pth`, its weights in `dtype` (None: as they are stored).

    The weights are mapped from the file and copied, if at all, one by one: loading takes no second copy of the model.
    With `nf4`, the matrices of the blocks are quantised to 4 bits on their way.
    """
    path = file_in(path)
    if path.is_file():
        say(f"Loading {path} ({path.stat().st_size / 1e9:.1f} GB)")
    state = read_file(path)
    config = read_config(path, state)
    with torch.device("meta"):
        model = LLaMA(config)
    if config.tie_embeddings:
        state.setdefault("lm_head.weight", state.get("transformer.wte.weight"))
    check_state(path, state, model.state_dict())
    files.check_listed(path)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    if dtype is None and len(stored) > 1:
        raise UserError(f"{path} mixes {' and '.join(sorted(stored))}; convert the model again, to one of them")
    quantized = {name for name in state if nf4 and name.startswith("transformer.h.") and state[name].dim() == 2}
    for name in state.keys() - quantized:
        state[name] = state[name].to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if nf4:
        quantize_blocks(model, device, dtype)
        for name in quantized:
            files.page_out(state[name])
    return model


def find_model(path: Path | None, default: Path = DEFAULT_MODEL) -> Path:
    """The weights at `path`, a folder or file; without one, of the default model, or of the last one beside it."""
    if path:
        return file_in(path)
    models = [] if default.exists() else list(default.parents[1].glob(f"[!.]*/{WEIGHTS}"))
    if not models:
        return default
    last = max(models, key=lambda model: model.stat().st_mtime)
    say(f"{default} does not exist; the model is {last}")
    return last


def file_in(path: Path, name: str = WEIGHTS) -> Path:
    """The file that is meant by a path: that of this name if it is a folder."""
    if path.is_dir() and not (path / name).is_file():
        raise UserError(f"{path} has no {name}{suggest_script(path) or '; give the folder that has it, or a file'}")
    if path.is_file() and (suggestion := suggest_script(path)):
        raise UserError(f"{path} is not a file of ours{suggestion}")
    return path / name if path.is_dir() else path


def suggest_script(path: Path) -> str:
    """The end of a message about a file or folder of another program: what it is, and what takes it."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for pattern, what in FOREIGN.items():
        for file in files:
            if re.fullmatch(pattern, file.name):
                return f"; it is {what.format(folder=file.parent, file=file)}"
    return ""


def read_config(path: Path, state: Mapping[str, Any]) -> LLaMAConfig:
    """The config.json next to the checkpoint, or the LLaMA size that the shapes of its tensors imply."""
    file = path.with_name(CONFIG)
    if file.is_file():
        fields = read_json(file)
        for name in ("files", "prompt_style"):  # see check_listed, own_template
            fields.pop(name, None)
        with error_context(file, "get it again"):
            return from_fields(LLaMAConfig, fields)
    wte, n_layer = state.get("transformer.wte.weight"), sum(name.endswith("attn.c_attn.weight") for name in state)
    for config in CONFIGS.values():
        if n_layer == config.n_layer and getattr(wte, "shape", None) == (config.vocab_size, config.n_embd):
            return config
    raise UserError(f"{path} has no config.json next to it, and its tensors fit no known LLaMA{suggest_flag(state)}")


def own_template(path: Path) -> str | None:
    """The template that the model of a checkpoint was trained with, as the config.json next to it says."""
    file = path.with_name(CONFIG)
    template = read_json(file).get("prompt_style") if file.is_file() else None
    with error_context(file, "convert the model again"):
        check_type("prompt_style", template, str | None)
        return None if template is None else stored_template(template)


def check_state(path: Path, state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless `state` has exactly the names and shapes of `expected`, and floating-point numbers."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [name for name in expected if name in state and getattr(state[name], "shape", None) != expected[name].shape]
    flag = suggest_flag(state)
    hint = "; was it trained on another model?" if flag and flag == suggest_flag(expected) else flag
    for names, what in ((missing, "lacks"), (unexpected, "has unexpected"), (wrong, "has a different shape for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} does not fit the model: it {what} {short(names[0])}{more}{hint}")
    for name, tensor in state.items():
        if not is_plain(tensor) or not tensor.is_floating_point() or tensor.itemsize == 1:
            raise UserError(f"{path} holds {name} as {short(tensor)}, expected float32, bfloat16 or float16")


def identity(path: Path) -> dict[str, str]:
    """How a run, and what it writes, remembers its base model: its file, and some of its numbers in bfloat16."""
    values = hashlib.sha256()
    for name, tensor in sorted(read_file(path, check_tensors=False).items()):
        if is_plain(tensor):
            values.update(name.encode() + tensor.flatten()[:64].bfloat16().view(torch.uint8).numpy().tobytes())
    return {"base": fingerprint(path), "base_values": values.hexdigest()[:16], "base_path": str(path)}


def check_base(path: Path, trained_on: Mapping[str, Any], given: Mapping[str, Any], remedy: str) -> None:
    """Raise a UserError if what `path` holds was trained on another base model than the one that is given.

    `trained_on` and `given` hold, among other things, what `identity` says of each; of imported files it is unknown.
    """
    theirs, ours = trained_on.get("base"), given.get("base")
    if theirs and ours and theirs != ours:
        is_copy = trained_on.get("base_values") == given.get("base_values")
        what = "which is the same model in another dtype or order" if is_copy else "which is another model"
        base = f"{trained_on.get('base_path')} (fingerprint {theirs}), not on {given['base_path']} ({ours})"
        raise UserError(f"{path} was trained on {base}, {what}; {remedy}")


def check_complete(path: Path, state: Mapping[str, Any], config: LLaMAConfig) -> None:
    """Raise a UserError unless `state`, made from `path`, has every weight of a model of this config and no other."""
    with torch.device("meta"):
        check_state(path, state, LLaMA(config).state_dict())


def suggest_flag(content: Mapping[str, Any]) -> str:
    """The end of a message about a file that is one of LoRA or adapter weights: which flag it is for."""
    for kind in ("lora", "adapter"):
        if content.get("kind") == kind or any(f"{kind}_" in name for name in content):
            return f"; it is a file of {kind} weights, for --{kind}_path"
    return ""
