"""The training state of a run: written every few steps, so that an interrupted run can continue.

`out_dir`/training-state.pth holds what a file of finetuned weights holds (see `lit_llama/finetuned.py`), the steps
done, the best validation so far and the optimizer's state. It is the same file whether one process computes or many:
sharded tensors are gathered one by one as they are written, and each process reads the rows that it stores. So a run
may continue on another number of devices.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import UserError
from lit_llama.finetuned import read_described, save_finetuned
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import check_base, check_state, save_model_folder
from lit_llama.storage import files
from lit_llama.storage.checks import check_types, from_fields
from lit_llama.storage.files import named_tensors, write_tensors
from lit_llama.training.optimizer import whole_tensor
from lit_llama.training.run import fill

import torch
import torch.distributed as dist
from lightning import Fabric
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

STATE_FILE = "training-state.pth"
Resume = bool | Literal["auto"]  # auto: continue a run if there is one
MAY_CHANGE = (  # may change on resume; everything else must not
    "learning_rate", "num_epochs", "max_steps", "warmup_steps", "warmup_epochs", "lr_schedule", "eval_interval",
    "save_interval", "log_interval", "devices", "num_nodes", "strategy", "activation_checkpointing", "compile",
    "logger", "patience", "base", "base_values", "base_path", "micro_batch_size", "micro_batch_tokens",
    "sample_prompt",
)  # fmt: skip


class TrainingState:
    """What was saved of the run in `out_dir`, if it is resumed, and the place to save it."""

    def __init__(
        self,
        fabric: Fabric,
        out_dir: Path,
        results: Sequence[str],
        settings: Mapping[str, Any],
        resume: Resume,
        dry_run: bool = False,
    ) -> None:
        """Refuses to write over a run or files named as its `results`, and to resume a run with other settings.

        A dry run writes nothing, and so does not lock the folder. The last of `results` is written during the run: if
        that was interrupted before it had saved a state, `resume` "auto" writes over it.
        """
        self.fabric, self.path = fabric, out_dir / STATE_FILE
        self.saved: dict[str, Any] = {}
        if resume == "auto":
            resume = fabric.broadcast(self.path.is_file())
            results = results[:-1]
        if resume and not self.path.is_file():
            raise UserError(f"{self.path} does not exist, so there is no run to resume")
        if not dry_run:
            on_first_process(fabric, files.lock_output_folder, out_dir)
        if resume:
            on_first_process(fabric, files.read_file, self.path)  # once for all, its tensors too
            self.saved = read_described(self.path, check_tensors=False)
            check_settings(self.path, self.saved, settings)
        existing = [name for name in (STATE_FILE, *results) if (out_dir / name).exists() and not dry_run]
        if existing and not resume:
            remedy = "continue that run with --resume true, or " if STATE_FILE in existing else ""
            raise UserError(f"{out_dir} holds {existing[0]} already: {remedy}give another --out_dir")
        self.best: dict[str, Any] = self.saved.get("best", {"loss": math.inf, "step": 0, "waited": 0})

    def is_best(self, step: int, loss: float | None) -> bool:
        """Whether the validation loss after `step` steps, if there is one, is the lowest so far. It is remembered."""
        if loss is None:
            return False
        better = loss < self.best["loss"]
        waited = self.best["waited"] + 1
        self.best = {"loss": loss, "step": step, "waited": 0} if better else {**self.best, "waited": waited}
        return better

    @property
    def last_rate(self) -> float:
        """The learning rate of the last step before a resumed run."""
        return self.saved["optimizer"]["param_groups"][0]["lr"]

    def is_patience_over(self, patience: int | None) -> bool:
        """Whether the last `patience` validations were no better than the best."""
        return patience is not None and self.best["waited"] >= patience

    def is_complete(self, limits: Mapping[str, int], patience: int | None, *results: Path) -> bool:
        """Whether a resumed run has nothing left to do, not even to write its results; it then says how to go on.

        Args:
            limits: the flags that limit the number of steps, each with its limit.
            results: the files that a run writes last, after its last state, in this order.
        """
        step = self.saved.get("step", 0)
        reached = [flag for flag, n_steps in limits.items() if n_steps <= step]
        reached += ["--patience"] if self.is_patience_over(patience) else []
        times = [path.stat().st_mtime if path.is_file() else math.inf for path in (self.path, *results)]
        are_written = times == sorted(times) and math.isfinite(times[-1])
        complete = self.fabric.broadcast(bool(reached) and are_written)
        if complete and self.fabric.is_global_zero:
            line = f"nothing left to do: the run is complete after step {step}, and {results[0]} is written"
            print(f"{line}; to train on, raise {' and '.join(reached)}", file=sys.stderr)
            for path in results:
                files.lock_of(path).unlink(missing_ok=True)  # a killed run may have left it; this one has the folder
        return complete

    def recommend(self, last: Path, best: Path) -> tuple[Path, str]:
        """Which result to use, that of the last step or that of the best validation, and what there is to say of it."""
        loss, step = self.best["loss"], self.best["step"]
        if not math.isfinite(loss) or (step and not self.best["waited"]):
            return last, ""
        if step:
            return best, f"The best validation loss, {loss:.4f}, was that of step {step}: {best} has its weights.\n"
        return last, (
            f"warning: no validation loss was below {loss:.4f}, that of the base model before training; "
            "try a lower --learning_rate\n"
        )

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> int:
        """Put the trained weights and the optimizer back to what was saved, if anything; returns the steps done.

        Tensors are filled one by one and keep their dtype and sharding, so that this takes no more memory than a step.

        Raises:
            UserError: if there is no room for the state that the run will save, or what was saved does not fit.
        """
        size = 4 + 2 * getattr(optimizer, "moments_dtype", torch.float32).itemsize
        if self.path.parent.is_dir():  # a dry run makes none
            on_first_process(
                self.fabric, files.check_room, self.path.parent, size * sum(t.numel() for t in weights.values())
            )
        if not self.saved:
            return 0
        check_state(self.path, self.saved["state_dict"], weights)
        for name, parameter in weights.items():
            fill(parameter, self.saved["state_dict"][name])
        try:
            restore_moments(self.path, self.saved["optimizer"], optimizer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} does not hold this optimizer's state ({error!r}); copy it again") from None
        if self.saved.get("precision"):
            self.fabric.strategy.precision.load_state_dict(self.saved["precision"])
        return self.saved["step"]

    def save(self, step: int, metadata: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Write the state after `step` steps; `metadata` is what `describe` says of the weights."""
        content = {
            **metadata,
            "step": step,
            "best": self.best,
            "precision": self.fabric.strategy.precision.state_dict(),  # float16's scale of the loss
            "state_dict": dict(weights),
            "optimizer": optimizer.state_dict(),
        }
        write_gathered(self.fabric, partial(write_tensors, self.path, content), content)


