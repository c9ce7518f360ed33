"""Merging and exporting, by the scripts that users run, and what transformers makes of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.formats.huggingface import hf_config
from lit_llama.lora import TARGETS, LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLaMA, RopeScaling
from lit_llama.model_folder import load_model, save_model_folder
from lit_llama.tokenizer import Tokenizer

import export_hf
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from builders_tokenizers import TEXTS, train_sentencepiece
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

VARIANTS = {
    "mha": replace(TINY, n_kv_head=4),
    "gqa": replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    "tied": replace(TINY, tie_embeddings=True),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def base(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Path:
    """A model folder with a tokenizer."""
    files = {name: (model_folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model_folder(tmp_path / "base", random_model(request.param).state_dict(), request.param, files)
    return tmp_path / "base" / "lit-llama.pth"


def finetuned(base: Path, targets: tuple[str, ...] = TARGETS) -> tuple[LLaMA, Path]:
    """The base with random LoRA, apart, and its file."""
    model, lora, path = load_model(base).eval(), LoRAConfig(4, 32, 0.1, targets), base.parent.parent / "lora.pth"
    add_lora(model, lora)
    randomize(lora_state_dict(model), std=0.1)
    save_file(path, lora, model, lora_state_dict(model), "plain")
    return model, path


@pytest.mark.parametrize("targets", [("query", "value"), TARGETS], ids=["two", "all"])
@torch.no_grad()
def test_merged_and_exported_it_gives_the_same_logits_in_transformers(
    base: Path, targets: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, lora_path = finetuned(base, targets)
    merge = ("--out_dir", tmp_path / "merged", "--lora_path", lora_path, "--pretrained_path", base)
    assert run_script("merge_lora", *merge) is None
    assert float(capsys.readouterr().err.rsplit(" ", 1)[1]) < 1e-3
    export = ("--out_dir", tmp_path / "hf", "--checkpoint_path", tmp_path / "merged" / "lit-llama.pth")
    assert run_script("export_hf", *export) is None
    idx = torch.randint(TINY.vocab_size, (2, 70))
    assert not torch.allclose(model(idx), load_model(base)(idx), atol=0.1)
    torch.testing.assert_close(load_model(tmp_path / "merged" / "lit-llama.pth")(idx), model(idx), atol=1e-4, rtol=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)


def test_the_tokenizer_of_transformers_gives_the_same_ids(base: Path, tmp_path: Path) -> None:
    assert run_script("export_hf", "--out_dir", tmp_path / "hf", "--checkpoint_path", base) is None
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(base.with_name("tokenizer.json"))
    text = "below  is an\n instruction, naïve 日本 🙂 <|im_end|>"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.model_input_names == ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids


@pytest.mark.parametrize("max_shard_gb", [5.0, 2e-5])
def test_from_hf_and_back_is_bit_exact(max_shard_gb: float, base: Path, tmp_path: Path) -> None:
    """transformers' files in bfloat16, by both scripts, are the same tensors again, in one file or many."""
    config = load_model(base).config
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(config, torch.bfloat16))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base.with_name(name), tmp_path / "hf")
    here = ("--checkpoint_dir", tmp_path / "hf", "--out_dir", tmp_path / "ours")
    assert run_script("convert_hf_checkpoint", *here) is None
    there = ("--checkpoint_path", tmp_path / "ours" / "lit-llama.pth", "--out_dir", tmp_path / "back")
    assert run_script("export_hf", *there, "--max_shard_gb", max_shard_gb) is None
    before, after = ({}, {})
    for state, folder in ((before, tmp_path / "hf"), (after, tmp_path / "back")):
        for file in folder.glob("*.safetensors"):
            state |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")  # finds all shards, and ties what is tied
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_is_rounded_once_to_the_dtype_of_the_base(
    base_dtype: torch.dtype, lora_dtype: torch.dtype, model_folder: Path, tmp_path: Path
) -> None:
    model = random_model(TINY).to(base_dtype)
    files = {name: (model_folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_model_folder(tmp_path / "base", model.state_dict(), TINY, files)
    lora = LoRAConfig(4, 8, 0.0, ("projection",))
    add_lora(model, lora)
    state = {name: tensor.normal_(std=0.02).to(lora_dtype) for name, tensor in lora_state_dict(model).items()}
    save_file(tmp_path / "lora.pth", lora, model, state, "plain")
    paths = ("--lora_path", tmp_path / "lora.pth", "--pretrained_path", tmp_path / "base" / "lit-llama.pth")
    assert run_script("merge_lora", "--out_dir", tmp_path / "merged", *paths) is None
    merged = load_model(tmp_path / "merged" / "lit-llama.pth").state_dict()
    name = "transformer.h.1.attn.c_proj."
    exact = model.state_dict()[f"{name}weight"].double()
    exact += 2 * state[f"{name}lora_B"].double() @ state[f"{name}lora_A"].double()
    assert merged[f"{name}weight"].dtype == base_dtype
    half_a_step = exact.abs() * torch.finfo(base_dtype).eps + 1e-7
    assert ((merged[f"{name}weight"].double() - exact).abs() <= half_a_step).all()


def test_an_export_that_fails_leaves_the_earlier_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ("--out_dir", tmp_path / "hf", "--checkpoint_path", base, "--max_shard_gb", 2e-5)
    assert run_script("export_hf", *export) is None
    before = contents(tmp_path / "hf")
    calls, write = [], export_hf.save_file

    def full_disk(tensors: dict, path: Path, **others: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(tensors, path, **others)

    monkeypatch.setattr(export_hf, "save_file", full_disk)
    text = run_script("export_hf", *export)
    assert text is not None
    assert "No space left" in text
    assert contents(tmp_path / "hf") == before
    assert not list(tmp_path.glob(".hf*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("script", ["merge_lora", "export_peft"])
def test_files_in_the_wrong_place_are_told_in_one_line(script: str, base: Path, tmp_path: Path) -> None:
    _, lora_path = finetuned(base)
    fixed = ("--out_dir", tmp_path / "out", *(("--base_model", "x") if script == "export_peft" else ()))
    for paths, words in (
        ((lora_path, lora_path), ("lora.pth", "--lora_path") if script == "merge_lora" else ("lora.pth",)),
        ((base, base), ("lit-llama.pth", "finetune_lora.py")),
        ((tmp_path / "no.pth", base), ("no.pth", "does not exist")),
    ):
        text = run_script(
            script,
            *fixed,
            "--lora_path",
            paths[0],
            "--pretrained_path",
            paths[1],
            *(("--tokenizer_path", base.parent) if script == "merge_lora" else ()),
        )
        assert text is not None
        assert text.startswith("error: ")
        assert "\n" not in text
        assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


def test_a_lora_file_is_no_base_for_an_export(base: Path, tmp_path: Path) -> None:
    _, lora_path = finetuned(base)
    arguments = ("--checkpoint_path", lora_path, "--tokenizer_path", base.parent, "--out_dir", tmp_path / "out")
    assert "--lora_path" in str(run_script("export_hf", *arguments))
    assert not (tmp_path / "out").exists()


def test_config_notes_the_ends_of_a_sequence(base: Path, tmp_path: Path) -> None:
    assert run_script("export_hf", "--out_dir", tmp_path / "hf", "--checkpoint_path", base) is None
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 1
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_sentencepiece_tokenizer_gives_the_same_ids_in_transformers(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    train_sentencepiece(file, vocab_size=TINY.vocab_size, user_defined_symbols=[])
    flags = ("--checkpoint_path", base, "--tokenizer_path", file)
    assert run_script("export_hf", "--out_dir", tmp_path / "hf", *flags) is None
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(file)
    for text in (text for text in TEXTS if text and "<" not in text):  # they read <s> and the like as what it names
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_no_script_writes_over_what_it_reads(base: Path) -> None:
    _, lora_path = finetuned(base)
    before = contents(base.parent)
    for script, *flags in (
        ("export_hf", "--checkpoint_path", base),
        ("merge_lora", "--pretrained_path", base, "--lora_path", lora_path),
        ("convert_hf_checkpoint", "--checkpoint_dir", base.parent),
        ("convert_meta_checkpoint", "--checkpoint_dir", base.parent),
    ):
        assert "choose another place" in str(run_script(script, *flags, "--out_dir", base.parent))
    out_path = ("--out_path", base, "--peft_dir", base.parent)
    assert "choose another place" in str(run_script("import_peft", *out_path, "--pretrained_path", base))
    assert contents(base.parent) == before


def test_a_second_export_keeps_the_users_own_files(base: Path, tmp_path: Path) -> None:
    export = ("--out_dir", tmp_path / "hf", "--checkpoint_path", base)
    assert run_script("export_hf", *export, "--max_shard_gb", 2e-5) is None
    own = {
        name: name.encode() for name in ("model_backup.safetensors", "README.md", "model.safetensors.index.json.bak")
    }
    for name, content in own.items():
        (tmp_path / "hf" / name).write_bytes(content)
    assert run_script("export_hf", *export) is None
    after = contents(tmp_path / "hf")
    assert {name: after.pop(name) for name in own} == own
    (tmp_path / "hf" / "folder").mkdir()
    assert "holds a folder, folder" in str(run_script("export_hf", *export))
    assert (tmp_path / "hf" / "folder").is_dir()


def test_a_second_export_leaves_no_file_of_the_first(base: Path, tmp_path: Path) -> None:
    export = ("--out_dir", tmp_path / "hf", "--checkpoint_path", base)
    assert run_script("export_hf", *export, "--max_shard_gb", 2e-5) is None
    assert len(list((tmp_path / "hf").glob("*.safetensors*"))) > 3
    assert run_script("export_hf", *export) is None
    assert [path.name for path in (tmp_path / "hf").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_tokenizer_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    _, lora_path = finetuned(base)
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=400)
    flags = ("--tokenizer_path", tmp_path / "tokenizer.model", "--out_dir", tmp_path / "out")
    for script, *paths in (
        ("export_hf", "--checkpoint_path", base),
        ("merge_lora", "--pretrained_path", base, "--lora_path", lora_path),
    ):
        assert "400 tokens, the model 320" in str(run_script(script, *paths, *flags))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_files_of_the_archived_lit_llama_are_merged_and_exported(base: Path, tmp_path: Path) -> None:
    config, C = load_model(base).config, TINY.n_embd
    if config.n_kv_head != config.n_head:
        pytest.skip("it knew no grouped queries")
    shapes = {"A": (8, C), "B": (2 * C, 4)}
    state = {f"transformer.h.{i}.attn.c_attn.lora_{x}": 0.1 * torch.randn(shapes[x]) for i in range(2) for x in "AB"}
    torch.save(state, tmp_path / "old.pth")
    paths = ("--lora_path", tmp_path / "old.pth", "--pretrained_path", base)
    for script, *flags in (("merge_lora",), ("export_peft", "--base_model", "x")):
        out = tmp_path / script
        assert "--lora_alpha" in str(run_script(script, *paths, *flags, "--out_dir", out))
        assert not out.exists()
        assert run_script(script, *paths, *flags, "--out_dir", out, "--lora_alpha", 8) is None
    delta = load_model(tmp_path / "merge_lora" / "lit-llama.pth").state_dict()["transformer.h.1.attn.c_attn.weight"]
    delta = delta - load_model(base).state_dict()["transformer.h.1.attn.c_attn.weight"]
    A, B = (state[f"transformer.h.1.attn.c_attn.lora_{x}"] for x in "AB")
    torch.testing.assert_close(delta[2 * C :], 8 / 4 * B[C:] @ A[4:], atol=1e-5, rtol=0)
    other = {name.replace("h.1", "h.2"): tensor for name, tensor in state.items()}  # of another number of layers
    torch.save(other, tmp_path / "old.pth")
    message = run_script("export_peft", *paths, "--base_model", "x", "--out_dir", tmp_path / "o", "--lora_alpha", 8)
    assert "old.pth does not fit" in str(message)
    assert not (tmp_path / "o").exists()


def test_weights_that_were_not_written_as_they_are_do_not_replace_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ("--out_dir", tmp_path / "hf", "--checkpoint_path", base)
    assert run_script("export_hf", *export) is None
    before, write = contents(tmp_path / "hf"), export_hf.save_file

    def wrong(tensors: dict, path: Path, **others: Any) -> None:
        write({name: tensor + 1 for name, tensor in tensors.items()}, path, **others)

    monkeypatch.setattr(export_hf, "save_file", wrong)
    assert "what is read back is not the same" in str(run_script("export_hf", *export))
    assert contents(tmp_path / "hf") == before


def with_files(base: Path, folder: Path, **files: dict[str, Any]) -> Path:
    """The model again, its tokenizer with other files beside it."""
    model = load_model(base)
    contents = {name: base.with_name(name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    contents |= {f"{name}.json": json.dumps(fields).encode() for name, fields in files.items()}
    save_model_folder(folder, model.state_dict(), model.config, contents)
    return folder / "lit-llama.pth"


def test_every_end_of_an_answer_is_exported(base: Path, tmp_path: Path) -> None:
    path = with_files(base, tmp_path / "ends", generation_config={"eos_token_id": [0, 5]})
    assert run_script("export_hf", "--out_dir", tmp_path / "hf", "--checkpoint_path", path) is None
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == [1, 0, 5]


def test_the_exported_tokenizer_is_read_as_it_is_and_has_all_names(base: Path, tmp_path: Path) -> None:
    """Other classes build it anew from its vocabulary; files from transformers 5 would not be read by 4."""
    config = {"tokenizer_class": "LlamaTokenizer", "backend": "tokenizers", "extra_special_tokens": ["<|endoftext|>"]}
    path = with_files(
        base,
        tmp_path / "odd",
        tokenizer_config={**config, "model_max_length": 77},
        special_tokens_map={"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}},
        added_tokens={"<tool>": Tokenizer(base.with_name("tokenizer.json")).vocab_size},
    )
    assert run_script("export_hf", "--out_dir", tmp_path / "hf", "--checkpoint_path", path) is None
    fields = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (fields["tokenizer_class"], fields["model_max_length"]) == ("PreTrainedTokenizerFast", 77)
    assert not fields.keys() & {"backend", "extra_special_tokens"}
    ours, theirs = Tokenizer(path.with_name("tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token, theirs.eos_token) == ("<|endoftext|>", "<|im_end|>")
    for text in ("an instruction <tool> 🙂", "  two"):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert ours.encode("<tool>") == [ours.vocab_size - 1]
