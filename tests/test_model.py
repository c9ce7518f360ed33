"""The model against transformers' LlamaForCausalLM and against itself."""

from dataclasses import replace

from lit_llama.adapter import AdapterConfig, adapter_state_dict, add_adapter
from lit_llama.formats.huggingface import hf_config, to_hf
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig, RMSNorm, RopeScaling, rotary_table

import pytest
import torch
from builders import TINY, random_model, randomize
from transformers import LlamaConfig, LlamaForCausalLM

VARIANTS = {
    "mha": replace(TINY, n_kv_head=4),
    "gqa": TINY,
    "mqa": replace(TINY, n_kv_head=1),
    "tied": replace(TINY, tie_embeddings=True),
    "eps": replace(TINY, norm_eps=1e-2, rope_base=500.0),
    "llama3": replace(TINY, block_size=512, rope_base=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
}


def reference(model: LLaMA) -> LlamaForCausalLM:
    hf = LlamaForCausalLM(LlamaConfig(**hf_config(model.config, torch.float32)))
    hf.load_state_dict(to_hf(model.state_dict(), model.config), strict=True)
    return hf.eval()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(config: LLaMAConfig) -> None:
    model = random_model(config)
    idx = torch.randint(config.vocab_size, (2, 100))
    torch.testing.assert_close(model(idx), reference(model)(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_long_positions_equal_transformers() -> None:
    model = random_model(replace(TINY, block_size=2048, n_layer=1))
    idx = torch.randint(TINY.vocab_size, (1, 1500))
    torch.testing.assert_close(model(idx)[:, 256:], reference(model)(idx).logits[:, 256:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_cached_logits_equal_uncached(config: LLaMAConfig, fixed: bool) -> None:
    model = random_model(config)
    idx = torch.randint(config.vocab_size, (2, 30))
    expected = model(idx)
    cache = model.new_cache(2, 50)
    cache.length = torch.tensor(0) if fixed else 0
    parts = [model(part, cache) for part in idx.split([9, 1, 1, 7, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)
    assert cache.length == 30


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_padding_at_the_start_changes_nothing(adapter: bool, fixed: bool) -> None:
    """Prompts of 3, 11 and 1 tokens, each continued by 5, one at a time; what stands in the padding does not matter."""
    model = random_model(TINY)
    if adapter:
        add_adapter(model, AdapterConfig(4, 0))
        randomize(adapter_state_dict(model), std=0.7)
    lengths = (3, 11, 1)
    idx, n_pad = torch.randint(TINY.vocab_size, (3, 16)), torch.tensor([11 - n for n in lengths])
    cache = model.new_cache(3, 20)
    cache.length = torch.tensor(0) if fixed else 0
    parts = [model(part, cache, n_pad=n_pad) for part in idx.split([11, 1, 1, 1, 1, 1], dim=1)]
    logits = torch.cat(parts, dim=1)
    assert logits.isfinite().all()
    for row, start in enumerate(n_pad.tolist()):
        alone = model(idx[row : row + 1, start:])
        torch.testing.assert_close(logits[row : row + 1, start:], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_selected_logits_are_those_of_all() -> None:
    model = random_model(TINY)
    idx = torch.randint(TINY.vocab_size, (3, 12))
    select = torch.tensor([0, 5, 17, 35])
    torch.testing.assert_close(model(idx, select=select), model(idx).flatten(0, 1)[select])


@torch.no_grad()
def test_single_token_path_of_linear_equals_the_plain_one() -> None:
    model = random_model(TINY)
    layer = model.transformer.h[0].mlp.c_fc1
    x = torch.randn(1, 1, TINY.n_embd)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_recomputed_blocks_give_the_same_gradients_from_fewer_activations() -> None:
    idx = torch.randint(TINY.vocab_size, (2, 50))
    grads, stored = [], []
    for recompute in (False, True):
        model = random_model(TINY)
        model.recompute_blocks = recompute
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(idx).logsumexp(-1).sum()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        stored.append(sum(sizes))
    assert torch.equal(*grads)
    assert stored[1] < stored[0] / 2


def test_rotary_table_stays_float32_in_a_bfloat16_model() -> None:
    config = replace(TINY, block_size=4096, n_layer=1)
    table = rotary_table(config, torch.arange(2048))
    assert table.dtype == torch.float32
    assert len(table.unique(dim=0)) == 2048
    model = random_model(config).to(torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values())  # it is no buffer


def test_rms_norm_is_exact_for_tiny_and_bfloat16_inputs() -> None:
    for eps in (1e-6, 1e-5):
        norm = RMSNorm(64, eps)
        x = torch.randn(5, 64) * 1e-3
        expected = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=0)
        low = norm.to(torch.bfloat16)(x.bfloat16())
        assert low.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x.bfloat16()), low)
        x = x.bfloat16().double()
        expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(low.double(), expected, rtol=2**-8, atol=0)  # no worse than rounding the result


PARAMETERS = {  # in billions, as published
    "7B": 6.738,
    "13B": 13.016,
    "30B": 32.529,
    "65B": 65.286,
    "Llama-2-7B": 6.738,
    "Llama-2-13B": 13.016,
    "Llama-2-70B": 68.977,
    "TinyLlama-1.1B": 1.100,
    "Llama-3.1-8B": 8.030,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.213,
    "SmolLM2-135M": 0.1345,
    "SmolLM2-360M": 0.3618,
    "SmolLM2-1.7B": 1.711,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_of_published_models(name: str) -> None:
    with torch.device("meta"):
        model = LLaMA(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3)
