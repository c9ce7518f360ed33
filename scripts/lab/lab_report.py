"""Tables, intervals and pictures of lora_lab.py."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from comparison_report import COLORS, MARKERS
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T95 = (0, 12.71, 4.30, 3.18, 2.78)  # Student's t for a 95% interval, by degrees of freedom


def mean(values: Iterable[float | Tensor]) -> float:
    return statistics.mean(map(float, values))


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean over the seeds of the differences of two arms, seed by seed, with its 95% interval; or of one arm."""
    pairs = zip(values, others or [0.0] * len(values), strict=True)
    differences = [one - other for one, other in pairs]
    if len(differences) < 2:
        return f"{differences[0]:.3f}"
    half = T95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):.3f} ± {half:.3f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 3) -> str:
    """In Markdown, floats with so many digits; a row may be shorter than the titles."""
    lines = [[*titles], ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        lines.append([cell(value, digits) for value in row] + [""] * (len(titles) - len(row)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def curve(axes: "Axes", x: Any, y: Any, title: str, color: str) -> None:
    """A line with its own colour, marker and dashes."""
    axes.plot(x, y, MARKERS[color], color=COLORS[color], markersize=5, linewidth=1.6, label=title)


def finish(axes: "Axes", title: str, x: str, log: bool = False, ticks: Sequence[float] = ()) -> None:
    axes.set(title=title, xlabel=x)
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(fontsize=9, handlelength=3.5)
    axes.grid(alpha=0.3)
