"""LoRA files that PEFT itself has written, and ours as PEFT itself reads them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lit_llama.finetuned import read_finetuned
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.lora import TARGETS, LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.model_folder import save_model_folder

import peft
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from builders_tokenizers import train_byte_tokenizer
from safetensors.torch import load_file
from safetensors.torch import save_file as save_safetensors
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {"gqa": TINY, "tied": replace(TINY, tie_embeddings=True)}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def hf_model(config: LLaMAConfig) -> LlamaForCausalLM:
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(config, torch.float32)))
    hf.load_state_dict(to_hf(random_model(config).state_dict(), config))
    return hf.eval()


def base(config: LLaMAConfig, folder: Path) -> Path:
    model = random_model(config)
    save_model_folder(folder, model.state_dict(), config, {"tokenizer.json": train_byte_tokenizer().to_str()})
    return folder / "lit-llama.pth"


def peft_folder(folder: Path, config: LLaMAConfig, **fields: object) -> peft.PeftModel:
    """A folder that PEFT has saved, with random A and B."""
    torch.manual_seed(1)
    model = peft.get_peft_model(hf_model(config), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def imported(folder: Path, config: LLaMAConfig, work: Path) -> LLaMA:
    arguments = (
        "--peft_dir",
        folder,
        "--out_path",
        work / "lora.pth",
        "--pretrained_path",
        base(config, work / "base"),
    )
    assert run_script("import_peft", *arguments) is None
    model = random_model(config)
    read_finetuned(work / "lora.pth", "lora").add_to(model)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 8, "target_modules": [*ALL]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "k_proj"], "layers_to_transform": [1]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "o_proj"], "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]},  # PEFT stores the head's own weight, too
    ],
)
@torch.no_grad()
def test_a_file_of_peft_gives_its_logits_here(config: LLaMAConfig, fields: dict, tmp_path: Path) -> None:
    model = peft_folder(tmp_path / "peft", config, **fields)
    idx = torch.randint(config.vocab_size, (2, 70))
    expected = model(idx).logits
    assert not torch.allclose(expected, hf_model(config)(idx).logits, atol=0.1)
    ours = imported(tmp_path / "peft", config, tmp_path)
    torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("targets", [("query", "value"), ("key", "projection"), TARGETS], ids=str)
@torch.no_grad()
def test_an_exported_file_gives_our_logits_in_peft(
    config: LLaMAConfig, targets: tuple[str, ...], tmp_path: Path
) -> None:
    lora = LoRAConfig(4, 32, 0.1, targets)
    model = random_model(config)
    add_lora(model, lora)
    randomize(lora_state_dict(model), std=0.05)
    save_file(tmp_path / "lora.pth", lora, model, lora_state_dict(model), "plain")
    paths = ("--lora_path", tmp_path / "lora.pth", "--pretrained_path", base(config, tmp_path))
    assert run_script("export_peft", "--out_dir", tmp_path / "peft", "--base_model", "some/model", *paths) is None
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/model"
    theirs = peft.PeftModel.from_pretrained(hf_model(config), tmp_path / "peft").eval()
    idx = torch.randint(config.vocab_size, (2, 70))
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_what_is_no_plain_lora_is_refused_in_one_line(tmp_path: Path) -> None:
    peft_folder(tmp_path / "peft", TINY, r=4, target_modules=["q_proj"])
    file, weights = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    arguments = ("--peft_dir", tmp_path / "peft", "--out_path", tmp_path / "x.pth", "--pretrained_path")
    fields = json.loads(file.read_text())
    for change, word in (
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": None}, "r is None"),
        ({"r": 8}, "another model"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_something_new": True}, "use_something_new"),
    ):
        file.write_text(json.dumps(fields | change))
        text = run_script("import_peft", *arguments, base(TINY, tmp_path / "base"))
        assert text is not None
        assert word in text
        assert "\n" not in text
    file.write_text(json.dumps(fields))
    for other in (replace(TINY, n_layer=1), replace(TINY, n_embd=64)):
        assert run_script("import_peft", *arguments, base(other, tmp_path / "base")) is not None
    weights.write_bytes(weights.read_bytes()[:-10])
    text = run_script("import_peft", *arguments, base(TINY, tmp_path / "base"))
    assert text is not None
    assert str(weights) in text
    assert not (tmp_path / "x.pth").exists()


def rename(how: Callable[[str], str]) -> Callable[[dict], dict]:
    return lambda tensors: {how(name): tensor for name, tensor in tensors.items()}


def changed(folder: Path, how: Callable[[dict], dict]) -> None:
    file = folder / "adapter_model.safetensors"
    save_safetensors(how(load_file(file)), file)


EMBEDDING = "base_model.model.model.embed_tokens.weight"
OTHER_NAMES = {
    "the adapter's name": rename(lambda name: name.replace(".weight", ".default.weight")),
    "a compiled model": rename(lambda name: name.replace("model.model.", "model._orig_mod.model.")),
    "DDP": rename(lambda name: f"module.{name}"),
    "no prefix": rename(lambda name: name.removeprefix("base_model.model.")),
    "one model. less": rename(lambda name: name.replace("model.model.layers", "model.layers")),
    "the base's embedding": lambda tensors: {**tensors, EMBEDDING: hf_model(TINY).model.embed_tokens.weight.clone()},
}


@pytest.mark.parametrize("how", OTHER_NAMES.values(), ids=OTHER_NAMES)
@torch.no_grad()
def test_names_of_other_programs_are_understood(how: Callable[[dict], dict], tmp_path: Path) -> None:
    model = peft_folder(tmp_path / "peft", TINY, r=4, target_modules=["q_proj", "v_proj"])
    changed(tmp_path / "peft", how)
    idx = torch.randint(TINY.vocab_size, (1, 40))
    ours = imported(tmp_path / "peft", TINY, tmp_path)
    torch.testing.assert_close(ours(idx), model(idx).logits, atol=1e-4, rtol=0)


SPOILT = {
    "no tensors": lambda _: {},
    "vision.layers.0": rename(lambda name: f"vision.{name}"),
    "embed_tokens.weight": lambda tensors: {**tensors, EMBEDDING: torch.ones(TINY.vocab_size, TINY.n_embd)},
    "only one of A and B": lambda tensors: dict([*tensors.items()][1:]),
    "several tensors": lambda tensors: tensors | {f"module.{name}": tensor + 1 for name, tensor in tensors.items()},
}


@pytest.mark.parametrize(("word", "how"), SPOILT.items(), ids=SPOILT)
def test_what_is_not_the_lora_of_the_base_alone_is_refused(
    word: str, how: Callable[[dict], dict], tmp_path: Path
) -> None:
    peft_folder(tmp_path / "peft", TINY, r=4, target_modules=["q_proj"])
    changed(tmp_path / "peft", how)
    flags = ("--out_path", tmp_path / "x.pth", "--pretrained_path", base(TINY, tmp_path / "base"))
    assert word in str(run_script("import_peft", "--peft_dir", tmp_path / "peft", *flags))
    assert not (tmp_path / "x.pth").exists()


def test_a_model_is_told_from_an_adapter(tmp_path: Path) -> None:
    hf_model(TINY).save_pretrained(tmp_path / "hf")
    flags = ("--out_path", tmp_path / "x.pth", "--pretrained_path", base(TINY, tmp_path / "base"))
    assert "convert_hf_checkpoint.py" in str(run_script("import_peft", "--peft_dir", tmp_path / "hf", *flags))
