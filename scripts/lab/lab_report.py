"""Tables and pictures of lora_lab.py."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from comparison_report import COLORS
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_COLORS = ("#3a6ea5", "#7fb2d9", "#e0a458", "#b5651d", "#7d5ba6", "#5a8f5a", "#c05b6d")  # of a block's matrices


def mean(values: Iterable[float | Tensor]) -> float:
    return statistics.mean(map(float, values))


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


def draw_low_rank(
    figure: "Figure", spectra: dict[str, Tensor], rows: list[list[Any]], levels: dict[str, float]
) -> None:
    """Singular values of the change by full finetuning, and the loss that a part of them reaches."""
    left, right = figure.subplots(1, 2)
    for (title, S), color in zip(spectra.items(), (*KIND_COLORS, "black"), strict=True):
        left.plot(
            range(1, len(S) + 1), S.tolist(), label=title, color=color, linestyle="--" if "random" in title else "-"
        )
    left.set(
        xscale="log", yscale="log", ylim=(1e-3, 1.3), xlabel="singular value, the largest first",
        title="Change of each matrix by full finetuning", ylabel="size, relative to the largest",
    )  # fmt: skip
    left.legend(fontsize=8, loc="lower left")
    ranks, _, cut, trained = zip(*rows, strict=True)
    right.plot(ranks, cut, marker="o", color=COLORS["full"], label="full finetuning, cut to rank r")
    right.plot(ranks, trained, marker="s", color=COLORS["lora"], label="LoRA trained with rank r")
    for (title, level), kind in zip(levels.items(), ("base", "full"), strict=True):
        right.axhline(level, color=COLORS[kind], linestyle="--", label=title)
    over_ranks(right, ranks)
    right.set(title="What a low rank reaches", ylabel="validation loss")
    right.legend(fontsize=8)


def over_ranks(axes: "Axes", ranks: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank r")
    axes.grid(alpha=0.3)


def draw_subspaces(figure: "Figure", grids: dict[str, Tensor], factors: dict[int, dict[str, list[float]]]) -> None:
    """phi(i, j) as a map for each pair of runs (rows) and kind of direction, and the amplification by layer."""
    figure.set_size_inches(11, 6)
    panels = figure.subplots(2, 4)
    largest = max(float(grid.max()) for grid in grids.values())
    for axes, (title, grid) in zip(panels[:, :3].flat, grids.items(), strict=True):
        axes.imshow(
            grid.numpy(),
            vmin=0,
            vmax=largest,
            cmap="viridis",
            aspect="auto",
            extent=(0.5, grid.size(1) + 0.5, grid.size(0) + 0.5, 0.5),
        )
        pair, _, what = title.partition(": ")
        axes.set_title(f"{pair}\n{what}", fontsize=9)
        axes.set(xlabel="j", ylabel="i")
    figure.colorbar(panels[0, 0].images[0], ax=panels[:, :3], label="phi(i, j)", shrink=0.8)
    for axes, (r, kinds) in zip(panels[:, 3], factors.items(), strict=True):
        for (title, values), color in zip(kinds.items(), KIND_COLORS, strict=True):
            axes.plot(values, label=title, color=color)
        axes.set_title(f"amplification, r = {r}", fontsize=9)
        axes.set(xlabel="layer", yscale="log")
        axes.grid(alpha=0.3)
    panels[0, 3].legend(fontsize=6)


def draw_targets(figure: "Figure", results: dict[str, list[float]]) -> None:
    """A dot for each seed, a line at the mean."""
    figure.set_size_inches(6, 3.5)
    axes = figure.subplots()
    for y, losses in enumerate(results.values()):
        axes.plot(losses, [y] * len(losses), "o", color=COLORS["lora"])
        axes.plot(mean(losses), y, "|", markersize=25, color=COLORS["lora"])
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set(xlabel="validation loss", title="The same number of parameters in different matrices")
    axes.grid(alpha=0.3, axis="x")


def draw_settings(figure: "Figure", losses: dict[str, dict[str, dict[float, list[float]]]], deviation: float) -> None:
    """Dots for seeds, lines through their means, bars of one standard deviation of a mean."""
    for axes, (x, series) in zip(figure.subplots(1, len(losses), sharey=True), losses.items(), strict=True):
        for (title, points), color in zip(series.items(), (COLORS["lora"], COLORS["full"]), strict=True):
            means = [mean(values) for values in points.values()]
            bars = [deviation / len(values) ** 0.5 for values in points.values()]
            axes.errorbar(list(points), means, yerr=bars, capsize=4, label=title, color=color)
            for at, values in points.items():
                axes.plot([at] * len(values), values, ".", color=color, alpha=0.6)
        axes.set(xscale="log", xlabel=x, title=f"Only the {x} varies")
        axes.set_xticks(sorted({at for points in series.values() for at in points}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.tick_params(axis="x", labelrotation=30 if x != "rank" else 0)
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss")


def draw_forgetting(figure: "Figure", rows: list[list[Any]]) -> None:
    """What was learned against what was forgotten, and how far the top directions of the weights have turned."""
    left, right = figure.subplots(1, 2)
    colors = [COLORS["lora" if "LoRA" in row[0] else "full" if "full" in row[0] else "base"] for row in rows]
    base = rows[0][1]
    for (title, learned, forgotten, *_), color, marker in zip(rows, colors, "osD^vPX*", strict=True):
        if learned <= base:  # a run that diverged would be far outside
            left.plot(learned, forgotten, marker, color=color, label=title)
    left.legend(fontsize=8, loc="upper right")
    left.margins(0.1)
    left.set(xlabel="validation loss (lower: learned more)", ylabel="loss of an unrelated text (higher: forgot more)")
    left.grid(alpha=0.3)
    titles, cosines = [row[0] for row in rows[1:]], [row[5] for row in rows[1:]]
    right.bar_label(right.barh(titles, cosines, color=colors[1:]), fmt="%.2f", padding=3, fontsize=9)
    right.axvline(0.5, color="black", linestyle="--", label="below: an intruder")
    right.set_xlim(0, 1.15)
    right.set_title("Lowest cosine of the top 10 singular vectors\nwith those of the base model", fontsize=10)
    right.legend(fontsize=8, loc="lower right")
    right.invert_yaxis()


def draw_overfitting(figure: "Figure", rows: list[list[Any]]) -> None:
    """The three losses by epoch."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    epochs, *losses = zip(*rows, strict=True)
    titles = ("the training records", "the same topics in other words", "new topics")
    for title, values, color in zip(titles, losses, (COLORS["lora"], COLORS["adapter"], COLORS["full"]), strict=True):
        axes.plot(epochs, values, marker="o", label=title, color=color)
    axes.set(xlabel="epoch", ylabel="loss", title="Ten epochs on 24 records", ylim=(0, None))
    axes.set_xticks(epochs)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
