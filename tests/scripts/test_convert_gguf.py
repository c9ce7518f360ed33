"""GGUF files of the llama architecture become model folders; others are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.model import RopeScaling
from lit_llama.model_folder import load_model
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import convert_gguf_checkpoint
import numpy as np
import pytest
import torch
from builders_gguf import GGUF_CONFIG, bpe_metadata, sentencepiece_metadata, write_gguf
from builders_tokenizers import train_sentencepiece
from tokenizers import Tokenizer as HFTokenizer


def test_a_quantised_gguf_gives_its_dequantised_weights_and_its_config(
    tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer))
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    model = load_model(tmp_path / "out" / "lit-llama.pth")
    assert model.config == GGUF_CONFIG
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], tensors["token_embd"])
    qkv = torch.cat([tensors[f"blk.1.attn_{x}"] for x in "qkv"])
    assert torch.equal(state["transformer.h.1.attn.c_attn.weight"], qkv)
    assert torch.equal(state["transformer.h.0.mlp.c_fc1.weight"], tensors["blk.0.ffn_gate"])
    assert torch.equal(state["transformer.h.0.mlp.c_fc2.weight"], tensors["blk.0.ffn_up"])


def test_a_tensor_is_dequantised_in_pieces(
    tmp_path: Path, byte_tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer))
    monkeypatch.setattr(convert_gguf_checkpoint, "ROWS", 7)
    _, stored = convert_gguf_checkpoint.read_gguf(tmp_path / "m.gguf")
    for name in ("token_embd", "output_norm"):
        assert torch.equal(convert_gguf_checkpoint.dequantise(tmp_path, stored[f"{name}.weight"]), tensors[name])


def test_the_gguf_tokenizer_comes_along_and_splits_digits(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer))
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    text = "below is an instruction 🙂"
    assert tokenizer.encode(text) == byte_tokenizer.encode(text).ids
    space = tokenizer.encode(" ")
    assert tokenizer.encode("12 34") == [tokenizer.encode(d)[0] for d in "12"] + space + [
        tokenizer.encode(d)[0] for d in "34"
    ]


def test_a_sentencepiece_tokenizer_comes_along(tmp_path: Path) -> None:
    sp = train_sentencepiece(tmp_path / "original.model")
    write_gguf(tmp_path / "m.gguf", sentencepiece_metadata(sp))
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    ours, original = Tokenizer(tmp_path / "out" / "tokenizer.model"), Tokenizer(tmp_path / "original.model")
    text = "  Write a response 🙂\n"
    assert ours.encode(text, eos=True) == original.encode(text, eos=True)
    assert ours.decode(ours.encode(text)) == text


def llama_3_divisors(factor: float, low: float, high: float, original: float) -> np.ndarray:
    """What llama.cpp stores as rope_freqs, by wavelengths as it computes them."""
    size, divisors = GGUF_CONFIG.head_size, []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * GGUF_CONFIG.rope_base ** (i / size)
        smooth = (original / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        fast, slow = wavelength < original / high, wavelength > original / low
        divisors.append(1.0 if fast else factor if slow else middle)
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path, byte_tokenizer: HFTokenizer, factor: float) -> None:
    divisors = llama_3_divisors(factor, 1, 4, 8192)
    assert any(1 < divisor < factor for divisor in divisors)  # all three cases are there
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer), extra={"rope_freqs": divisors})
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    config = load_model(tmp_path / "out" / "lit-llama.pth").config
    assert config == replace(GGUF_CONFIG, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192))


def test_an_unknown_scaling_is_refused(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    for divisors in (llama_3_divisors(8, 1, 4.05, 8192), np.ones(3, dtype=np.float32)):
        write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer), extra={"rope_freqs": divisors})
        with pytest.raises(UserError, match=r"m\.gguf.*rotary"):
            convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, "mixture of 8 experts"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type 'yarn'"),
        ("llama.attention.sliding_window", 64, "llama.attention.sliding_window is 64"),
        ("llama.logit_scale", 0.5, "llama.logit_scale is 0.5"),
        ("llama.attention.causal", False, "attention.causal"),
        ("llama.attention.key_length", 32, "attention.key_length of 32"),
        ("general.type", "adapter", "holds a LoRA"),
        ("llama.rope.dimension_count", 8, "rope.dimension_count of 8"),
        ("llama.attention.head_count", 3, "n_head=3"),
    ],
)
def test_what_is_not_llama_is_refused(
    tmp_path: Path, byte_tokenizer: HFTokenizer, key: str, value: object, message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | {key: value})
    with pytest.raises(UserError, match=rf"m\.gguf .*{message}"):
        convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")


def test_no_scaling_may_be_stated(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    stated = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.dimension_count": 16}
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | stated)
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    assert load_model(tmp_path / "out" / "lit-llama.pth").config == GGUF_CONFIG


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    integers = {"output_norm": np.ones(64, dtype=np.int32)}
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer), without="output_norm", extra=integers)
    with pytest.raises(UserError, match=r"m\.gguf holds output_norm\.weight as I32"):
        convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_ggufs_are_refused_and_leave_nothing(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    path, metadata = tmp_path / "m.gguf", bpe_metadata(byte_tokenizer)
    with pytest.raises(UserError, match=r"m\.gguf does not exist"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"m\.gguf is not a whole GGUF"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, metadata, architecture="gemma")
    with pytest.raises(UserError, match="'gemma'"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, metadata | {"tokenizer.ggml.pre": "unheard-of"})
    with pytest.raises(UserError, match="unheard-of"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, {key: value for key, value in metadata.items() if "merges" not in key})
    with pytest.raises(UserError, match=r"m\.gguf does not say its tokenizer\.ggml\.merges"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, metadata, without="token_embd")
    with pytest.raises(UserError, match=r"m\.gguf has no weights"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, metadata, without="blk.1.attn_k")
    with pytest.raises(UserError, match=r"m\.gguf.*lacks 'transformer\.h\.1\.attn\.c_attn"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, metadata)
    content = path.read_bytes()
    for size in [*range(0, len(content) - 5000, 5000), len(content) - 5000]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"m\.gguf is not a whole GGUF"):
            convert_gguf_checkpoint.main(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_in_parts_is_read_whichever_is_given(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer), split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for i in (0, 2):
        convert_gguf_checkpoint.main(parts[i], tmp_path / "out")
        state = load_model(tmp_path / "out").state_dict()
        assert torch.equal(state["transformer.h.1.mlp.c_fc1.weight"], tensors["blk.1.ffn_gate"])
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match=rf"one of {len(parts)} parts, and .*{parts[1].name} is missing"):
        convert_gguf_checkpoint.main(parts[0], tmp_path / "out")
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match="have the same tensors"):
        convert_gguf_checkpoint.main(parts[0], tmp_path / "out")
    parts[1].write_bytes(content[:-100])
    with pytest.raises(UserError, match=parts[1].name):
        convert_gguf_checkpoint.main(parts[0], tmp_path / "out")


@pytest.mark.parametrize("count", [2**31, "two"])
def test_a_number_of_parts_that_makes_no_sense_is_refused(
    count: Any, tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | {"split.count": count})
    with pytest.raises(UserError, match=r"split\.count"):
        convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0}],
    ids=["new", "old"],
)
def test_linear_scaling_is_read(fields: dict[str, Any], tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | fields)
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    assert load_model(tmp_path / "out").config == replace(GGUF_CONFIG, rope_scaling=RopeScaling(4.0))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_all_ends_of_an_answer_come_along(kind: str, tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    metadata = bpe_metadata(byte_tokenizer)
    if kind == "sentencepiece":
        sp = train_sentencepiece(tmp_path / "original.model")
        metadata = sentencepiece_metadata(sp) | {"tokenizer.ggml.eos_token_id": 2}
    eos = metadata["tokenizer.ggml.eos_token_id"]
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    write_gguf(tmp_path / "m.gguf", metadata | ends)
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = find_tokenizer(tmp_path / "out", tmp_path / "out")
    assert (tokenizer.eos_id, tokenizer.end_ids) == (eos, {eos, 7, 9})


def test_the_bos_of_templates_comes_along_though_plain_text_has_none(
    tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    write_gguf(tmp_path / "m.gguf", bpe_metadata(byte_tokenizer) | {"tokenizer.ggml.add_bos_token": False})
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = find_tokenizer(tmp_path / "out", tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.names["bos_token"]) == (None, "<|endoftext|>")
