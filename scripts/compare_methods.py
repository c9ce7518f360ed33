"""Compare base, LLaMA-Adapter, LoRA and full finetuning on one model and data set, or LoRA of several ranks.

Each is trained, evaluated and asked by the scripts that users run, one after the other.
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jsonargparse.typing import PositiveInt

from lit_llama.cli import run
from lit_llama.data import Dataset
from lit_llama.errors import UserError
from lit_llama.files import read_file, write_file
from lit_llama.log import read_metrics
from lit_llama.training_state import STATE_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

num_epochs: PositiveInt = 1
batch_size: PositiveInt = 4  # records an optimizer step
micro_batch_size: PositiveInt = 4  # records computed at once
block_size: PositiveInt = 512  # tokens; longer records are cut
adapter_learning_rate = 9e-3
lora_learning_rate = 1e-3
full_learning_rate = 1e-4
lora_r: PositiveInt = 8
lora_alpha_over_r: PositiveInt = 2  # the same for all ranks, so that the update is scaled the same way
lora_targets = "query,key,value,projection,mlp"
n_answers: PositiveInt = 39  # validation records that are answered, for ROUGE-L
max_new_tokens: PositiveInt = 100

ROOT = Path(__file__).parent.parent
QUESTIONS = (
    "Please explain how weight decay works",
    "What is overfitting, and how can I notice it?",
    "Why do we split data into a training set and a test set?",
)
COLUMNS = {  # of the table and the picture: title, digits, whether a bar's axis is logarithmic
    "parameters": ("trained parameters", 0, True),
    "file_mb": ("file (MB)", 1, True),
    "minutes": ("training (min)", 1, False),
    "memory_gb": ("peak memory (GB)", 2, False),
    "loss": ("validation loss", 3, False),
    "rouge_l": ("ROUGE-L", 1, False),
    "speed": ("generation (tokens/s)", 1, False),
}


@dataclass(frozen=True)
class Method:
    """What to train (nothing, for the base model) and the flags of its training script."""

    name: str
    kind: str
    flags: tuple[object, ...] = ()
    rank: int = 0

    def folder(self, out_dir: Path) -> Path:
        return out_dir / re.sub(r"\W+", "-", self.name).lower()


@dataclass
class Result:
    """The columns of the table, those of the training None for the base model, and the answers to QUESTIONS."""

    loss: float
    rouge_l: float
    speed: float
    answers: list[str]
    parameters: int | None = None
    file_mb: float | None = None
    minutes: float | None = None
    memory_gb: float | None = None


def main(
    data_dir: Path = Path("data/quickstart"),
    pretrained_path: Path = Path("checkpoints/lit-llama/SmolLM2-135M-Instruct/lit-llama.pth"),
    out_dir: Path = Path("out/comparison"),
    ranks: str | None = None,
) -> None:
    """Write comparison.md and comparison.png, or, with --ranks, ranks.md and ranks.png.

    What was trained in out_dir before, by the same settings, is not trained again; a run that was cut off goes on.

    Args:
        data_dir: What one of scripts/prepare_*.py wrote, with a validation split.
        pretrained_path: The checkpoint of the base model.
        out_dir: The folder to write; results of the training scripts go below it.
        ranks: LoRA of these ranks instead of the four methods, for example 1,2,4,8,16.
    """
    methods = lora_ranks(ranks) if ranks else four_methods()
    figure, results = new_figure(), {}
    for method in methods:
        print(f"# {method.name}", file=sys.stderr)
        results[method] = measure(method, pretrained_path, data_dir, method.folder(out_dir))
    picture = out_dir / ("ranks.png" if ranks else "comparison.png")
    write_file(picture.with_suffix(".md"), report(results, pretrained_path, data_dir, picture.name))
    (draw_ranks if ranks else draw_methods)(figure, results)
    figure.suptitle(f"{pretrained_path.parent.name}, {len(Dataset(data_dir, 'train', block_size)):,} records")
    figure.savefig(picture, dpi=110)
    print(f"Saved {picture.with_suffix('.md')} and {picture}", file=sys.stderr)


def four_methods() -> list[Method]:
    return [
        Method("base", "base"),
        Method("LLaMA-Adapter", "adapter", ("--learning_rate", adapter_learning_rate, "--warmup_epochs", 0)),
        lora(lora_r),
        Method("full finetuning", "full", ("--learning_rate", full_learning_rate, "--warmup_steps", 10)),
    ]


def lora_ranks(ranks: str) -> list[Method]:
    try:
        numbers = sorted({int(rank) for rank in ranks.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UserError(f"--ranks is a list of whole numbers from 1 up, for example 1,2,4, not {ranks!r}")
    return [Method("base", "base"), *map(lora, numbers)]


def lora(rank: int) -> Method:
    scale = ("--lora_r", rank, "--lora_alpha", lora_alpha_over_r * rank, "--lora_targets", lora_targets)
    return Method(
        f"LoRA, r = {rank}", "lora", (*scale, "--learning_rate", lora_learning_rate, "--warmup_steps", 10), rank
    )


def measure(method: Method, pretrained_path: Path, data_dir: Path, folder: Path) -> Result:
    """Train, evaluate and ask."""
    script, model = "generate.py", ("--checkpoint_path", pretrained_path)
    evaluated, style, trained = model, ("--prompt_style", "alpaca"), {}
    if method.kind != "base":
        path = folder / ("lit-llama.pth" if method.kind == "full" else f"lit-llama-{method.kind}-finetuned.pth")
        trained = train(method, pretrained_path, data_dir, path)
    if method.kind == "full":
        evaluated = model = ("--checkpoint_path", path)
    elif method.kind != "base":
        weights = (f"--{method.kind}_path", path)
        script, model, style = f"generate_{method.kind}.py", ("--pretrained_path", pretrained_path, *weights), ()
        evaluated += weights
    records = ("--data_dir", data_dir, "--block_size", block_size, "--n_answers", n_answers)
    limit = ("--max_new_tokens", max_new_tokens)
    figures = json.loads(call("scripts/evaluate.py", *evaluated, *records, *limit, "--json", "true")[0])
    asked = [call(script, *model, *style, *limit, "--temperature", 0, "--prompt", q, quiet=True) for q in QUESTIONS]
    return Result(
        loss=figures["responses"]["loss"],
        rouge_l=figures["answers"]["rougeL"],
        speed=statistics.mean(float(re.findall(r"([\d.]+) tokens/sec", err)[0]) for _, err in asked),
        answers=[out.strip() for out, _ in asked],
        **trained,
    )


def train(method: Method, pretrained_path: Path, data_dir: Path, path: Path) -> dict[str, float]:
    """Run the training script, which writes `path`; returns what it took and made, by the names of Result."""
    places = ("--pretrained_path", pretrained_path, "--data_dir", data_dir, "--out_dir", path.parent)
    batches = ("--batch_size", batch_size, "--micro_batch_size", micro_batch_size, "--block_size", block_size)
    rarely = ("--eval_interval", 10**9, "--log_interval", 10)  # validated at the start and the end alone
    extent = ("--num_epochs", num_epochs, "--resume", (path.parent / STATE_FILE).is_file())
    call(f"finetune_{method.kind}.py", *places, *batches, *rarely, *extent, *method.flags)
    rows = read_metrics(path.parent / "metrics.csv")
    steps = [row for row in rows if "train_loss" in row]
    return {
        "parameters": count_parameters(path),
        "file_mb": path.stat().st_size / 1e6,
        "minutes": (steps[-1]["seconds"] - rows[0]["seconds"]) / 60,  # from the first validation to the last step
        "memory_gb": max(row["memory_gb"] for row in steps),
    }


def call(script: str, *flags: object, quiet: bool = False) -> tuple[str, str]:
    """Run a script as a user would; returns its stdout and, if that is not shown as it comes, its stderr."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    stderr = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script} failed" + (f": {done.stderr.splitlines()[-1]}" if done.stderr else ", see above"))
    return done.stdout, done.stderr or ""


