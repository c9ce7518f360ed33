"""llama.cpp itself, where it is installed, with models that we export: our ids, our greedy text."""

from dataclasses import replace
from pathlib import Path

from lit_llama.generation import Sampling, generate
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLAMA_3_SCALING, LLaMA, LLaMAConfig
from lit_llama.model_folder import save_model_folder
from lit_llama.prompt import STYLES, encode
from lit_llama.tokenizer import Tokenizer

import pytest
from builders import TINY, random_model, randomize, run_script, save_file
from builders_chat import as_dicts, prompts, write_chat_tokenizer
from builders_tokenizers import TEXTS, train_sentencepiece
from check_exports import LlamaCpp
from tokenizer_files import PRE_TOKENIZERS
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers

pytest.importorskip("xllamacpp")
WIDE = replace(TINY, n_embd=64, block_size=512)  # llama.cpp's kernels want heads of 16 channels or more
ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>")  # where llama.cpp stops, by their names
VARIANTS = {
    "mha": replace(WIDE, n_kv_head=4),
    "gqa": replace(WIDE, rope_base=5e5, rope_scaling=LLAMA_3_SCALING),
    "tied": replace(WIDE, tie_embeddings=True),
}


def export(folder: Path, config: LLaMAConfig, tokenizer: Tokenizer, style: str, *flags: object) -> Path:
    """The folder of a random model, exported in float32."""
    save_model_folder(folder / "base", random_model(config).state_dict(), config, tokenizer.files(), style)
    flags = ("--checkpoint_path", folder / "base" / "lit-llama.pth", "--dtype", "F32", *flags)
    assert run_script("export_gguf", *flags, "--out_dir", folder / "gguf") is None
    return folder / "gguf"


def check_answers(llama: LlamaCpp, model: LLaMA, tokenizer: Tokenizer) -> None:
    """The same greedy ids, which a random model would not give if anything differed."""
    stop, n_ids = {tokenizer.control_id(name) for name in ENDS}, 0
    for text in TEXTS[:4]:
        ids = tokenizer.encode(text)
        ours = [*generate(model, ids, Sampling(40, temperature=0), stop)]
        theirs = llama.post("/completion", prompt=ids, temperature=0, n_predict=40, return_tokens=True)["tokens"]
        assert [token for token in theirs if token not in stop] == ours
        n_ids += len(ours)
    assert n_ids > 30


def check_texts(llama: LlamaCpp, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = llama.post("/tokenize", content=text, parse_special=False)["tokens"]
        assert ids == tokenizer.encode(text, bos=False), text


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_an_exported_model_gives_our_greedy_answer(config: LLaMAConfig, tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer")
    folder = export(tmp_path, config, tokenizer, "llama3")
    check_answers(LlamaCpp(folder / "model-F32.gguf"), random_model(config), tokenizer)


def test_an_exported_lora_gives_our_greedy_answer(tmp_path: Path) -> None:
    tokenizer, lora = write_chat_tokenizer(tmp_path / "tokenizer"), LoRAConfig(4, 32, 0.0)
    lora = replace(lora, targets=("query", "key", "value", "projection", "mlp", "head"))
    model = random_model(WIDE)
    add_lora(model, lora)
    randomize(lora_state_dict(model), std=0.1)
    save_file(tmp_path / "lora.pth", lora, model, lora_state_dict(model), "llama3")
    base = export(tmp_path, WIDE, tokenizer, "llama3") / "model-F32.gguf"
    flags = ("--lora_path", tmp_path / "lora.pth", "--base_model", base)
    check_answers(
        LlamaCpp(base, export(tmp_path, WIDE, tokenizer, "llama3", *flags) / "lora-F32.gguf"), model, tokenizer
    )


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("style", STYLES)
def test_the_template_in_a_gguf_renders_our_ids(style: str, bos: str | None, tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", bos)
    llama = LlamaCpp(export(tmp_path, WIDE, tokenizer, style) / "model-F32.gguf")
    for messages in prompts(style):
        assert llama.encode(as_dicts(messages)) == encode(style, messages, tokenizer).ids


@pytest.mark.parametrize("style", ["plain", "alpaca", "llama2", "zephyr"])
def test_the_template_renders_our_ids_with_a_sentencepiece_tokenizer(style: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=320, user_defined_symbols=[])
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    llama = LlamaCpp(export(tmp_path, WIDE, tokenizer, style) / "model-F32.gguf")
    for messages in prompts(style):
        assert llama.encode(as_dicts(messages)) == encode(style, messages, tokenizer).ids
    check_texts(llama, tokenizer)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_texts_are_cut_as_here(pre: str, tmp_path: Path) -> None:
    path = write_chat_tokenizer(tmp_path / "tokenizer").path
    hf = HFTokenizer.from_file(str(path))
    hf.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    hf.model.ignore_merges = pre == "llama-bpe"
    hf.save(str(path))
    tokenizer = Tokenizer(path)
    llama = LlamaCpp(export(tmp_path, WIDE, tokenizer, "plain") / "model-F32.gguf")
    check_texts(llama, tokenizer)
