"""What compare_methods.py makes of its figures: a table, pictures, and the answers with verdicts on them."""

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"base": "#8a8a8a", "adapter": "#e6a700", "lora": "#1f5fa8", "full": "#111111"}
MARKERS = {"base": ":^", "adapter": "--s", "lora": "-o", "full": "-.D"}  # dashes and marker of a line
COLUMNS = {  # of the table and the picture: title, digits, whether its axis is logarithmic
    "parameters": ("trained parameters", 0, True),
    "file_mb": ("file (MB)", 1, True),
    "minutes": ("training (min)", 1, False),
    "memory_gb": ("peak memory (GB)", 2, False),
    "loss": ("validation loss", 3, False),
    "new_loss": ("loss on new topics", 3, False),
    "rouge_l": ("ROUGE-L", 1, False),
}


@dataclass(frozen=True)
class Method:
    """What to train (nothing, for the base model) and the flags of its training script."""

    name: str
    kind: str
    data_dir: Path
    flags: tuple[object, ...] = ()
    rank: int = 0

    def folder(self, out_dir: Path) -> Path:
        return out_dir / re.sub(r"\W+", "-", self.name).lower()


@dataclass
class Result:
    """The columns of the table, those of the training None for the base model, and the answers to the questions."""

    loss: float
    rouge_l: float
    answers: list[str]
    new_loss: float | None = None
    parameters: int | None = None
    file_mb: float | None = None
    minutes: float | None = None
    memory_gb: float | None = None
    spread: dict[str, float] = field(default_factory=dict)  # the standard deviation of a column over the seeds


def average(results: list[Result]) -> Result:
    """The means over the seeds of one method, with the spread of losses and scores; the answers are the first's."""
    if len(results) == 1:
        return results[0]
    values = {key: [getattr(result, key) for result in results] for key in COLUMNS}
    measured = {key: of_seeds for key, of_seeds in values.items() if None not in of_seeds}
    spread = {key: statistics.stdev(measured[key]) for key in ("loss", "new_loss", "rouge_l") if key in measured}
    means = {key: statistics.mean(of_seeds) for key, of_seeds in measured.items()}
    return Result(**means, answers=results[0].answers, spread=spread)  # pyrefly: ignore[bad-argument-type]


def table(results: dict[Method, Result], picture: str) -> list[str]:
    """The table and the picture, in Markdown; a column that nothing was measured for is left out."""
    measured = {key for key in COLUMNS if any(getattr(result, key) is not None for result in results.values())}
    columns = {key: column for key, column in COLUMNS.items() if key in measured}
    lines = [
        "| | " + " | ".join(title for title, *_ in columns.values()) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for method, result in results.items():
        cells = [format_column(result, key) for key in columns]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return [*lines, "", f"![the figures of the table as a picture]({picture})", ""]


def answers(results: dict[Method, Result], questions: tuple[str, ...], verdicts: dict[str, Any]) -> list[str]:
    """What each model answered, in Markdown, with the verdict on it if there is one."""
    lines = []
    for i, question in enumerate(questions):
        lines += [f"**{question}**", ""]
        for method, result in results.items():
            answer = " ".join(result.answers[i].split())
            verdict = f" **{verdicts[answer]}**" if answer in verdicts else ""
            lines.append(f"- *{method.name}:* {answer}{verdict}")
        lines.append("")
    return lines


def format_column(result: Result, key: str) -> str:
    digits = COLUMNS[key][1]
    spread = f" ± {result.spread[key]:.{digits}f}" if key in result.spread else ""
    return format_number(getattr(result, key), digits) + spread


def format_number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


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
    """A panel of dots for each column of the table, except what goes with another one; bars are the spread of seeds."""
    keys = [key for key in COLUMNS if key != "file_mb"]
    for axes, key in zip(figure.subplots(2, 3).flat, keys, strict=True):
        title, _, logarithmic = COLUMNS[key]
        values = [value for result in results.values() if (value := getattr(result, key)) is not None]
        smallest, largest = min(values, default=1), max(values, default=1)
        left, right = (smallest / 10, 10 * largest * (largest / smallest) ** 0.7) if logarithmic else (0, 2.2 * largest)
        for y, (method, result) in enumerate(results.items()):
            value, marker, color = getattr(result, key), MARKERS[method.kind][-1], COLORS[method.kind]
            if value is not None:
                axes.errorbar(value, y, xerr=result.spread.get(key), fmt=marker, color=color, capsize=4)
            text = format_column(result, key) or "-"
            axes.annotate(text, (value or left, y), (8, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_title(f"{title} ({'→' if key == 'rouge_l' else '←'} better)", fontsize=8.5)
        axes.set(xscale="log" if logarithmic else "linear", xlim=(left, right))
        axes.set_yticks(range(len(results)), [method.name for method in results])
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)


def draw_ranks(figure: "Figure", results: dict[Method, Result]) -> None:
    """Quality, size and time over the rank; the base model's quality is a dashed line."""
    base, trained = next(iter(results.values())), list(results.items())[1:]
    for axes, key in zip(figure.subplots(2, 2).flat, ("loss", "rouge_l", "file_mb", "minutes"), strict=True):
        title, digits, _ = COLUMNS[key]
        ranks, values = [method.rank for method, _ in trained], [getattr(result, key) for _, result in trained]
        axes.plot(ranks, values, color=COLORS["lora"], marker="o", label="LoRA")
        for rank, value in zip(ranks, values, strict=True):
            axes.annotate(format_number(value, digits), (rank, value), (0, 6), textcoords="offset points", ha="center")
        if (level := getattr(base, key)) is not None:
            axes.axhline(level, color=COLORS["base"], linestyle="--", label="base")
            axes.legend(fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.margins(x=0.1, y=0.25)
        if key in ("file_mb", "minutes"):
            axes.set_ylim(0, 1.3 * max(values))
        axes.set(title=title, xlabel="LoRA rank r")
        axes.grid(alpha=0.3)
