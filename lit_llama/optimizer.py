"""AdamW whose moments take half the memory, and the learning rate over a run."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

LRSchedule = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, n_steps: int, warmup_steps: int, schedule: LRSchedule) -> float:
    """What the learning rate is multiplied by in optimizer step `step` (from 0): it rises to 1, then stays or falls."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = (n_steps - step) / max(1, n_steps - warmup_steps)  # from 1 down to nearly 0
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101) that computes in the parameters' dtype and stores its moments in `moments_dtype`.

    In bfloat16, beta_2 must not be too near 1: at 0.999 a step changes the second moment by less than its last digit
    and is rounded away. At 0.95, with which LLaMA was pretrained (arXiv 2302.13971, section 2.3), it follows.
    """

    eps = 1e-8

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        moments_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "step": 0})
        self.moments_dtype = moments_dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            beta_1, beta_2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
                m = state["exp_avg"].to(parameter.dtype).lerp(parameter.grad, 1 - beta_1)
                v = state["exp_avg_sq"].to(parameter.dtype).lerp(parameter.grad.square(), 1 - beta_2)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                denominator = (v / (1 - beta_2 ** group["step"])).sqrt_().add_(self.eps)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta_1 ** group["step"]))
