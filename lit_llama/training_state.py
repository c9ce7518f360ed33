"""The training state of a run: written every few steps, so that an interrupted run can continue.

`out_dir`/training-state.pth holds what a file of finetuned weights holds (see `lit_llama/finetuned.py`), the steps
done, the best validation so far and the optimizer's state. It is written in one piece, so a run may continue on a
different number of devices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor
from torch.optim import Optimizer

from lit_llama.checkpoint import check_state, write_model
from lit_llama.errors import UserError
from lit_llama.files import read_file
from lit_llama.finetuned import save_finetuned
from lit_llama.sharding import in_one_piece, shard_like

STATE_FILE = "training-state.pth"
MAY_CHANGE = (  # may change on resume; everything else must not
    "learning_rate", "num_epochs", "max_steps", "warmup_steps", "warmup_epochs", "lr_schedule", "eval_interval",
    "eval_records", "save_interval", "log_interval", "devices", "num_nodes", "strategy", "activation_checkpointing",
    "logger", "patience",
)  # fmt: skip
VERSION = 2  # of the schedule of batches; states that do not say are of version 1


class TrainingState:
    """What was saved of the run in `out_dir`, if it is resumed, and the place to save it."""

    def __init__(
        self, fabric: Fabric, out_dir: Path, results: Sequence[str], settings: Mapping[str, Any], resume: bool
    ) -> None:
        """Refuses to write over a run or files named as its `results`, and to resume a run with other settings."""
        self.fabric, self.path = fabric, out_dir / STATE_FILE
        self.saved: dict[str, Any] = {}
        if resume:
            self.saved = read_file(self.path)
            check_settings(self.path, self.saved, settings)
        existing = [name for name in (STATE_FILE, *results) if (out_dir / name).exists()]
        if existing and not resume:
            remedy = "continue that run with --resume true, or " if STATE_FILE in existing else ""
            raise UserError(f"{out_dir} holds {existing[0]} already: {remedy}give another --out_dir")
        self.version: int = self.saved.get("version", 1) if resume else VERSION
        self.best: dict[str, float] = self.saved.get("best", {"loss": math.inf, "step": 0, "waited": 0})

    def limit_warmup(self, steps: int, last_step: int) -> int:
        """At most a tenth of the run, lest the learning rate never rise in a short one (version 1.0 had no limit)."""
        return steps if self.version == 1 else min(steps, last_step // 10)

    def is_best(self, step: int, loss: float | None) -> bool:
        """Whether the validation loss after `step` steps, if there is one, is the lowest so far. It is remembered."""
        if loss is None:
            return False
        better = loss < self.best["loss"]
        waited = self.best["waited"] + 1
        self.best = {"loss": loss, "step": step, "waited": 0} if better else {**self.best, "waited": waited}
        return better

    def is_patience_over(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were no better than the best."""
        return patience is not None and self.best["waited"] >= patience

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> int:
        """Put the trained weights and the optimizer back to what was saved, if anything; returns the steps done.

        Tensors are filled one by one and keep their dtype and sharding, so that this takes no more memory than a step.
        """
        if not self.saved:
            return 0
        state, moments = self.saved["state_dict"], self.saved["optimizer"]
        check_state(self.path, state, weights)
        for name, tensor in weights.items():
            tensor.copy_(shard_like(state[name], tensor))
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for i, entry in moments["state"].items():
            optimizer.state[trained[i]] = {name: restored(tensor, trained[i]) for name, tensor in entry.items()}
        for group, saved in zip(optimizer.param_groups, moments["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        return self.saved["step"]

    def save(self, step: int, about: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Write the state after `step` steps; `about` is what `describe` says of the weights."""
        state = in_one_piece(optimizer.state_dict(), self.fabric.is_global_zero)
        progress = {"version": self.version, "step": step, "best": self.best, "optimizer": state}
        whole = in_one_piece(weights, self.fabric.is_global_zero)
        on_first_process(self.fabric, save_finetuned, self.path, {**about, **progress}, whole)


def check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if not {"step", "optimizer", "hyperparameters", "state_dict"} <= saved.keys():
        raise UserError(f"{path} is not a training state")
    for name, value in saved["hyperparameters"].items():
        if name not in MAY_CHANGE and settings.get(name) != value:
            raise UserError(f"cannot resume: the run of {path} has {name} {value}, not {settings.get(name)}")


def restored(saved: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of an optimizer's state, placed as the parameter that it belongs to."""
    if saved.shape != parameter.shape:  # a count of steps
        return saved.clone()
    return torch.empty_like(parameter, dtype=saved.dtype).copy_(shard_like(saved, parameter))


def on_first_process(fabric: Fabric, action: Callable[..., None], *args: Any) -> None:
    """Do something on one process alone, while the others wait. A UserError there is raised on all of them."""
    problem = None
    if fabric.is_global_zero:
        try:
            action(*args)
        except UserError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem:
        raise UserError(problem)


def save_weights(
    fabric: Fabric, path: Path, about: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a file of finetuned weights in `dtype`; called by all processes."""
    on_first_process(fabric, save_finetuned, path, about, whole_weights(fabric, weights, dtype))


def save_model(fabric: Fabric, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, *about: Any) -> None:
    """Write a model's files in `dtype`; `about` is what else `write_model` takes. Called by all processes."""
    on_first_process(fabric, write_model, folder, whole_weights(fabric, weights, dtype), *about)


def whole_weights(fabric: Fabric, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in one piece, in `dtype`, on the first process; called by all."""
    whole = in_one_piece(weights, fabric.is_global_zero)
    return {name: tensor.to(dtype) for name, tensor in whole.items()}
