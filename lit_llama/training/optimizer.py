"""An optimizer step: its learning rate, loss and gradients, and AdamW whose moments take half the memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lit_llama.data.batches import Step
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.training.log import TrainingLog

import torch
from lightning import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

LRSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """It rises to `value` in the first `warmup_steps` of `n_steps` optimizer steps, then stays there or falls to 0.

    The warm-up takes at most the part `longest_warmup` of the run, so that a short run reaches its rate, too.
    """

    value: float
    warmup_steps: int
    schedule: LRSchedule
    n_steps: int
    longest_warmup: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "warmup_steps", min(self.warmup_steps, int(self.longest_warmup * self.n_steps)))

    def at(self, step: int) -> float:
        """The learning rate of an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return self.value * (step + 1) / self.warmup_steps
        left = (self.n_steps - step) / max(1, self.n_steps - self.warmup_steps)  # from 1 down to nearly 0
        if self.schedule == "linear":
            return self.value * left
        if self.schedule == "cosine":
            return self.value * (1 - math.cos(math.pi * left)) / 2
        return self.value

    def __str__(self) -> str:
        return f"{self.schedule} learning rate, at most {self.value:.3g} (warm-up: {self.warmup_steps} steps)"


def clip_gradients(fabric: Fabric, model: nn.Module, optimizer: Any, max_norm: float | None) -> float:
    """The norm of all gradients taken together; if it is more than `max_norm`, they are scaled down to that.

    In float16, where the loss is scaled so that small gradients do not vanish, they are scaled back first.
    """
    norm: Any = fabric.clip_gradients(model, optimizer, max_norm=max_norm or math.inf, error_if_nonfinite=False)
    return float(whole_tensor(norm))


def sum_over_devices(fabric: Fabric, value: torch.Tensor) -> float:
    """The sum of a number that each device has."""
    total: Any = fabric.all_reduce(value, reduce_op="sum")
    return float(total)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in one piece; called by all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class StepCheck:
    """Looks at each step before it is taken: at its loss and at the gradients, which are the same on all devices."""

    def __init__(self, log: TrainingLog, model: LLaMA, precision: Any = None) -> None:
        """`precision` is Fabric's, which in float16 scales the loss, and skips steps until the scale is right."""
        self.log, self.model, self.scaler = log, model, getattr(precision, "scaler", None)
        self.mean: float | None = None  # of the latest losses

    def __call__(self, data: Step, step: int, loss: float, norm: float) -> None:
        """Report a loss that has shot up; raise a UserError if it or the norm of the gradients is inf or nan."""
        records = ", ".join(map(str, sorted(data.dataset.index[data.records])[:8]))
        records = f"records {records}{' and others' if data.n_records > 8 else ''} (counted from 0, as prepared)"
        if math.isfinite(loss) and not math.isfinite(norm) and self.scaler and self.scaler.get_scale() > 1:
            self.log.say(f"step {step + 1} is skipped: its gradient is too large for float16: the loss is scaled down")
        elif not math.isfinite(loss + norm):
            what = f"the loss of step {step + 1} is {loss:.4g}, its gradient's norm {norm:.4g}, so it was not taken"
            remedy = f"what was saved stays: use --resume auto with a lower --learning_rate, or look at {records}"
            for name, tensor in self.model.named_parameters():
                if not whole_tensor(tensor).isfinite().all():
                    remedy = f"{name} is not finite either: the weights were damaged before this step"
            raise UserError(f"{what}; {remedy}")
        if self.mean is not None and loss > 10 * self.mean:
            found = f"the loss of step {step + 1} is {loss:.4g}, after {self.mean:.4g} on average"
            self.log.say(f"warning: {found}: {records}")
        self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss


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