def check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if not {"kind", "step", "optimizer"} <= saved.keys():
        raise UserError(f"{path} is not a training state")
    if saved["step"] < 1:
        raise UserError(f"{path} is of step {saved['step']}, expected 1 or more")
    for name, value in saved["hyperparameters"].items():
        if name not in MAY_CHANGE and settings.get(name) != value:
            raise UserError(f"cannot resume: the run of {path} has {name} {value}, not {settings.get(name)}")
    check_base(path, saved["hyperparameters"], settings, "resume with its own base model")


def restore_moments(path: Path, saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Put an optimizer back to the state that `path` holds."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, entry in saved["state"].items():
        shapes = {"exp_avg": trained[i], "exp_avg_sq": trained[i], "step": torch.empty(())}
        check_state(path, entry, {name: shapes[name] for name in {"exp_avg", "exp_avg_sq", *entry}})
        optimizer.state[trained[i]] = {name: room_for(tensor, trained[i]) for name, tensor in entry.items()}
        for name, tensor in entry.items():
            fill(optimizer.state[trained[i]][name], tensor)
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        check_types(theirs, {}, {name: type(value) for name, value in group.items()})
        group.update({name: value for name, value in theirs.items() if name != "params"})


def room_for(saved: Tensor, parameter: Tensor) -> Tensor:
    """An empty tensor for one of an optimizer's state, placed as the parameter that it belongs to."""
    is_count = saved.shape != parameter.shape  # of steps
    return torch.empty_like(saved if is_count else parameter, dtype=saved.dtype)


def save_weights(
    fabric: Fabric, path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a file of finetuned weights in `dtype`; called by all processes."""
    whole = {name: gathered(tensor, dtype) for name, tensor in weights.items()}
    on_first_process(fabric, save_finetuned, path, metadata, whole)


def save_model(
    fabric: Fabric,
    folder: Path,
    metadata: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    texts: Mapping[str, bytes | str],
) -> None:
    """Write a model in `dtype` with `texts`, the tokenizer's files; called by all processes."""
    config, style = from_fields(LLaMAConfig, metadata["base"]), metadata["prompt_style"]
    layout = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.items()}
    write_gathered(fabric, partial(save_model_folder, folder, layout, config, texts, style), weights, dtype)


def write_gathered(
    fabric: Fabric, write: Callable[..., None], content: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Have the first process write the tensors in `content`, in `dtype` if that is given; called by all processes.

    Sharded ones are gathered one by one, so that no process holds more than the largest of them twice.
    """
    is_first = fabric.is_global_zero
    tensors = ((name, gathered(t, dtype)) for name, t in named_tensors(content) if is_first or isinstance(t, DTensor))

    def act() -> None:
        try:
            if is_first:
                write(tensors=tensors)
        finally:
            deque(tensors, maxlen=0)  # gathering takes all processes, to the end

    on_all_processes(fabric, act)


@torch.no_grad()
def gathered(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in one piece, on the CPU, and in `dtype` if that is given; called by all processes if it is sharded."""
    return whole_tensor(tensor).to("cpu", dtype)


def on_all_processes(fabric: Fabric, action: Callable[..., Any], *args: Any) -> None:
    """Do something on all processes. A UserError on any of them is raised on all."""
    problem = None
    try:
        action(*args)
    except UserError as error:
        problem = str(error)
    problems = [problem] * fabric.world_size
    if fabric.world_size > 1:
        dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UserError(problem)


def on_first_process(fabric: Fabric, action: Callable[..., Any], *args: Any) -> None:
    """Do something on one process alone, while the others wait. A UserError there is raised on all of them."""
    on_all_processes(fabric, action if fabric.is_global_zero else lambda *_: None, *args)
