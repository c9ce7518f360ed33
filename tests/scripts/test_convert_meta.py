"""Meta's format, written out here by its own rules, against transformers' model of the same weights."""

import json
from dataclasses import replace
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.formats.huggingface import hf_config, pairs_from_halves
from lit_llama.model import CONFIGS, LLaMAConfig
from lit_llama.model_folder import load_model

import convert_meta_checkpoint
import pytest
import torch
from builders import TINY, peak_of_conversion, run_script
from convert_hf_checkpoint import from_hf
from convert_meta_checkpoint import published_length
from transformers import LlamaConfig, LlamaForCausalLM

COLUMNS = ("attention.wo", "feed_forward.w2")  # split along the inputs; norms are on every rank, all else by rows
VARIANTS = {
    "LLaMA 1": replace(TINY, n_kv_head=4, n_hidden=256, norm_eps=1e-6, block_size=2048),
    "Llama 2": replace(TINY, n_hidden=256, norm_eps=1e-5, block_size=4096),
    "Llama 3": replace(TINY, n_hidden=192, norm_eps=1e-5, rope_base=5e5, block_size=8192),
    "Llama 3.2": replace(
        TINY,
        n_hidden=192,
        norm_eps=1e-5,
        rope_base=5e5,
        block_size=131072,
        rope_scaling=CONFIGS["Llama-3.2-1B"].rope_scaling,
        tie_embeddings=True,
    ),
}


def meta_state(model: LlamaForCausalLM, config: LLaMAConfig) -> dict[str, torch.Tensor]:
    hf = model.state_dict()
    state = {
        "tok_embeddings.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
        "output.weight": hf["lm_head.weight"],
        "rope.freqs": torch.rand(config.head_size // 2),
    }
    for i in range(config.n_layer):
        for ours, theirs in {
            "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            state[f"layers.{i}.{ours}.weight"] = hf[f"model.layers.{i}.{theirs}.weight"]
        for letter, heads in (("q", config.n_head), ("k", config.n_kv_head)):
            weight = hf[f"model.layers.{i}.self_attn.{letter}_proj.weight"]
            state[f"layers.{i}.attention.w{letter}.weight"] = pairs_from_halves(weight, heads)
    return state


def part(name: str, tensor: torch.Tensor, rank: int, n: int, config: LLaMAConfig) -> torch.Tensor:
    """What rank `rank` of `n` holds of a tensor."""
    if tensor.ndim == 1:
        return tensor.clone()
    if name == "tok_embeddings.weight":
        return tensor.chunk(n, dim=0 if config.rope_base == 5e5 else 1)[rank].clone()
    if any(column in name for column in COLUMNS):
        return tensor.chunk(n, dim=1)[rank].clone()
    if name.endswith(("wk.weight", "wv.weight")) and n > config.n_kv_head:  # several ranks share a head
        return tensor.chunk(config.n_kv_head)[rank * config.n_kv_head // n].clone()
    return tensor.chunk(n, dim=0)[rank].clone()


def write_folder(folder: Path, config: LLaMAConfig, n: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(config, torch.float32))).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    params = {"dim": config.n_embd, "n_layers": config.n_layer, "n_heads": config.n_head, "norm_eps": config.norm_eps}
    params |= {"vocab_size": -1, "multiple_of": 256 if config.n_hidden == 256 else 64}
    if config.n_kv_head != config.n_head:
        params["n_kv_heads"] = config.n_kv_head
    if config.n_hidden == 192:
        params["ffn_dim_multiplier"] = 1.6  # int(1.6 * 85) = 136, then up to 3 * 64
    if config.rope_base == 5e5:
        params |= {"rope_theta": 5e5, "use_scaled_rope": config.rope_scaling is not None}
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    state = meta_state(model, config)
    for rank in range(n):
        shard = {name: part(name, tensor, rank, n, config) for name, tensor in state.items()}
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return model


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_it_gives_the_logits_of_transformers(config: LLaMAConfig, n_shards: int, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "meta", config, n_shards)
    convert_meta_checkpoint.main(tmp_path / "meta", tmp_path / "out")
    ours = load_model(tmp_path / "out" / "lit-llama.pth").eval()
    assert ours.config == config
    from_transformers = from_hf(model.state_dict().items(), config, torch.float32)
    assert all(torch.equal(tensor, from_transformers[name]) for name, tensor in ours.state_dict().items())
    idx = torch.randint(config.vocab_size, (2, 80))
    torch.testing.assert_close(ours(idx), model(idx).logits, atol=1e-4, rtol=0)


def test_published_lengths_are_those_of_the_named_configs() -> None:
    for name, config in CONFIGS.items():
        if not name.startswith(("SmolLM2", "TinyLlama")):
            assert published_length(config) == config.block_size, name


def test_a_query_key_or_value_that_is_missing_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "meta", VARIANTS["Llama 2"], 1)
    path = tmp_path / "meta" / "consolidated.00.pth"
    shard = torch.load(path)
    del shard["layers.1.attention.wk.weight"]
    torch.save(shard, path)
    with pytest.raises(UserError, match=r"lacks layers\.1\.attention\.wk\.weight"):
        convert_meta_checkpoint.main(tmp_path / "meta", tmp_path / "out")


def test_wrong_folders_end_in_one_line_and_leave_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "meta", VARIANTS["Llama 2"], 2)
    folder, out = tmp_path / "meta", tmp_path / "out"

    def message() -> str:
        text = run_script("convert_meta_checkpoint", "--checkpoint_dir", folder, "--out_dir", out)
        assert text is not None
        assert text.startswith("error: ")
        assert "\n" not in text
        assert not out.exists()
        return text

    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    whole, params = second.read_bytes(), (folder / "params.json").read_text()
    second.write_bytes(whole[:-1000])
    assert str(second) in message()
    second.unlink()
    assert "missing" in message()
    second.write_bytes(whole)
    first.rename(folder / "hidden")
    assert f"{first} is missing" in message()
    (folder / "hidden").rename(first)
    state = torch.load(second, weights_only=True)
    torch.save({name: t for name, t in state.items() if "wo" not in name}, second)
    assert str(second) in message()
    second.write_bytes(whole)
    (folder / "params.json").write_text(params.replace('"n_layers": 2', '"n_layers": 1'))
    assert "layers.1" in message()
    (folder / "params.json").write_text("{}")
    assert str(folder) in message()
    (folder / "params.json").unlink()
    assert "params.json" in message()
    (folder / "params.json").write_text(params)
    assert run_script("convert_meta_checkpoint", "--checkpoint_dir", folder, "--out_dir", out) is None
    assert out.exists()


@pytest.mark.slow
def test_memory_holds_the_output_and_one_shard(tmp_path: Path) -> None:
    config = replace(TINY, n_kv_head=4, n_embd=512, n_hidden=2048, n_layer=12, vocab_size=8000)
    write_folder(tmp_path / "tiny", VARIANTS["LLaMA 1"], 1)
    write_folder(tmp_path / "meta", config, 4)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params | {"ffn_dim_multiplier": 1.5}))
    peak = peak_of_conversion("convert_meta_checkpoint", tmp_path / "tiny", tmp_path / "meta", tmp_path / "out")
    size = (tmp_path / "out" / "lit-llama.pth").stat().st_size
    shard = (tmp_path / "meta" / "consolidated.00.pth").stat().st_size
    assert size > 150e6
    assert 0.9 * size < peak < size + shard + 20e6
