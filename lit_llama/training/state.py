"""The training state of a run: written every few steps, so that an interrupted run can continue.

`out_dir`/training-state.pth holds what a file of finetuned weights holds (see `lit_llama/finetuned.py`), the steps
done, the best validation so far and the optimizer's state.

If all weights are trained and sharded, their tensors and the optimizer's are in a folder beside it, named after the
step (see `lit_llama/training/shards.py`), and the file has its name and the checksums of its files. A new state gets a
new folder; it counts once the file names it, and only then is the old folder removed. While that happens, a list
(training-state.folders) says which folders are a run's own, so that no other is ever removed. A run may continue on
another number of devices.
"""

import itertools
import math
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import UserError, error_context, short
from lit_llama.finetuned import read_described, save_finetuned
from lit_llama.model import LLaMAConfig
from lit_llama.model_folder import check_state, untied, write_model
from lit_llama.storage.checks import check_types
from lit_llama.storage.files import check_finite, is_plain, read_text, remove_folder, write_file
from lit_llama.storage.integrity import check_base, size_and_digest
from lit_llama.storage.locks import check_room, exclusive_lock, lock_of, lock_output_folder
from lit_llama.training.distributed import fill, gathered, in_one_piece, on_all_processes, on_first_process
from lit_llama.training.shards import check_shards, describe_shards, read_shards, write_shards

import torch
from lightning import Fabric
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

