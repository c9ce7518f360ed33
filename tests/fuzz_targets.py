"""What is damaged: tiny files of every kind that the project reads, and how each is read."""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.data.batches import Dataset, matching_tokenizer
from lit_llama.data.preparation import Encoder, prepare
from lit_llama.data.records import Fields, conversation
from lit_llama.data.sources import read_rows
from lit_llama.finetuned import Kind, describe, read_finetuned, save_finetuned
from lit_llama.generation import Sampling, generate, read_prompts
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLaMA
from lit_llama.model_folder import identity, load_model, save_model_folder
from lit_llama.tokenizer import Tokenizer
from lit_llama.training.log import TrainingLog
from lit_llama.training.optimizer import AdamW
from lit_llama.training.state import TrainingState

import convert_gguf_checkpoint
import convert_hf_checkpoint
import convert_meta_checkpoint
import export_hf
import export_peft
import import_peft
import merge_lora
import torch
from builders import RECORDS, TINY, prepare_records, random_model, randomize
from builders_gguf import bpe_metadata, write_gguf
from builders_tokenizers import train_byte_tokenizer, train_sentencepiece
from convert_hf_checkpoint import from_tiktoken
from lightning import Fabric
from peft import PeftModel
from test_convert_meta import VARIANTS, write_folder
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BASE = replace(TINY, n_layer=2, n_embd=16, n_hidden=16, n_head=2, n_kv_head=1)
LORA, ADAPTER = LoRAConfig(2, 4, 0.0), AdapterConfig(3, 0)
FABRIC = Fabric(accelerator="cpu", devices=1)


@dataclass(frozen=True)
class Target:
    """A file of a world (a folder), and what is read from it; `is_sealed` if another file tells a changed content.

    `is_right` asks the library whose format it is whether what was read of other content is what it says; an exception
    if the library does not take it.
    """

    name: str
    world: str
    file: str
    read: Callable[[Path], Any]
    is_sealed: bool = False
    is_right: Callable[[Path], bool] | None = None


def answer(model: LLaMA, folder: Path) -> list[Any]:
    """A model's description, weights and first tokens."""
    tokenizer = Tokenizer(folder / "tokenizer.json")
    tokenizer.check_fits(model.config.vocab_size)
    ids = tokenizer.encode("Count to 3")
    return [repr(model.config), dict(model.state_dict()), [*generate(model.eval(), ids, Sampling(3, temperature=0))]]


def read_model(folder: Path) -> Any:
    return answer(load_model(folder / "lit-llama.pth"), folder)


def read_onto_base(path: Path, kind: Kind, folder: Path) -> Any:
    model, file = load_model(folder / "lit-llama.pth"), read_finetuned(path, kind, None, folder / "lit-llama.pth")
    file.add_to(model)
    return [file.prompt_style, answer(model, folder)]


def read_lora(folder: Path) -> Any:
    return read_onto_base(folder / "lora.pth", "lora", folder)


def read_adapter(folder: Path) -> Any:
    return read_onto_base(folder / "adapter.pth", "adapter", folder)


def merge(folder: Path) -> Any:
    merge_lora.main(folder / "merged", folder / "lora.pth", folder / "lit-llama.pth")
    return read_model(folder / "merged")


def export(folder: Path) -> Any:
    export_peft.main(folder / "peft", "a model", folder / "lora.pth", folder / "lit-llama.pth")
    import_peft.main(folder / "peft", folder / "imported.pth", folder / "lit-llama.pth")
    return (folder / "peft" / "adapter_model.safetensors").read_bytes()


def run_of(folder: Path, kind: str, resume: bool) -> tuple[TrainingState, dict[str, Tensor], Optimizer]:
    """A run as a finetune script begins it: its state, its weights and an optimizer that has taken no step."""
    state = TrainingState(FABRIC, folder / kind, [], identity(folder / "lit-llama.pth"), resume)
    model = load_model(folder / "lit-llama.pth")
    if kind == "full":
        return state, model.state_dict(), AdamW(model.parameters(), lr=0.1)
    add_lora(model, LORA)
    weights = lora_state_dict(model)
    return state, weights, torch.optim.AdamW([p for name, p in model.named_parameters() if name in weights], lr=0.1)


