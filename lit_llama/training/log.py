"""What a training run reports: a progress bar or plain lines, metrics.csv and loss.png."""

import csv
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from lit_llama.data.batches import Step
from lit_llama.device import peak_memory
from lit_llama.errors import UserError
from lit_llama.progress import on_terminal
from lit_llama.prompt import Message, encode, stop_ids
from lit_llama.storage.files import replacing, write_file
from lit_llama.tokenizer import Tokenizer

import numpy as np
import torch
from lightning import Fabric
from lightning.fabric.loggers import Logger
from torch import nn
from tqdm import tqdm

COLUMNS = (
    "step", "records", "tokens", "train_loss", "validation_loss",
    "learning_rate", "gradient_norm", "tokens_per_second", "memory_gb", "seconds",
)  # fmt: skip

WANDB = "lightning.pytorch.loggers.WandbLogger"
SAMPLE_TOKENS = 50  # of a sample answer
MOST_POINTS = 4000  # of a line in the picture, which is 960 pixels wide


def make_logger(name: str | None, out_dir: Path) -> Logger | None:
    """The logger of TensorBoard or Weights & Biases, or any of Lightning's by the full name of its class, such as
    lightning.pytorch.loggers.CometLogger."""
    if name is None:
        return None
    try:
        if name == "tensorboard":
            from lightning.fabric.loggers import TensorBoardLogger

            return TensorBoardLogger(out_dir, name="tensorboard", version="")  # a resumed run goes on in this folder
        module, _, class_name = {"wandb": WANDB}.get(name, name).rpartition(".")
        return getattr(import_module(module), class_name)(save_dir=out_dir)
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        remedies = {"tensorboard": "run: pip install -e '.[tensorboard]'", "wandb": "run: pip install wandb"}
        remedy = remedies.get(name, "give tensorboard, wandb or the full name of a class")
        raise UserError(f"--logger {name} is not available ({reason}); {remedy}") from None


