"""What checks exercises.py: pytest howto/exercises/test_exercises.py -k NAME, NAME as in the exercise's first word.

With EXERCISES=solutions in the environment, it checks solutions.py instead.
"""

import copy
import importlib
import os

from lit_llama.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, lora_state_dict, merge_lora
from lit_llama.model import LLaMA, LLaMAConfig

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

answers = importlib.import_module(os.environ.get("EXERCISES", "exercises"))

C, R = 32, 3
ONE_KV_HEAD_FOR_TWO = LLaMAConfig(block_size=16, vocab_size=64, n_layer=1, n_head=4, n_embd=C, n_kv_head=2, n_hidden=48)
AS_MANY = LLaMAConfig(block_size=16, vocab_size=64, n_layer=1, n_head=4, n_embd=C, n_kv_head=4, n_hidden=48)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lora_model(config: LoRAConfig, base: LLaMAConfig = ONE_KV_HEAD_FOR_TWO) -> LLaMA:
    """A model with LoRA, whose B is random: at zero it would hide mistakes."""
    model = LLaMA(base)
    add_lora(model, config)
    for tensor in lora_state_dict(model).values():
        tensor.normal_(std=0.2)
    return model.eval()


def fused_layer(base: LLaMAConfig, *targets: str) -> LoRALinear:
    return lora_model(LoRAConfig(R, 2 * R, 0.0, targets), base).transformer.h[0].attn.c_attn