def count_parameters(path: Path) -> int:
    content = read_file(path)
    tensors = content.get("state_dict", content).values()
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values())  # tied ones count once


def report(results: dict[Method, Result], pretrained_path: Path, data_dir: Path, picture: str) -> str:
    """The table, the picture and the answers in Markdown."""
    n_train, n_validation = (len(Dataset(data_dir, split, block_size)) for split in ("train", "validation"))
    lines = [
        f"{pretrained_path.parent.name}, {n_train:,} records to train on (epochs: {num_epochs}, records a step: "
        f"{batch_size}), {n_validation:,} to validate on; {datetime.date.today():%d %B %Y}, {machine()}.",
        "",
        "| | " + " | ".join(title for title, *_ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for method, result in results.items():
        cells = [format_number(getattr(result, key), digits) for key, (_, digits, _) in COLUMNS.items()]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    lines += ["", f"![the same as a picture]({picture})", ""]
    for i, question in enumerate(QUESTIONS):
        lines += [f"**{question}**", ""]
        for method, result in results.items():
            lines.append(f"- *{method.name}:* {' '.join(result.answers[i].split())}")
        lines.append("")
    return "\n".join(lines)


def format_number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def machine() -> str:
    """What this ran on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = []
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, no GPU"


def new_figure() -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib; run: pip install -e '.[eval,plot]'") from None
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_methods(figure: "Figure", results: dict[Method, Result]) -> None:
    """A panel of bars for each column of the table but the size of the file, which goes with the parameters."""
    keys = [key for key in COLUMNS if key != "file_mb"]
    for axes, key in zip(figure.subplots(2, 3).flat, keys, strict=True):
        title, digits, logarithmic = COLUMNS[key]
        values = [getattr(result, key) for result in results.values()]
        names = [method.name for method in results]
        smallest, largest = min(filter(None, values), default=1), max(filter(None, values), default=1)
        left, right = (smallest / 10, 10 * largest * (largest / smallest) ** 0.7) if logarithmic else (0, 1.3 * largest)
        widths = [value or left for value in values]
        bars = axes.barh(names, widths, color=["#9aa5b1", "#e0a458", "#3a6ea5", "#7d5ba6"], log=logarithmic)
        labels = [format_number(value, digits) or "none" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(left, right)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)


def draw_ranks(figure: "Figure", results: dict[Method, Result]) -> None:
    """Quality, size and time over the rank; the base model's quality is a dashed line."""
    base, trained = next(iter(results.values())), list(results.items())[1:]
    for axes, key in zip(figure.subplots(2, 2).flat, ("loss", "rouge_l", "file_mb", "minutes"), strict=True):
        title, digits, _ = COLUMNS[key]
        ranks, values = [method.rank for method, _ in trained], [getattr(result, key) for _, result in trained]
        axes.plot(ranks, values, color="#3a6ea5", marker="o", label="LoRA")
        for rank, value in zip(ranks, values, strict=True):
            axes.annotate(format_number(value, digits), (rank, value), (0, 6), textcoords="offset points", ha="center")
        if (level := getattr(base, key)) is not None:
            axes.axhline(level, color="#9aa5b1", linestyle="--", label="base")
            axes.legend(fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.margins(x=0.1, y=0.25)
        if key in ("file_mb", "minutes"):
            axes.set_ylim(0, 1.3 * max(values))
        axes.set(title=title, xlabel="LoRA rank r")
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    run(main)
