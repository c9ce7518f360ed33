import copy

from lit_llama.training.optimizer import AdamW, LearningRate, clip_gradients
from lit_llama.training.run import fill
from lit_llama.training.state import room_for

import pytest
import torch
from lightning import Fabric
from torch import nn

SCHEDULES = ("constant", "linear", "cosine")


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]


def take_steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1 + 10 * (step == 7))
        optimizer.step()


def test_the_rate_rises_and_then_stays_or_falls_to_zero() -> None:
    constant, linear, cosine = ([LearningRate(1, 2, kind, 10, 0.2).at(i) for i in range(10)] for kind in SCHEDULES)
    assert constant == [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert linear == pytest.approx([0.5, 1, *(1 - i / 8 for i in range(8))])
    assert cosine[:3] == [0.5, 1, 1]
    assert cosine[6] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    assert LearningRate(2, 0, "cosine", 1).at(0) == 2


def test_the_warm_up_takes_a_part_of_the_run_at_most_so_that_the_rate_is_reached() -> None:
    assert str(LearningRate(3e-4, 100, "constant", 15)) == "constant learning rate, at most 0.0003 (warm-up: 1 steps)"
    assert LearningRate(3e-4, 100, "constant", 2000).warmup_steps == 100
    assert LearningRate(1e-3, 206, "cosine", 103, longest_warmup=0.4).warmup_steps == 41


def test_gradients_are_clipped_as_torch_does_and_the_norm_is_that_before() -> None:
    ours, theirs = parameters(), parameters()
    for parameter in (*ours, *theirs):
        parameter.grad = 3 * parameter.detach()
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(ours, lr=1.0))

    def clip(max_norm: float | None) -> float:
        return clip_gradients(fabric, nn.ParameterList(ours), optimizer, max_norm)

    norm = torch.cat([parameter.grad.flatten() for parameter in ours]).norm().item()
    assert clip(None) == pytest.approx(norm)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert clip(0.5) == pytest.approx(norm)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    assert clip(None) == pytest.approx(0.5, rel=1e-4)


def test_with_float32_moments_it_equals_torch() -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    take_steps(AdamW(ours, **settings, moments_dtype=torch.float32), ours, 0, 20)
    take_steps(torch.optim.AdamW(theirs, **settings), theirs, 0, 20)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_with_bfloat16_moments_it_stays_near_torch() -> None:
    ours, theirs = parameters(), parameters()
    take_steps(AdamW(ours, lr=1e-2), ours, 0, 100)
    take_steps(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0), theirs, 0, 100)
    start = parameters()
    for one, other, origin in zip(ours, theirs, start, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * (other - origin).norm()


def test_small_updates_are_not_lost() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([parameter], lr=1e-6)
    for _ in range(100):
        parameter.grad = torch.ones(4)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 1 - 1e-4), rtol=0, atol=5e-6)


@pytest.mark.parametrize("moments_dtype", [torch.bfloat16, torch.float32])
def test_a_loaded_state_continues_bit_for_bit(moments_dtype: torch.dtype) -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, moments_dtype=moments_dtype)
    take_steps(optimizer, params, 0, 5)
    state, at_five = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    take_steps(optimizer, params, 5, 9)
    resumed = AdamW(at_five, lr=1e-2, moments_dtype=moments_dtype)
    for i, entry in state["state"].items():
        resumed.state[at_five[i]] = {name: room_for(tensor, at_five[i]) for name, tensor in entry.items()}
        for name, tensor in entry.items():
            fill(resumed.state[at_five[i]][name], tensor)
    resumed.param_groups[0]["step"] = state["param_groups"][0]["step"]
    assert resumed.state[at_five[0]]["exp_avg"].dtype == moments_dtype
    take_steps(resumed, at_five, 5, 9)
    assert all(torch.equal(one, other) for one, other in zip(params, at_five, strict=True))
