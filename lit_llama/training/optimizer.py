"""The learning rate over a run, the norm of gradients, and AdamW whose moments take half the memory."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llama.training.distributed import whole_tensor

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

LRSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """It rises to `value` in the first `warmup_steps` of `n_steps` optimizer steps, then stays there or falls to 0."""

    value: float
    warmup_steps: int
    schedule: LRSchedule
    n_steps: int

    def at(self, step: int) -> float:
        """The learning rate of an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return self.value * (step + 1) / self.warmup_steps
        left = (self.n_steps - step) / max(1, self.n_steps - self.warmup_steps)  # from 1 down to nearly 0
        return (
            self.value * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]
        )

    def __str__(self) -> str:
        highest = max(map(self.at, range(self.n_steps)), default=0.0)
        return f"{self.schedule} learning rate, at most {highest:.3g} (warm-up: {self.warmup_steps} steps)"


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """The norm of all gradients taken together; if it is more than `max_norm`, they are scaled down to that."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return float(whole_tensor(norm))


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
