"""What a training run tells: a progress bar or plain lines, metrics.csv and loss.png."""

import csv
import io
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lit_llama.checkpoint import write_file

if TYPE_CHECKING:  # it takes seconds to import, and generation needs but `peak_memory`
    from lightning import Fabric

COLUMNS = (
    "step", "records", "tokens", "train_loss", "validation_loss",
    "learning_rate", "tokens_per_second", "memory_gb", "seconds",
)  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GB: on the GPU if it uses one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class TrainingLog:
    """Reports each optimizer step and each validation. Only the first of several processes writes.

    Args:
        out_dir: where metrics.csv goes; with `first_step` > 0 its rows up to there are kept and continued.
        n_steps: optimizer steps of the whole run.
        first_step: optimizer steps that were done before, in a run that is resumed.
        interval: steps between two lines, where there is no terminal to show a bar.
    """

    def __init__(self, fabric: "Fabric", out_dir: Path, n_steps: int, first_step: int, interval: int) -> None:
        self.fabric, self.n_steps, self.first_step, self.interval = fabric, n_steps, first_step, interval
        self.path = out_dir / "metrics.csv"
        rows = fabric.broadcast(read_metrics(self.path)) if first_step else []
        self.rows = [row for row in rows if row["step"] <= first_step]
        last = self.rows[-1] if self.rows else {}
        self.records, self.tokens = int(last.get("records", 0)), int(last.get("tokens", 0))
        self.seconds = last.get("seconds", 0.0)
        self.validated = {row["step"] for row in self.rows if "validation_loss" in row}
        terminal = sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0 and fabric.is_global_zero
        self.bar = tqdm(total=n_steps, initial=first_step, unit="step", disable=not terminal, dynamic_ncols=True)
        self.started = self.last = time.perf_counter()
        self.training_seconds = 0.0
        if fabric.is_global_zero:
            header = io.StringIO()
            csv.DictWriter(header, COLUMNS).writeheader()
            write_file(self.path, header.getvalue())
            for row in self.rows:
                self._append(row)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.fabric.is_global_zero:
            tqdm.write(text, file=sys.stderr)

    def step(self, step: int, loss: float, learning_rate: float, n_records: int, n_tokens: int) -> None:
        """Report optimizer step `step` (counted from 1): its mean loss per target, its records and unpadded tokens."""
        now = time.perf_counter()
        speed = n_tokens / (now - self.last)
        self.training_seconds += now - self.last
        self.last = now
        self.records, self.tokens = self.records + n_records, self.tokens + n_tokens
        memory = peak_memory(self.fabric.device)
        left = self.training_seconds / (step - self.first_step) * (self.n_steps - step)
        self._row(step, train_loss=loss, learning_rate=learning_rate, tokens_per_second=speed, memory_gb=memory)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s, {memory:.1f} GB", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (step % self.interval == 0 or step == self.n_steps):
            self.say(
                f"step {step}/{self.n_steps}: loss {loss:.4f}, {speed:.0f} tokens/s, {memory:.2f} GB, "
                f"{format_seconds(left)} left"
            )

    def validation(self, step: int, loss: float | None) -> None:
        """Report the validation loss after `step` steps, if there is one. The time it took is not training time."""
        if loss is not None:
            self.validated.add(step)
            self._row(step, validation_loss=loss)
            self.say(
                f"step {step}/{self.n_steps}: validation loss {loss:.4f} (perplexity {math.exp(min(loss, 99)):.2f})"
            )
        self.last = time.perf_counter()

    def close(self, title: str) -> None:
        """Take the bar down and draw loss.png, where matplotlib is there."""
        self.bar.close()
        if self.fabric.is_global_zero:
            plot_losses(self.rows, self.path.with_name("loss.png"), title)

    def _row(self, step: int, **values: float) -> None:
        seconds = self.seconds + time.perf_counter() - self.started
        row = {"step": step, "records": self.records, "tokens": self.tokens, **values, "seconds": seconds}
        self.rows.append(row)
        if self.fabric.is_global_zero:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        texts = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(texts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv, without the values that a row does not have."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, **{name: int(row[name]) for name in COLUMNS[:3]}} for row in rows if "seconds" in row]


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the optimizer steps."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (
        ("train_loss", "training", {"color": "#9db8d9", "linewidth": 1}),
        ("validation_loss", "validation", {"color": "#c0392b", "linewidth": 2, "marker": "o", "markersize": 4}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(title=title, xlabel="optimizer step", ylabel="cross-entropy per response token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
