"""Reading and writing checkpoints: model folders, files of finetuned weights, training states.

A model folder holds `lit-llama.pth` (the weights), `config.json` (the fields of LLaMAConfig) and the tokenizer.
A file of finetuned weights describes itself: {"kind", the method's own config, "base", "prompt_style",
"hyperparameters", "state_dict"}.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig


def default_precision() -> str:
    """What to compute in, in Fabric's words: bf16-mixed on a GPU that has bfloat16, else 32-true."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bfloat16 else "32-true"


def storage_dtype(precision: str) -> torch.dtype:
    """What frozen weights are stored in: bfloat16 or float16 where all or most is computed in it, else float32."""
    dtypes = {
        "32-true": torch.float32,
        "bf16-mixed": torch.bfloat16,
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
    }
    if precision not in dtypes:
        raise UserError(f"--precision is one of {', '.join(dtypes)}, not {precision!r}")
    return dtypes[precision]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the place of `path`, which at any moment is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # safetensors would make the file unreadable for others
        yield part
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror}") from None
    except (RuntimeError, SafetensorError):  # how torch.save and safetensors say so
        raise UserError(f"could not write {path}: the disk is full") from None
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str | Mapping[str, Any]) -> None:
    """Write bytes, text or (by torch.save) a mapping, whole or not at all."""
    with replacing(path) as part, open(part, "wb") as file:
        if isinstance(content, Mapping):
            torch.save(content, file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def read_file(path: Path) -> dict[str, Any]:
    """The mapping that torch.save wrote to `path`. Tensors stay on the disk until they are used."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than weights (code, perhaps) and was not opened; get it elsewhere"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError):
        raise UserError(
            f"{path} is truncated, or no checkpoint of PyTorch 1.6 or later; copy or convert it again"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a checkpoint with named tensors")
    return content


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a .safetensors file, one by one."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); get it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that comes with a checkpoint."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is truncated or no JSON ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}, expected named fields; download it again")
    return fields


def check_apart(source: Path, out_dir: Path) -> None:
    """Raise a UserError if what is written to `out_dir` would replace files of `source`, both folders."""
    if source.resolve() == out_dir.resolve():
        raise UserError(f"{out_dir} is the folder that is read; give another --out_dir")


def save_model_folder(
    folder: Path, state: Mapping[str, Tensor], config: LLaMAConfig, files: Mapping[str, bytes | str]
) -> None:
    """Write a model folder; `files` are the tokenizer's. The weights come first: a full disk shows there."""
    if config.tie_embeddings:  # one tensor under two names is stored once
        state = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    write_file(folder / "lit-llama.pth", state)
    for name, text in {**files, "config.json": json.dumps(asdict(config), indent=2)}.items():
        write_file(folder / name, text)


def load_model(path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LLaMA:
    """The model of a checkpoint `lit-llama.pth`, its weights in `dtype` (None: as they are stored).

    The weights are mapped from the file and copied, if at all, one by one: loading takes no second copy of the model.
    """
    state = read_file(path)
    config = read_config(path, state)
    with torch.device("meta"):
        model = LLaMA(config)
    if config.tie_embeddings:
        state.setdefault("lm_head.weight", state.get("transformer.wte.weight"))
    check_state(path, state, model.state_dict())
    for name in state:
        state[name] = state[name].to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def read_config(path: Path, state: Mapping[str, Any]) -> LLaMAConfig:
    """The config.json beside the checkpoint, or the LLaMA size that the shapes of its tensors give away."""
    file = path.with_name("config.json")
    if file.is_file():
        try:
            return LLaMAConfig(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} does not describe a LLaMA ({error})") from None
    wte, n_layer = state.get("transformer.wte.weight"), sum(name.endswith("attn.c_attn.weight") for name in state)
    for config in CONFIGS.values():
        if n_layer == config.n_layer and wte is not None and wte.shape == (config.vocab_size, config.n_embd):
            return config
    raise UserError(f"{path} has no config.json beside it, and its tensors are of no known LLaMA size{hint(state)}")


def check_state(path: Path, state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless `state` has exactly the names and shapes of `expected`."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [name for name in expected if name in state and getattr(state[name], "shape", None) != expected[name].shape]
    for names, what in ((missing, "lacks"), (unexpected, "has, unexpectedly,"), (wrong, "has in another shape")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} does not fit the model: it {what} {names[0]}{more}{hint(state)}")


def check_complete(path: Path, state: Mapping[str, Any], config: LLaMAConfig) -> None:
    """Raise a UserError unless `state`, made from `path`, has every weight of a model of this config and no other."""
    with torch.device("meta"):
        check_state(path, state, LLaMA(config).state_dict())


def copy_state(path: Path, state: Mapping[str, Any], target: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `target` with those of `state`, read from `path`; they must agree in names and shapes."""
    check_state(path, state, target)
    for name, tensor in target.items():
        tensor.copy_(state[name])


def hint(state: Mapping[str, Any]) -> str:
    """What a file is that was given in the place of another, where that can be told."""
    kind = state.get("kind") or next((k for k in ("lora", "adapter") if any(f"{k}_" in name for name in state)), None)
    return f"; it is a file of {kind} weights, for --{kind}_path" if kind else ""


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise a UserError if any weight is inf or nan, before a good file is overwritten with them."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"training has diverged: {name} is not finite; what was saved before is good")


def save_finetuned(path: Path, kind: str, method: Any, model: LLaMA, state: Mapping[str, Tensor], **extra: Any) -> None:
    """Write finetuned weights with what is needed to use them: the method's config, if any, and the base model's."""
    check_finite(state)
    about = {"kind": kind, kind: asdict(method) if method else {}, "base": asdict(model.config)}
    write_file(path, {**about, **extra, "state_dict": dict(state)})


def load_finetuned(
    path: Path, kind: str, base: LLaMAConfig, describe: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> dict[str, Any]:
    """What `save_finetuned` wrote, checked to be of this kind and for this base model.

    The archived Lit-LLaMA wrote the weights alone, for prompts in the Alpaca style; `describe` finds the fields of the
    method's config for them.
    """
    content = read_file(path)
    if "kind" not in content and any(f"{kind}_" in name for name in content):
        about = {"kind": kind, kind: describe(content), "base": asdict(base), "prompt_style": "alpaca"}
        content = {**about, "state_dict": content}
    if content.get("kind") != kind:
        raise UserError(f"{path} is no file that finetune_{kind}.py wrote{hint(content)}")
    ours, theirs = asdict(base), asdict(LLaMAConfig(**content["base"]))
    different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise UserError(f"{path} was made for another base model: one with {'; '.join(different)}")
    return content