STATE_FILE = "training-state.pth"
Resume = bool | Literal["auto"]  # auto: continue a run if there is one
MAY_CHANGE = (  # may change on resume; everything else must not
    "learning_rate", "num_epochs", "max_steps", "warmup_steps", "warmup_epochs", "lr_schedule", "eval_interval",
    "eval_records", "save_interval", "log_interval", "devices", "num_nodes", "strategy", "activation_checkpointing",
    "compile", "logger", "patience", "base", "base_path",
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
        self.shards: Path | None = None  # the folder that the state names
        self._list_of_folders = self.path.with_suffix(".folders")
        if resume == "auto":
            resume = fabric.broadcast(self.path.is_file())
            results = results[:-1]
        if resume and not self.path.is_file():
            raise UserError(f"{self.path} does not exist, so there is no run to resume")
        if not dry_run:
            on_first_process(fabric, lock_output_folder, out_dir)
        if resume:
            self.saved = read_described(self.path)
            check_settings(self.path, self.saved, settings)
            self._check_metrics()
            self._describe_shards()
        existing = [name for name in (STATE_FILE, *results) if (out_dir / name).exists() and not dry_run]
        if existing and not resume:
            remedy = "continue that run with --resume true, or " if STATE_FILE in existing else ""
            raise UserError(f"{out_dir} holds {existing[0]} already: {remedy}give another --out_dir")
        if not dry_run:
            on_first_process(fabric, self._tidy)
        self.best: dict[str, Any] = self.saved.get("best", {"loss": math.inf, "step": 0, "waited": 0})

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
                with exclusive_lock(lock_of(path), path):  # which removes what a killed run has left of it
                    pass
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

    def _metrics(self, size: int | None = None) -> str:
        """The length of metrics.csv, or of its first `size` bytes, and their sha256."""
        path = self.path.with_name("metrics.csv")
        return size_and_digest(path, size) if path.is_file() else "0"

    def _check_metrics(self) -> None:
        """Say so if metrics.csv does not begin as it was when the state was saved."""
        expected = self.saved.get("metrics", "")
        size = expected.partition(" ")[0]
        if size.isdecimal() and expected != self._metrics(int(size)) and self.fabric.is_global_zero:
            print(f"warning: {self.path.with_name('metrics.csv')} is damaged or was edited", file=sys.stderr)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> int:
        """Put the trained weights and the optimizer back to what was saved, if anything; returns the steps done.

        Tensors are filled one by one and keep their dtype and sharding, so that this takes no more memory than a step.

        Raises:
            UserError: if there is no room for the state that the run will save, or what was saved does not fit.
        """
        size = 4 + 2 * getattr(optimizer, "moments_dtype", torch.float32).itemsize
        if self.path.parent.is_dir():  # a dry run makes none
            on_first_process(self.fabric, check_room, self.path.parent, size * sum(t.numel() for t in weights.values()))
        if not self.saved:
            return 0
        tied = self.saved["base"].get("tie_embeddings", False)
        weights, state = untied(weights, tied), untied(self.saved["state_dict"], tied)
        moments = self.saved["optimizer"]
        check_state(self.path, state, weights)
        with error_context(self.path, "it may be damaged"):
            check_moments(moments, optimizer)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for i, entry in moments["state"].items():
            optimizer.state[trained[i]] = {name: room_for(tensor, trained[i]) for name, tensor in entry.items()}
        targets = named_tensors(weights, {i: optimizer.state[trained[i]] for i in moments["state"]})
        if self.shards:
            read_shards(self.shards, targets)
        else:
            for name, tensor in named_tensors(state, moments["state"]).items():
                fill(targets[name], tensor)
        for group, saved in zip(optimizer.param_groups, moments["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if self.saved.get("precision"):
            self.fabric.strategy.precision.load_state_dict(self.saved["precision"])
        return self.saved["step"]

    def save(self, step: int, about: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Write the state after `step` steps; `about` is what `describe` says of the weights."""
        progress: dict[str, Any] = {
            "step": step,
            "best": self.best,
            "metrics": self._metrics(),
            "precision": self.fabric.strategy.precision.state_dict(),  # float16's scale of the loss
        }
        sharded = about["kind"] == "full" and any(isinstance(tensor, DTensor) for tensor in weights.values())
        state, folder = optimizer.state_dict(), self._new_folder(step) if sharded else None
        own = [path.name for path in (self.shards, folder) if path]
        try:
            if own:
                on_first_process(self.fabric, write_file, self._list_of_folders, "\n".join(own))
            if folder:
                tensors = named_tensors(untied(weights, about["base"]["tie_embeddings"]), state["state"])
                progress |= {"folder": folder.name, "shards": self._write_shards(folder, tensors)}
                weights, state = {}, {**state, "state": {}}
            progress["optimizer"] = in_one_piece(state, self.fabric.is_global_zero)
            whole = in_one_piece(weights, self.fabric.is_global_zero)
            on_first_process(self.fabric, save_finetuned, self.path, {**about, **progress}, whole)
            self.shards = folder
        finally:
            if self.fabric.is_global_zero:
                self._tidy()

    def _new_folder(self, step: int) -> Path:
        """The folder for the tensors of this step, of a name that nothing has yet."""
        folder = self.path.with_name(f"{self.path.stem}-{step}")
        for i in itertools.count(2):
            if not folder.exists():
                return self.fabric.broadcast(folder)
            folder = self.path.with_name(f"{self.path.stem}-{step}-{i}")
        raise AssertionError

    def _write_shards(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        own = {name: tensor.to_local() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        on_all_processes(self.fabric, check_finite, self.path, own)
        return write_shards(folder, tensors)

    def _describe_shards(self) -> None:
        """If tensors are in a folder, check it and put their descriptions in their places."""
        if "shards" not in self.saved:
            return
        fabric, name = self.fabric, self.saved.get("folder", f"{self.path.stem}-{self.saved['step']}")
        with error_context(self.path, "it may be damaged"):
            check_types(self.saved["shards"], {}, dict.fromkeys(self.saved["shards"], str))
            if not self._may_be_own(name):
                raise UserError(f"folder is {short(name)}, expected a name like {self.path.stem}-100")
        self.shards = self.path.with_name(name)
        on_all_processes(fabric, check_shards, self.shards, self.saved["shards"], fabric.global_rank, fabric.world_size)
        self.saved["state_dict"], moments = {}, {}
        for name, tensor in describe_shards(self.shards).items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                self.saved["state_dict"][rest] = tensor
            else:
                i, _, moment = rest.partition(".")
                moments.setdefault(int(i) if i.isdecimal() else i, {})[moment] = tensor
        self.saved["optimizer"] = {**self.saved["optimizer"], "state": moments}

    def _may_be_own(self, name: str) -> bool:
        return re.fullmatch(r"-\d+(-\d+)?", name.removeprefix(self.path.stem)) is not None

    def _tidy(self) -> None:
        """Remove folders of tensors that the state does not name: the one before, and what a killed run had begun."""
        if self._list_of_folders.is_file():
            names = read_text(self._list_of_folders).splitlines()
            for folder in (self.path.with_name(name) for name in names if self._may_be_own(name)):
                if folder != self.shards:
                    remove_folder(folder)
            self._list_of_folders.unlink()


def check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if not {"kind", "step", "optimizer"} <= saved.keys():
        raise UserError(f"{path} is not a training state")
    if saved["step"] < 1:
        raise UserError(f"{path} is of step {saved['step']}, expected 1 or more")
    for name, value in saved["hyperparameters"].items():
        if name not in MAY_CHANGE and settings.get(name) != value:
            raise UserError(f"cannot resume: the run of {path} has {name} {value}, not {settings.get(name)}")
    check_base(path, saved["hyperparameters"], settings, "resume with its own base model")


def check_moments(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raise a UserError unless a state of AdamW has what this optimizer restores."""
    check_types(saved, {"state": Mapping, "param_groups": list}, {})
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, entry in saved["state"].items():
        if not isinstance(i, int) or not 0 <= i < len(trained) or not isinstance(entry, Mapping):
            raise UserError(f"the optimizer's state is of {short(i)}, expected one of {len(trained)} parameters")
        check_types(entry, {"exp_avg": Tensor, "exp_avg_sq": Tensor}, {"step": Tensor})
        for name, tensor in entry.items():
            shape = torch.Size() if name == "step" else trained[i].shape
            if not is_plain(tensor) or not tensor.is_floating_point() or tensor.shape != shape:
                raise UserError(f"{name} of parameter {i} is {short(tensor)}, expected one of {tuple(shape)}")
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise UserError(f"it has {len(saved['param_groups'])} groups of parameters")
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if not isinstance(theirs, Mapping):
            raise UserError(f"a group of parameters is {short(theirs)}, expected named values")
        for name, value in group.items():
            if name != "params" and not isinstance(theirs.get(name, value), type(value)):
                raise UserError(f"{name} of the optimizer is {short(theirs[name])}")


def room_for(saved: Tensor, parameter: Tensor) -> Tensor:
    """An empty tensor for one of an optimizer's state, placed as the parameter that it belongs to."""
    is_count = saved.shape != parameter.shape  # of steps
    return torch.empty_like(saved if is_count else parameter, dtype=saved.dtype)


def named_tensors(weights: Mapping[str, Tensor], moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of a state by one name each; `moments` are those of parameters by their numbers."""
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    return named | {f"optimizer.{i}.{name}": tensor for i, entry in moments.items() for name, tensor in entry.items()}


def save_weights(
    fabric: Fabric, path: Path, about: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a file of finetuned weights in `dtype`; called by all processes."""
    whole = {name: tensor.to(dtype) for name, tensor in in_one_piece(weights, fabric.is_global_zero).items()}
    on_first_process(fabric, save_finetuned, path, about, whole)


def save_model(
    fabric: Fabric, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, config: LLaMAConfig, *about: Any
) -> None:
    """Write a model's files in `dtype`; `about` is what else `write_model` takes. Called by all processes.

    Sharded weights are gathered and written one by one: no process holds more than the largest of them.
    """
    weights = untied(weights, config.tie_embeddings)
    with FakeTensorMode():
        layout = {name: torch.empty(tensor.shape, dtype=dtype) for name, tensor in weights.items()}
    pieces = ((name, gathered(tensor, dtype)) for name, tensor in weights.items())

    def write() -> None:
        try:
            if fabric.is_global_zero:
                write_model(folder, layout, config, *about, tensors=pieces)
        finally:
            deque(pieces, maxlen=0)  # gathering takes all processes, to the end

    on_all_processes(fabric, write)