def resume(kind: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        state, weights, optimizer = run_of(folder, kind, resume=True)
        step = state.restore(weights, optimizer)
        TrainingLog(FABRIC, folder / kind, 9, step, 1)
        return [step, weights, optimizer.state_dict()]

    return read


def read_data(folder: Path) -> Any:
    splits = [Dataset(folder / "data", split, 128) for split in ("train", "validation")]
    for split in splits:
        matching_tokenizer(split, LLaMA(BASE), folder / "lit-llama.pth", None)
    batches = [split.batch(range(len(split))) for split in splits]
    return [[split.meta for split in splits], [[*batch] for batch in batches]]


def read_tokenizer(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        tokenizer = Tokenizer(folder / name)
        ids = tokenizer.encode("Count to 3", eos=True)
        return [ids, tokenizer.decode(ids), tokenizer.vocab_size, tokenizer.bos_id]

    return read


def convert(script: Any, source: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        script.main(folder / source, folder / "out")
        return load_model(folder / "out" / "lit-llama.pth").state_dict()

    return read


def read_peft(folder: Path) -> Any:
    import_peft.main(folder / "peft", folder / "imported.pth", folder / "lit-llama.pth")
    file = read_finetuned(folder / "imported.pth", "lora")
    file.add_to(load_model(folder / "lit-llama.pth"))
    return file.prompt_style


def read_own(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        encoder = Encoder(Tokenizer(folder / "tokenizer.json"), "plain")
        prepare(folder / "prepared", {"train": folder / name}, encoder)
        return [conversation(row, Fields()) for _, row in read_rows(folder / name)]

    return read


IDS = torch.arange(24)[None]  # (1, T)


@torch.inference_mode()
def as_transformers(folder: Path) -> bool:
    """Whether a converted model gives the logits of transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ours = load_model(folder / "out" / "lit-llama.pth", torch.float32)
    return torch.allclose(ours(IDS), theirs(IDS).logits, atol=1e-4)


@torch.inference_mode()
def as_peft(folder: Path) -> bool:
    """Whether an imported LoRA file gives the logits of PEFT."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "hf"), folder / "peft")
    ours = load_model(folder / "lit-llama.pth").eval()
    read_finetuned(folder / "imported.pth", "lora").add_to(ours)
    return torch.allclose(ours(IDS), theirs.eval()(IDS).logits, atol=1e-4)


def as_tokenizers(folder: Path) -> bool:
    """Whether a tokenizer gives the ids of transformers, for text that spells none of its control tokens."""
    ours, theirs = (
        Tokenizer(folder / "hf" / "plain.json"),
        PreTrainedTokenizerFast(tokenizer_file=f"{folder}/hf/plain.json"),
    )
    texts = "Count to 3", "  a task\n", "below is 🙂 an <x>"
    return all(ours.encode(t, bos=False) == theirs(t, add_special_tokens=False)["input_ids"] for t in texts)


def as_json(name: str) -> Callable[[Path], bool]:
    """Whether records say what their fields say, by a second reading of a few lines."""

    def is_right(folder: Path) -> bool:
        text = (folder / name).read_text("utf-8-sig")
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        said = [[row["instruction"], row.get("input") or "", row["output"]] for row in rows]
        read = [conversation(row, Fields()) for _, row in read_rows(folder / name)]
        return said == [[question.content, question.input, answer.content] for question, answer in read]

    return is_right


def make_worlds(worlds: Path) -> None:
    """Write all files, whole."""
    model_world(worlds / "ours")
    foreign = worlds / "foreign"
    shutil.copytree(worlds / "ours", foreign)
    export_hf.main(foreign / "hf", foreign / "lit-llama.pth", max_shard_gb=1e-5)
    shutil.copytree(foreign / "hf", foreign / "hf-1")
    (foreign / "hf-1" / "model.safetensors.index.json").unlink()  # the shards are found by their names
    next((foreign / "hf-1").glob("model-00002*")).rename(foreign / "hf-1" / "model-2.safetensors")
    export_peft.main(foreign / "peft", "a model", foreign / "lora.pth", foreign / "lit-llama.pth")
    write_folder(foreign / "meta", VARIANTS["Llama 2"], 2)
    write_gguf(foreign / "m.gguf", bpe_metadata(train_byte_tokenizer()))
    (foreign / "sp").mkdir()
    train_sentencepiece(foreign / "sp" / "tokenizer.model")
    shutil.copy(foreign / "hf" / "tokenizer.json", foreign / "hf" / "plain.json")
    (foreign / "records.json").write_text(json.dumps(RECORDS))
    (foreign / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (foreign / "prompts.txt").write_text("Say hello\nCount to 3\n")
    tokens = [base64.b64encode(token).decode() for token in (*(bytes([i]) for i in range(256)), b"th", b"the")]
    (foreign / "ranks.tiktoken").write_text("\n".join(f"{token} {i}" for i, token in enumerate(tokens)))


def model_world(folder: Path) -> None:
    tokenizer = {"tokenizer.json": train_byte_tokenizer().to_str()}
    tokenizer["tokenizer_config.json"] = json.dumps({"eos_token": "<|im_end|>"})
    base = random_model(BASE)
    save_model_folder(folder, base.state_dict(), BASE, tokenizer)
    settings = identity(folder / "lit-llama.pth")
    for method, add, state_dict, name in (
        (LORA, add_lora, lora_state_dict, "lora.pth"), (ADAPTER, add_adapter, adapter_state_dict, "adapter.pth"),
    ):  # fmt: skip
        model = random_model(BASE)
        add(model, method)
        state = {name: tensor.detach() for name, tensor in state_dict(model).items()}
        randomize(state)
        save_finetuned(folder / name, describe(method, BASE, "plain", settings), state)
    splits = {"train": RECORDS[:6], "validation": RECORDS[6:9]}
    prepare_records(folder / "data", splits, folder / "tokenizer.json")
    for kind, method in (("lora-run", LORA), ("full", None)):
        state, weights, optimizer = run_of(folder, kind, resume=False)
        for weight in weights.values():
            weight.data.normal_()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        log = TrainingLog(FABRIC, folder / kind, 9, 0, 1)
        log.validation(0, 3.0)
        log.validation(2, 2.5)
        state.save(2, describe(method, BASE, "plain", settings), weights, optimizer)


TARGETS = [
    Target("config.json", "ours", "config.json", read_model),
    Target("config.json, finetuning", "ours", "config.json", resume("lora-run")),
    Target("lit-llama.pth", "ours", "lit-llama.pth", read_model, is_sealed=True),
    Target("LoRA file, generate", "ours", "lora.pth", read_lora),
    Target("LoRA file, merge", "ours", "lora.pth", merge),
    Target("LoRA file, export_peft", "ours", "lora.pth", export),
    Target("adapter file", "ours", "adapter.pth", read_adapter),
    Target("training state, LoRA", "ours", "lora-run/training-state.pth", resume("lora-run")),
    Target("training state, full", "ours", "full/training-state.pth", resume("full")),
    Target("metrics.csv at a resume", "ours", "lora-run/metrics.csv", resume("lora-run")),
    Target("prepared tokens", "ours", "data/tokens.bin", read_data, is_sealed=True),
    Target("prepared offsets", "ours", "data/offsets.bin", read_data, is_sealed=True),
    Target("prepared spans", "ours", "data/spans.bin", read_data, is_sealed=True),
    Target("prepared split", "ours", "data/train.bin", read_data, is_sealed=True),
    Target("meta.json", "ours", "data/meta.json", read_data),
    Target("tokenizer_config.json", "ours", "tokenizer_config.json", read_tokenizer("tokenizer.json"), is_sealed=True),
    Target("tokenizer.json", "ours", "tokenizer.json", read_tokenizer("tokenizer.json"), is_sealed=True),
    Target("foreign: tokenizer.model", "foreign", "sp/tokenizer.model", read_tokenizer("sp/tokenizer.model")),
    Target(
        "foreign: tokenizer.json", "foreign", "hf/plain.json", read_tokenizer("hf/plain.json"), is_right=as_tokenizers
    ),
    Target("foreign: tiktoken", "foreign", "ranks.tiktoken", lambda folder: from_tiktoken(folder / "ranks.tiktoken")),
    Target(
        "foreign: HF config.json",
        "foreign",
        "hf/config.json",
        convert(convert_hf_checkpoint, "hf"),
        is_right=as_transformers,
    ),
    Target(
        "foreign: HF index",
        "foreign",
        "hf/model.safetensors.index.json",
        convert(convert_hf_checkpoint, "hf"),
        is_right=as_transformers,
    ),
    Target("foreign: safetensors", "foreign", "hf-1/model-2.safetensors", convert(convert_hf_checkpoint, "hf-1")),
    Target("foreign: params.json", "foreign", "meta/params.json", convert(convert_meta_checkpoint, "meta")),
    Target("foreign: Meta's .pth", "foreign", "meta/consolidated.01.pth", convert(convert_meta_checkpoint, "meta")),
    Target("foreign: GGUF", "foreign", "m.gguf", convert(convert_gguf_checkpoint, "m.gguf")),
    Target("foreign: adapter_config.json", "foreign", "peft/adapter_config.json", read_peft, is_right=as_peft),
    Target("foreign: PEFT's safetensors", "foreign", "peft/adapter_model.safetensors", read_peft, is_right=as_peft),
    Target("records, JSON", "foreign", "records.json", read_own("records.json"), is_right=as_json("records.json")),
    Target("records, JSONL", "foreign", "records.jsonl", read_own("records.jsonl"), is_right=as_json("records.jsonl")),
    Target("prompt file", "foreign", "prompts.txt", lambda folder: read_prompts("", folder / "prompts.txt")),
]
