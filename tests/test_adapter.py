"""LLaMA-Adapter against the formula written out, and together with LoRA."""

import math
from dataclasses import replace
from pathlib import Path

from lit_llama.adapter import (
    AdapterConfig,
    adapter_state_dict,
    add_adapter,
    cache_prefix,
    mark_only_adapter_as_trainable,
)
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.lora import LoRAConfig, add_lora, lora_state_dict, merge_lora
from lit_llama.model import CONFIGS, LLaMA, LLaMAConfig
from lit_llama.prompt import STYLES

import pytest
import torch
from builders import TINY, random_model, randomize, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

HEADS = {"mha": replace(TINY, n_kv_head=4), "gqa": TINY, "mqa": replace(TINY, n_kv_head=1)}
CONFIG = AdapterConfig(prompt_length=5, start_layer=1)


def adapter_model(config: LLaMAConfig = TINY, adapter: AdapterConfig = CONFIG) -> LLaMA:
    """A random model with random prefixes and gates."""
    model = random_model(config)
    add_adapter(model, adapter)
    mark_only_adapter_as_trainable(model)
    randomize(adapter_state_dict(model), std=0.7)
    return model.eval()


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of x (heads, T, hs), one pair at a time."""
    out, hs = x.clone(), x.size(-1)
    for t in range(x.size(1)):
        for i in range(hs // 2):
            angle = t * base ** (-2 * i / hs)
            a, b = x[:, t, 2 * i], x[:, t, 2 * i + 1]
            out[:, t, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def written_out(model: LLaMA, idx: Tensor, adapter: AdapterConfig) -> Tensor:
    """The logits (T, V) of idx (T,) from the papers' formulas and the state dict alone, in float64."""
    c = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    hs, T, group = c.head_size, len(idx), c.n_head // c.n_kv_head

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, hs).transpose(0, 1)

    x = w["transformer.wte.weight"][idx]
    for i in range(c.n_layer):
        p = f"transformer.h.{i}."
        wq, wk, wv = w[p + "attn.c_attn.weight"].split(c.qkv_sizes)
        h = norm(x, w[p + "rms_1.scale"])
        q, k, v = rotate(heads(h @ wq.T), c.rope_base), rotate(heads(h @ wk.T), c.rope_base), heads(h @ wv.T)
        y = []
        for head in range(c.n_head):
            scores = q[head] @ k[head // group].T / math.sqrt(hs)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            out = scores.softmax(-1) @ v[head // group]
            if i >= adapter.start_layer:
                prefix = w[p + "attn.adapter_wte.weight"]
                ak, av = heads(prefix @ wk.T)[head // group], heads(prefix @ wv.T)[head // group]
                gate = w[p + "attn.gating_factor"][0, head, 0, 0]
                out = out + gate * (q[head] @ ak.T / math.sqrt(hs)).softmax(-1) @ av
            y.append(out)
        x = x + torch.cat(y, dim=-1) @ w[p + "attn.c_proj.weight"].T
        h = norm(x, w[p + "rms_2.scale"])
        h = F.silu(h @ w[p + "mlp.c_fc1.weight"].T) * (h @ w[p + "mlp.c_fc2.weight"].T)
        x = x + h @ w[p + "mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.scale"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("start_layer", [0, 1])
@torch.no_grad()
def test_logits_equal_the_formula_written_out(heads: str, start_layer: int) -> None:
    adapter = AdapterConfig(prompt_length=5, start_layer=start_layer)
    model = adapter_model(HEADS[heads], adapter)
    idx = torch.randint(TINY.vocab_size, (2, 17))
    expected = torch.stack([written_out(model, row, adapter) for row in idx])
    torch.testing.assert_close(model(idx).double(), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(random_model(HEADS[heads])(idx).double(), expected, atol=0.05)


@torch.no_grad()
def test_training_starts_at_the_pretrained_model() -> None:
    idx = torch.randint(TINY.vocab_size, (2, 9))
    model = random_model(TINY)
    expected = model(idx)
    add_adapter(model, CONFIG)
    assert torch.equal(model(idx), expected)


def test_only_the_adapter_is_trained_and_the_base_stays_bit_equal() -> None:
    model = adapter_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randint(TINY.vocab_size, (2, 9))).square().sum().backward()
    optimizer.step()
    trained = set(adapter_state_dict(model))
    assert trained == {f"transformer.h.1.attn.{name}" for name in ("adapter_wte.weight", "gating_factor")}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


def test_7b_trains_30_layers_of_10_vectors_and_32_gates() -> None:
    with torch.device("meta"):
        model = LLaMA(CONFIGS["7B"])
    add_adapter(model, AdapterConfig())
    mark_only_adapter_as_trainable(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 30 * (10 * 4096 + 32) == 1_229_760
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    assert shapes["transformer.h.2.attn.gating_factor"] == (1, 32, 1, 1)
    assert shapes["transformer.h.31.attn.adapter_wte.weight"] == (10, 4096)
    assert len(shapes) == 60


@torch.no_grad()
def test_cached_generation_equals_uncached() -> None:
    model = adapter_model()
    idx = torch.randint(TINY.vocab_size, (1, 20))
    expected = model(idx)
    cache_prefix(model)
    cache = model.new_cache(1, 20)
    parts = [model(part, cache) for part in idx.split([12, 1, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


def test_validation_after_a_step_equals_a_freshly_loaded_model(tmp_path: Path) -> None:
    model = adapter_model()
    idx = torch.randint(TINY.vocab_size, (1, 20))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with torch.no_grad():
        before = model(idx)
    model(idx).square().mean().backward()
    optimizer.step()
    save_file(tmp_path / "a.pth", CONFIG, model, adapter_state_dict(model), "plain")
    fresh = random_model(TINY)
    file = read_finetuned(tmp_path / "a.pth", "adapter")
    file.add_to(fresh)
    assert file.prompt_style == STYLES["plain"]
    with torch.no_grad():
        assert torch.equal(model(idx), fresh(idx))
        assert not torch.allclose(model(idx), before, atol=1e-3)


@pytest.mark.parametrize("lora_first", [False, True])
@torch.no_grad()
def test_it_composes_with_lora(lora_first: bool) -> None:
    """Prefix and text go through the same updated layers, in whichever order the two were added, merged or not."""
    lora = LoRAConfig(r=2, dropout=0.0, targets=("key", "value", "projection"))
    model = random_model(TINY)
    for add in (add_lora, add_adapter) if lora_first else (add_adapter, add_lora):
        add(model, lora if add is add_lora else CONFIG)
    randomize(lora_state_dict(model))
    randomize(adapter_state_dict(model), std=0.7)
    idx = torch.randint(TINY.vocab_size, (1, 13))
    unmerged = model.eval()(idx)
    merge_lora(model)
    torch.testing.assert_close(model(idx), unmerged, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(idx)[0].double(), written_out(model, idx[0], CONFIG), atol=1e-4, rtol=0)


def test_a_file_of_another_kind_or_model_is_refused(tmp_path: Path) -> None:
    model = adapter_model()
    path = tmp_path / "a.pth"
    save_file(path, CONFIG, model, adapter_state_dict(model), "plain")
    with pytest.raises(UserError, match="a different base model"):
        read_finetuned(path, "adapter").add_to(random_model(HEADS["mqa"]))
    save_file(path, AdapterConfig(7, 1), model, adapter_state_dict(model), "plain")
    with pytest.raises(UserError, match="adapter_wte"):
        read_finetuned(path, "adapter").add_to(random_model(TINY))
    save_file(path, LoRAConfig(), model, {}, "plain")
    with pytest.raises(UserError, match="--lora_path"):
        read_finetuned(path, "adapter").add_to(random_model(TINY))
    with pytest.raises(UserError, match="2 layers"):
        add_adapter(random_model(TINY), AdapterConfig(start_layer=2))
    with pytest.raises(UserError):
        AdapterConfig(prompt_length=0)


def test_forward_and_backward_trace_without_data() -> None:
    with FakeTensorMode(), torch.device("cpu"):
        model = LLaMA(TINY)
        add_adapter(model, CONFIG)
        mark_only_adapter_as_trainable(model)
        model(torch.zeros(2, 16, dtype=torch.int64), select=torch.arange(20)).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("gates", ["one a head", "one for all"])
@torch.no_grad()
def test_a_file_of_the_archived_lit_llama_is_read(gates: str, tmp_path: Path) -> None:
    """Prefix length and first layer are those of its tensors; its first versions had one gate for all heads."""
    model = adapter_model()
    state = adapter_state_dict(model)
    if gates == "one for all":
        for name in [name for name in state if name.endswith("gating_factor")]:
            state[name].fill_(0.7)
            state[name] = torch.tensor([0.7])
    torch.save(state, tmp_path / "lit-llama-adapter-finetuned.pth")
    loaded = random_model(TINY)
    file = read_finetuned(tmp_path / "lit-llama-adapter-finetuned.pth", "adapter")
    file.add_to(loaded)
    assert file.prompt_style == STYLES["alpaca-stanford"]
    idx = torch.randint(TINY.vocab_size, (1, 9))
    assert torch.equal(loaded(idx), model(idx))
    assert not torch.allclose(loaded(idx), random_model(TINY)(idx), atol=0.1)
