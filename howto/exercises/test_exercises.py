"""What checks exercises.py: pytest howto/exercises/test_exercises.py -k NAME, NAME as in the exercise's first word.

With EXERCISES=solutions in the environment, it checks solutions.py instead.
"""

import importlib
import os

from lit_llama.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, lora_state_dict, merge_lora
from lit_llama.model import LLaMA, LLaMAConfig

import pytest
import torch

answers = importlib.import_module(os.environ.get("EXERCISES", "exercises"))

C, R = 32, 3
CONFIG = LLaMAConfig(block_size=16, vocab_size=64, n_layer=1, n_head=4, n_embd=C, n_kv_head=2, n_hidden=48)
SIZES = CONFIG.qkv_sizes  # 32, 16, 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lora_model(config: LoRAConfig) -> LLaMA:
    """A model with LoRA, whose B is random: at zero it would hide mistakes."""
    model = LLaMA(CONFIG)
    add_lora(model, config)
    for tensor in lora_state_dict(model).values():
        tensor.normal_(std=0.2)
    return model.eval()


def fused_layer(*targets: str) -> LoRALinear:
    return lora_model(LoRAConfig(R, 2 * R, 0.0, targets)).transformer.h[0].attn.c_attn


def test_gradients_equal_those_of_autograd() -> None:
    x, W = torch.randn(C), torch.randn(20, C)
    A, B = torch.randn(R, C, requires_grad=True), torch.randn(20, R, requires_grad=True)
    h = W @ x + 0.5 * B @ A @ x
    h.retain_grad()
    h.square().sum().backward()
    dA, dB = answers.gradients(x, h.grad, A.detach(), B.detach(), 0.5)
    torch.testing.assert_close(dA, A.grad)
    torch.testing.assert_close(dB, B.grad)


def test_gradients_move_only_B_as_long_as_it_is_zero() -> None:
    dA, dB = answers.gradients(torch.randn(C), torch.randn(20), torch.randn(R, C), torch.zeros(20, R), 0.5)
    assert not dA.any()
    assert dB.any()


@pytest.mark.parametrize("r", [4, 16])
def test_scaling_is_by_the_root_of_the_rank(r: int) -> None:
    config = LoRAConfig(r, 8, 0.0, ("query", "mlp"))
    model = lora_model(config)
    idx = torch.randint(CONFIG.vocab_size, (1, 9))
    before = model(idx)
    answers.stabilize_rank(model, config)
    for _, layer in lora_layers(model):
        torch.testing.assert_close(layer.delta(), 8 / r**0.5 * layer.spread_B() @ layer.lora_A)
    after = model(idx)
    assert not torch.allclose(after, before, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(idx), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_rounded_once(dtype: torch.dtype) -> None:
    model = lora_model(LoRAConfig(R, 7, 0.0, ("projection",)))
    layer = model.transformer.h[0].attn.c_proj
    W, A, B = (tensor.detach().to(dtype) for tensor in (layer.weight, layer.lora_A, layer.lora_B))
    layer.weight.data, layer.lora_A.data, layer.lora_B.data = W, A, B
    before = W.clone(), A.clone(), B.clone()
    merged = answers.merge(W, A, B, 7 / R)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((W, A, B), before, strict=True))
    merge_lora(model)
    exact = W.double() + 7 / R * B.double() @ A.double()
    float32 = torch.finfo(torch.float32).eps * (W.double().abs() + 7 / R * B.double().abs() @ A.double().abs())
    rounded = torch.finfo(dtype).eps / 2 * exact.abs()  # once, to W's dtype
    for result in (merged, model.transformer.h[0].attn.c_proj.weight):
        assert result.dtype == dtype
        error = (result.double() - exact).abs()
        assert (error <= rounded + 4 * float32).all(), f"off by up to {error.max():.2g}"


def with_keys(two: LoRALinear) -> LoRALinear:
    """The layer that your answer makes of one that updates query and value."""
    three = fused_layer("query", "key", "value")
    three.weight = two.weight
    A, B = answers.add_keys(two.lora_A.detach(), two.lora_B.detach(), torch.randn(R, C), SIZES)
    three.lora_A.data.copy_(A)
    three.lora_B.data.copy_(B)
    return three


def test_keys_get_an_update_that_starts_at_zero() -> None:
    two, x = fused_layer("query", "value"), torch.randn(5, C)
    torch.testing.assert_close(with_keys(two)(x), two(x))


def test_keys_learn_from_the_first_step_on() -> None:
    three = with_keys(fused_layer("query", "value"))
    three(torch.randn(5, C))[:, SIZES[0] : SIZES[0] + SIZES[1]].sum().backward()  # a loss of the keys alone
    assert three.lora_B.grad[SIZES[0] : SIZES[0] + SIZES[1]].any()


def test_bug_is_mended() -> None:
    layer, x = fused_layer("query", "value"), torch.randn(2, 5, C)
    found = answers.update(x, layer.lora_A, layer.lora_B, layer.scaling, SIZES)
    torch.testing.assert_close(found, x @ layer.delta().T)