def test_layer_starts_as_the_linear_layer_and_learns_by_A_and_B_alone() -> None:
    linear, x = nn.Linear(C, 20, bias=False), torch.randn(5, C)
    expected = linear(x).detach()
    layer = answers.Layer(copy.deepcopy(linear), R, 7.0)
    assert_close(layer(x), expected)
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert sorted(tuple(parameter.shape) for parameter in trained.values()) == sorted([(R, C), (20, R)])
    A = next(parameter for parameter in trained.values() if parameter.shape == (R, C))
    B = next(parameter for parameter in trained.values() if parameter.shape == (20, R))
    layer(x).square().sum().backward()
    assert B.grad is not None
    assert B.grad.any(), "at A = 0 and B = 0 nothing is ever learned"
    B.data.normal_()
    assert_close(layer(x), expected + 7 / R * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    assert_close(layer.linear.weight, linear.weight)


def test_predict_is_what_a_step_shows() -> None:
    for shapes, r in (([(20, C), (48, 16)], 2), ([(8, 8)] * 3, 5)):
        linears = [nn.Linear(n_in, n_out, bias=False) for n_out, n_in in shapes]
        A = [nn.Parameter(torch.randn(r, linear.in_features)) for linear in linears]
        B = [nn.Parameter(torch.zeros(linear.out_features, r)) for linear in linears]
        before = copy.deepcopy([A, B])
        optimizer = torch.optim.AdamW([*A, *B], weight_decay=0.0)
        for linear, a, b in zip(linears, A, B, strict=True):
            x = torch.randn(4, linear.in_features)
            (linear(x) + x @ a.T @ b.T).square().sum().backward()
        optimizer.step()
        held = [t for p in (*A, *B) for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
        moved = [name for i, name in enumerate("AB") if any(map(differ, before[i], (A, B)[i]))]
        n_trained, n_bytes, first = answers.predict(shapes, r)
        assert n_trained == sum(p.numel() for p in (*A, *B))
        assert n_bytes == sum(t.numel() * t.element_size() for t in held)
        assert [first] == moved


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)


def test_gradients_equal_those_of_autograd() -> None:
    for scaling in (0.5, 1.7):
        x, W = torch.randn(C), torch.randn(20, C)
        A, B = torch.randn(R, C, requires_grad=True), torch.randn(20, R, requires_grad=True)
        h = W @ x + scaling * B @ A @ x
        h.retain_grad()
        h.square().sum().backward()
        with torch.inference_mode():  # in which autograd does not work
            dA, dB = answers.gradients(x, h.grad.clone(), A.detach().clone(), B.detach().clone(), scaling)
        assert_close(dA, A.grad, rtol=1e-4, atol=1e-4)
        assert_close(dB, B.grad, rtol=1e-4, atol=1e-4)


def test_gradients_move_only_B_as_long_as_it_is_zero() -> None:
    with torch.inference_mode():
        dA, dB = answers.gradients(torch.randn(C), torch.randn(20), torch.randn(R, C), torch.zeros(20, R), 0.5)
    assert not dA.any()
    assert dB.any()


def test_scaling_is_by_the_root_of_the_rank() -> None:
    for r, alpha in ((4, 8), (16, 5)):
        config = LoRAConfig(r, alpha, 0.0, ("query", "value", "mlp"))
        model = lora_model(config)
        idx = torch.randint(model.config.vocab_size, (1, 9))
        before = model(idx)
        answers.stabilize_rank(model, config)
        for _, layer in lora_layers(model):
            assert_close(layer.delta(), alpha / r**0.5 * layer.spread_B() @ layer.lora_A, rtol=1e-4, atol=1e-5)
        after = model(idx)
        assert not torch.allclose(after, before, atol=1e-3)
        merge_lora(model)
        assert_close(model(idx), after, atol=1e-4, rtol=1e-4)


def test_merge_is_rounded_once() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        W, A, B = (torch.randn(shape).to(dtype) for shape in ((20, C), (R, C), (20, R)))
        before = W.clone(), A.clone(), B.clone()
        merged = answers.merge(W, A, B, 7 / R)
        assert all(torch.equal(tensor, one) for tensor, one in zip((W, A, B), before, strict=True)), "W, A or B changed"
        assert merged.dtype == dtype
        exact = W.double() + 7 / R * B.double() @ A.double()
        float32 = torch.finfo(torch.float32).eps * (W.double().abs() + 7 / R * B.double().abs() @ A.double().abs())
        error = (merged.double() - exact).abs()
        rounded = torch.finfo(dtype).eps / 2 * exact.abs()  # once, to W's dtype
        assert (error <= rounded + 4 * float32).all(), f"off by up to {error.max():.2g}"


def with_keys(two: LoRALinear, base: LLaMAConfig) -> LoRALinear:
    """The layer that your answer makes of one that updates query and value."""
    three, new_A = fused_layer(base, "query", "key", "value"), torch.randn(R, C)
    three.weight = two.weight
    A, B = answers.add_keys(two.lora_A.detach(), two.lora_B.detach(), new_A, base.qkv_sizes)
    assert_close(A, torch.cat((two.lora_A[:R], new_A, two.lora_A[R:])))
    three.lora_A.data.copy_(A)
    three.lora_B.data.copy_(B)
    return three


def test_keys_get_an_update_that_starts_at_zero() -> None:
    for base in (ONE_KV_HEAD_FOR_TWO, AS_MANY):
        two, x = fused_layer(base, "query", "value"), torch.randn(5, C)
        assert_close(with_keys(two, base)(x), two(x), rtol=1e-4, atol=1e-5)


def test_keys_learn_from_the_first_step_on() -> None:
    three, n_query = with_keys(fused_layer(AS_MANY, "query", "value"), AS_MANY), AS_MANY.qkv_sizes[0]
    keys = slice(n_query, n_query + AS_MANY.qkv_sizes[1])
    three(torch.randn(5, C))[:, keys].sum().backward()  # a loss of the keys alone
    assert three.lora_B.grad[keys].any()


def test_phi_is_that_of_the_paper() -> None:
    A, other = torch.randn(4, C), torch.randn(6, C)
    mixed = torch.randn(4, 4) @ A  # the same span
    assert float(answers.phi(A, mixed, 4, 4)) == pytest.approx(1, abs=1e-4)
    V, V_other = (torch.linalg.svd(one.double())[2] for one in (A, other))
    for i, j in ((1, 1), (2, 5), (4, 3)):
        expected = (V[:i] @ V_other[:j].T).norm() ** 2 / min(i, j)
        assert float(answers.phi(A, other, i, j)) == pytest.approx(float(expected), abs=1e-4)


def test_bug_is_mended() -> None:
    for base in (ONE_KV_HEAD_FOR_TWO, AS_MANY):
        layer, x = fused_layer(base, "query", "value"), torch.randn(2, 5, C)
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        found = answers.update(x, A, B, layer.scaling, base.qkv_sizes)
        assert_close(found, x @ layer.delta().T, rtol=1e-4, atol=1e-4)
        half = answers.update(x.bfloat16(), A.bfloat16(), B.bfloat16(), layer.scaling, base.qkv_sizes)
        assert half.dtype == torch.bfloat16
        elsewhere = answers.update(x.to("meta"), A.to("meta"), B.to("meta"), layer.scaling, base.qkv_sizes)
        assert elsewhere.device.type == "meta"  # as on a GPU: all of it on the device of x


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.lora_A = nn.Parameter(torch.randn(2, 8))
        self.lora_B = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + x @ self.lora_A.T @ self.lora_B.T


def test_loop_trains_A_and_B_with_fresh_gradients_at_the_rate() -> None:
    model, batches = Toy(), [(torch.randn(4, 8), torch.randn(4, 6)) for _ in range(5)]
    expected, weight = copy.deepcopy(model), model.weight.detach().clone()
    expected.weight.requires_grad = False
    optimizer = torch.optim.AdamW([expected.lora_A, expected.lora_B], lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(x), y).backward()
        optimizer.step()
    answers.train(model, batches, 0.01)
    assert torch.equal(model.weight, weight), "the frozen weight has changed"
    assert_close(model.lora_A, expected.lora_A, rtol=0, atol=2e-3)  # with or without weight decay
    assert_close(model.lora_B, expected.lora_B, rtol=0, atol=2e-3)