class TrainingLog:
    """Reports each optimizer step and each validation. Only the first of several processes writes.

    A run that is resumed after `first_step` of `n_steps` goes on in its metrics.csv. `interval` is the number of steps
    between two lines, where there is no terminal that shows a bar; loggers are told the `settings`.
    """

    def __init__(
        self,
        fabric: Fabric,
        out_dir: Path,
        n_steps: int,
        first_step: int,
        interval: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.fabric, self.n_steps, self.first_step, self.interval = fabric, n_steps, first_step, interval
        self.path = out_dir / "metrics.csv"
        last = fabric.broadcast(cut_metrics(self.path, first_step) if first_step and fabric.is_global_zero else {})
        self.records, self.tokens = int(last.get("records", 0)), int(last.get("tokens", 0))
        self.seconds = last.get("seconds", 0.0)
        terminal = on_terminal() and fabric.is_global_zero
        self.bar = tqdm(total=n_steps, initial=first_step, unit="step", disable=not terminal, dynamic_ncols=True)
        self.started = self.last = time.perf_counter()
        self.training_seconds = 0.0
        for logger in fabric.loggers:
            logger.log_hyperparams(dict(settings or {}))
        if fabric.is_global_zero and not (first_step and self.path.is_file()):
            write_file(self.path, f"{','.join(COLUMNS)}\n")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.fabric.is_global_zero:
            tqdm.write(text, file=sys.stderr)

    def step(self, step: int, data: Step, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Report optimizer step `step` (counted from 1): what it learned from, and its mean loss per target."""
        now = time.perf_counter()
        speed = data.n_tokens / (now - self.last)
        self.training_seconds += now - self.last
        self.last = now
        self.records, self.tokens = self.records + data.n_records, self.tokens + data.n_tokens
        memory = peak_memory(self.fabric.device)
        values = {"train_loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        self._row(step, **values, tokens_per_second=speed, memory_gb=memory)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s, {memory:.1f} GB", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step % self.interval == 0 or step == self.n_steps):
            left = self.training_seconds / (step - self.first_step) * (self.n_steps - step)
            rates = f"{speed:.0f} tokens/s, {memory:.2f} GB, {tqdm.format_interval(left)} left"
            self.say(f"step {step}/{self.n_steps}: loss {loss:.4f}, {rates}")

    def validation(self, step: int, loss: float | None) -> None:
        """Report the validation loss after `step` steps, if there is one. The time it took is not training time."""
        if loss is not None:
            self._row(step, validation_loss=loss)
            perplexity = math.exp(min(loss, 99))
            self.say(f"step {step}/{self.n_steps}: validation loss {loss:.4f} (perplexity {perplexity:.2f})")
        self.last = time.perf_counter()

    @torch.no_grad()
    def sample(self, step: int, model: nn.Module, tokenizer: Tokenizer, template: str, prompt: str | None) -> None:
        """Show the greedy answer to a prompt, if there is one, and add it to samples.txt; no random number is drawn.

        A token is computed as in a validation, without a cache: on all devices, which may hold a share of the model.
        """
        if prompt is None:
            return
        ids, stop = encode(template, [Message("user", prompt)], tokenizer).ids, stop_ids(template, tokenizer)
        model.eval()
        for _ in range(SAMPLE_TOKENS):
            last = torch.tensor([len(ids) - 1], device=self.fabric.device)
            ids.append(int(model(torch.tensor([ids], device=self.fabric.device), select=last).argmax()))
        model.train()
        answer = tokenizer.stream(takewhile(lambda token: token not in stop, ids[-SAMPLE_TOKENS:]))
        self.say(line := f"step {step}: {''.join(answer)}")
        if self.fabric.is_global_zero:
            with open(self.path.with_name("samples.txt"), "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        self.last = time.perf_counter()

    def close(self, title: str) -> None:
        """Close the bar and draw loss.png, if matplotlib is installed."""
        self.bar.close()
        if self.fabric.is_global_zero:
            try:
                plot_losses(self.path, self.path.with_name("loss.png"), title)
            except (UserError, ValueError) as error:  # the run is complete without its picture
                self.say(f"warning: loss.png was not drawn ({error})")

    def _row(self, step: int, **values: float) -> None:
        seconds = self.seconds + time.perf_counter() - self.started
        row = {"step": step, "records": self.records, "tokens": self.tokens, **values, "seconds": seconds}
        self.fabric.log_dict(values, step)
        for logger in self.fabric.loggers:
            logger.save()  # now, since a run may be killed at any time
        if self.fabric.is_global_zero:
            cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(cells)


def cut_metrics(path: Path, step: int) -> dict[str, float]:
    """Cut off what follows the last row up to this step (steps that were not saved); returns that row."""
    content = path.read_bytes() if path.is_file() else b""
    end = len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        with suppress(ValueError):  # the header, or half a row
            cells = content[start:end].decode().split(",")
            row = dict(zip(COLUMNS, (float(cell or "nan") for cell in cells), strict=True))
            counts = [row[name] for name in ("step", "records", "tokens", "seconds")]
            if row["step"] <= step and cells[-1].endswith("\n") and all(map(math.isfinite, counts)):
                os.truncate(path, end)
                return row
        end = start
    return {}


def read_metrics(path: Path, *names: str) -> np.ndarray:
    """Columns of a metrics.csv, (columns, rows); nan where a row has no value."""
    columns = [COLUMNS.index(name) for name in names]
    rows = np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns, converters=lambda cell: float(cell or "nan"))
    return rows.reshape(-1, len(names)).T


def plot_losses(metrics: Path, path: Path, title: str) -> None:
    """Draw training and validation loss over the optimizer steps, and below them the norm of the gradients."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    names = "step", "train_loss", "validation_loss", "gradient_norm"
    steps, losses, validation, norms = read_metrics(metrics, *names)
    trained, validated = np.isfinite(losses), np.isfinite(validation)
    if total := trained.sum():
        n, shown = max(1, total // 10), slice(None, None, 1 + total // MOST_POINTS)
        x, y, rolling = steps[trained], losses[trained], steps[trained][n - 1 :]
        sums = np.cumsum([0, *y])  # np.convolve would take minutes for a long run
        means = (sums[n:] - sums[:-n]) / n
        axes.plot(x[shown], y[shown], color="#c9d8ea", linewidth=1, label="training, each step")
        axes.plot(rolling[shown], means[shown], color="#3a6ea5", linewidth=2, label=f"training, mean of {n} steps")
        below.plot(x[shown], norms[trained][shown], color="#7a7a7a", linewidth=1)
    axes.plot(steps[validated], validation[validated], color="#c0392b", linewidth=2, marker="o", label="validation")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i in np.flatnonzero(validated)[[0, -1]] if validated.any() else ():
        text, point = f"{validation[i]:.2f}", (steps[i], validation[i])
        axes.annotate(text, point, (0, 9), textcoords="offset points", ha="center", bbox=box)
    axes.set(title=title, ylabel="cross-entropy per response token (nats)")
    below.set(xlabel="optimizer step", ylabel="gradient norm", ylim=(0, None))
    axes.margins(y=0.1)
    for plot in (axes, below):
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as part:
        figure.savefig(part, format="png")
