"""GGUF files that are exported: read back, they are the same model, tokenizer, template and LoRA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.lora import TARGETS, LoRAConfig, add_lora, lora_state_dict
from lit_llama.model import LLAMA_3_SCALING, LLaMA, LLaMAConfig, RopeScaling
from lit_llama.model_folder import load_model, own_template, save_model_folder
from lit_llama.prompt import STYLES
from lit_llama.tokenizer import Tokenizer

import convert_gguf_checkpoint
import export_gguf
import pytest
import torch
from builders import TINY, random_model, randomize, run_script, save_file
from builders_chat import write_chat_tokenizer
from builders_tokenizers import TEXTS, train_sentencepiece
from export_hf import from_sentencepiece
from gguf import GGUFReader, dequantize
from modelfile import TEMPLATES, modelfile
from tokenizer_files import PRE_TOKENIZERS
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers, pre_tokenizers

VARIANTS = {
    "mha": replace(TINY, n_kv_head=4, norm_eps=1e-5),
    "gqa": replace(TINY, rope_base=5e5, rope_scaling=LLAMA_3_SCALING),
    "tied": replace(TINY, tie_embeddings=True),
    "linear": replace(TINY, rope_scaling=RopeScaling(4.0)),
}


def model_folder(folder: Path, config: LLaMAConfig) -> Path:
    """The checkpoint of a random model in the style of Llama 3."""
    files = write_chat_tokenizer(folder.with_name("tokenizer")).files()
    save_model_folder(folder, random_model(config).state_dict(), config, files, "llama3")
    return folder / "lit-llama.pth"


def matrices(path: Path) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_an_exported_model_is_the_same_when_it_is_converted_back(
    dtype: str, config: LLaMAConfig, tmp_path: Path
) -> None:
    checkpoint = model_folder(tmp_path / "base", config)
    export = ("--checkpoint_path", checkpoint, "--out_dir", tmp_path / "gguf", "--dtype", dtype)
    assert run_script("export_gguf", *export) is None
    convert_gguf_checkpoint.main(tmp_path / "gguf" / f"model-{dtype}.gguf", tmp_path / "back")
    before, after = load_model(checkpoint), load_model(tmp_path / "back" / "lit-llama.pth")
    assert after.config == before.config
    assert own_template(tmp_path / "back" / "lit-llama.pth") == STYLES["llama3"]
    for name, weight in before.state_dict().items():
        found = after.state_dict()[name]
        if dtype == "F32" or weight.ndim == 1:
            assert torch.equal(found, weight), name
        elif dtype == "F16" or weight.size(1) % 32:
            assert torch.equal(found, weight.half().float()), name
        else:  # half a step of 1 / 127 of the largest number, and the rounding of the scale to 11 bits
            largest = weight.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)  # (rows, blocks, 1)
            error = (found - weight).unflatten(1, (-1, 32)).abs()
            assert (error <= largest * (0.5 / 127 + 2**-11)).all(), name
            assert not torch.equal(found, weight)
    ours, theirs = Tokenizer(checkpoint.with_name("tokenizer.json")), Tokenizer(tmp_path / "back" / "tokenizer.json")
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def back(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    folder.mkdir()
    for name, content in convert_gguf_checkpoint.tokenizer_from_gguf(Path("m.gguf"), metadata).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Tokenizer(next(folder.glob("tokenizer.[mj]*")))


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
def test_a_byte_level_tokenizer_is_the_same_when_it_is_read_back(pre: str, bos: str | None, tmp_path: Path) -> None:
    path = write_chat_tokenizer(tmp_path, bos).path
    hf = HFTokenizer.from_file(str(path))
    hf.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    hf.model.ignore_merges = pre == "llama-bpe"
    hf.save(str(path))
    ours, metadata = Tokenizer(path), export_gguf.tokenizer_metadata(Tokenizer(path), 320)
    assert (metadata["tokenizer.ggml.pre"], len(metadata["tokenizer.ggml.tokens"])) == (pre, 320)
    theirs = back(tmp_path / "back", metadata)
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_the_same_when_it_is_read_back(prefix: bool, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
    ours = Tokenizer(tmp_path / "tokenizer.model")
    theirs = back(tmp_path / "back", export_gguf.tokenizer_metadata(ours, 450))
    assert (theirs.vocab_size, theirs.bos_id, theirs.eos_id) == (450, ours.bos_id, ours.eos_id)
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    path = write_chat_tokenizer(tmp_path).path
    content = path.read_text()
    for name, value in (("pre_tokenizer", pre_tokenizers.Whitespace()), ("normalizer", normalizers.Lowercase())):
        hf = HFTokenizer.from_str(content)
        setattr(hf, name, value)
        hf.save(str(path))
        with pytest.raises(UserError, match=r"tokenizer\.json cuts text in a way"):
            export_gguf.tokenizer_metadata(Tokenizer(path), 320)
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=350)
    for name, text in from_sentencepiece(Tokenizer(tmp_path / "tokenizer.model")).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"without the scores .*its tokenizer\.model in place"):
        export_gguf.tokenizer_metadata(Tokenizer(path), 350)
    train_sentencepiece(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=350)
    with pytest.raises(UserError, match=r"tokenizer\.model changes text or is not BPE"):
        export_gguf.tokenizer_metadata(Tokenizer(tmp_path / "tokenizer.model"), 450)


@torch.no_grad()
def lora_file(checkpoint: Path, path: Path, targets: tuple[str, ...]) -> LLaMA:
    model, lora = load_model(checkpoint), LoRAConfig(4, 32, 0.1, targets)
    add_lora(model, lora)
    randomize(lora_state_dict(model), std=0.1)
    save_file(path, lora, model, lora_state_dict(model), "chatml")
    return model


def test_a_lora_file_alone_has_the_update_of_each_matrix(tmp_path: Path) -> None:
    checkpoint = model_folder(tmp_path / "base", VARIANTS["gqa"])
    model = lora_file(checkpoint, tmp_path / "lora.pth", TARGETS)
    flags = ("--checkpoint_path", checkpoint, "--lora_path", tmp_path / "lora.pth", "--out_dir", tmp_path / "gguf")
    assert "add --base_model" in str(run_script("export_gguf", *flags))
    assert run_script("export_gguf", *flags, "--base_model", checkpoint, "--dtype", "F32") is None
    tensors, fields = (
        matrices(tmp_path / "gguf" / "lora-F32.gguf"),
        GGUFReader(tmp_path / "gguf" / "lora-F32.gguf").fields,
    )
    assert [fields[name].contents() for name in ("adapter.type", "adapter.lora.alpha")] == ["lora", 32]
    q, k, v = model.transformer.h[1].attn.c_attn.delta().split(model.config.qkv_sizes)
    mlp = model.transformer.h[1].mlp
    expected = {"attn_q": q, "attn_k": k, "attn_v": v, "ffn_up": mlp.c_fc2.delta(), "ffn_down": mlp.c_proj.delta()}
    for name, delta in {
        **{f"blk.1.{name}": d for name, d in expected.items()},
        "output": model.lm_head.delta(),
    }.items():
        A, B = (tensors[f"{name}.weight.lora_{x}"] for x in "ab")
        torch.testing.assert_close(32 / 4 * B @ A, delta)
    assert len(tensors) == 2 * (7 * 2 + 1)
    assert (tmp_path / "gguf" / "chat_template.jinja").read_text() == STYLES["chatml"]
    text = (tmp_path / "gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./../base/lit-llama.pth\nADAPTER ./lora-F32.gguf\nTEMPLATE")
    assert '\nPARAMETER stop "<|im_end|>"\n' in text


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = model_folder(tmp_path / "base", VARIANTS["tied"])
    lora_file(checkpoint, tmp_path / "lora.pth", ("head",))
    flags = ("--checkpoint_path", checkpoint, "--out_dir", tmp_path / "gguf")
    lora = (*flags, "--base_model", "x", "--lora_path")
    assert "merge it" in str(run_script("export_gguf", *lora, tmp_path / "lora.pth"))
    assert "finetune_lora.py" in str(run_script("export_gguf", *lora, checkpoint))
    assert "goes with --lora_path" in str(run_script("export_gguf", *flags, "--base_model", "x"))
    model = random_model(TINY)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    save_model_folder(
        tmp_path / "base", model.state_dict(), TINY, Tokenizer(checkpoint.with_name("tokenizer.json")).files()
    )
    message = str(run_script("export_gguf", *flags))
    assert "output.weight has numbers beyond 65504" in message
    assert ".part" not in message
    assert not (tmp_path / "gguf").exists()


def test_the_style_of_a_flag_goes_before_that_of_the_model(tmp_path: Path) -> None:
    checkpoint = model_folder(tmp_path / "base", TINY)
    flags = ("--checkpoint_path", checkpoint, "--out_dir", tmp_path / "gguf", "--dtype", "Q8_0")
    assert run_script("export_gguf", *flags, "--prompt_style", "zephyr") is None
    fields = GGUFReader(tmp_path / "gguf" / "model-Q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == STYLES["zephyr"]
    assert "</s>\n{{ end }}<|assistant|>\n" in (tmp_path / "gguf" / "Modelfile").read_text()


def test_every_style_has_a_modelfile(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path)
    for style in TEMPLATES:
        text = modelfile("llama3.2", None, STYLES[style], tokenizer)
        assert text.count('"""') == (4 if style == "smollm2" else 2)
        assert "BOS" not in text
        assert "EOS" not in text
    assert TEMPLATES.keys() == STYLES.keys()
    assert " </s><s>{{ end }}" in modelfile("x", None, STYLES["llama2"], tokenizer)
    assert modelfile("x", None, None, tokenizer) == "FROM x\n"


def test_every_end_of_an_answer_is_written(tmp_path: Path) -> None:
    files = write_chat_tokenizer(tmp_path / "tokenizer").files()
    files["generation_config.json"] = json.dumps({"eos_token_id": [5, 6]}).encode()
    save_model_folder(tmp_path / "base", random_model(TINY).state_dict(), TINY, files, "llama3")
    tokenizer = Tokenizer(tmp_path / "base" / "tokenizer.json")
    turn_end = tokenizer.control_id("<|eot_id|>")
    export = ("--checkpoint_path", tmp_path / "base", "--out_dir", tmp_path / "gguf", "--dtype", "F32")
    assert run_script("export_gguf", *export) is None
    fields = GGUFReader(tmp_path / "gguf" / "model-F32.gguf").fields
    found = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")]
    assert found[0] == tokenizer.eos_id
    assert {*found} < {tokenizer.eos_id, 5, 6, turn_end}  # the format has three
    stops = [line for line in (tmp_path / "gguf" / "Modelfile").read_text().splitlines() if "stop" in line]
    assert len(stops) == 4
