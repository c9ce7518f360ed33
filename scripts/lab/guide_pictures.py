"""Pictures of howto/understand_lora.md that need no model: a toy that learns, matrices to scale, memory as bars."""

from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.cli import run
from lit_llama.lora import LoRAConfig, LoRALinear
from lit_llama.model import Linear
from lit_llama.storage.files import replacing

import torch
from compare_methods import call
from comparison_report import COLORS, new_figure
from lab_report import curve, finish
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N, ALPHA, RATE, STEPS = 32, 8, 0.02, 400
SIZES = ((576, 576), (1536, 576))  # of SmolLM2-135M: queries and MLP, up
PARTS = {"frozen weights": "#8a8a8a", "trained weights": "#1f5fa8", "gradients": "#6fa8dc", "moments": "#111111"}


def main(out_dir: Path = Path("howto/images")) -> None:
    """Draw them.

    Args:
        out_dir: The folder of the pictures.
    """
    for draw in (toy, sizes, memory):
        figure = new_figure()
        draw(figure)
        with replacing(out_dir / f"lora_{draw.__name__}.png") as part:
            figure.savefig(part, dpi=110, format="png", facecolor="white")


def toy(figure: "Figure") -> None:
    """A layer that learns a change of rank 2: the loss for three ranks, and how far A and B move at first."""
    figure.set_size_inches(9.5, 3.8)
    left, right = figure.subplots(1, 2)
    for r, color in ((1, "adapter"), (2, "lora"), (4, "full")):
        losses, moved = learn(r)
        left.plot(losses, color=COLORS[color], linestyle={1: "--", 2: "-", 4: "-."}[r], linewidth=2, label=f"r = {r}")
        if r == 2:
            curve(right, range(11), [one for one, _ in moved], "A", "full")
            curve(right, range(11), [one for _, one in moved], "B", "lora")
    finish(left, "Learning a change of rank 2", "step")
    left.set(ylabel="loss", ylim=(-1, None))
    finish(right, "Distance from the start, r = 2", "step")


def learn(r: int) -> tuple[list[float], list[tuple[float, float]]]:
    """The loss before each step, and the distance of A and B from their start before each of the first ones."""
    torch.manual_seed(0)
    change, x, W = torch.randn(N, 2) @ torch.randn(2, N), torch.randn(256, N), torch.randn(N, N)  # as in the guide
    layer = LoRALinear(Linear(N, N), {"projection": N}, LoRAConfig(r, ALPHA, 0.0, ("projection",)))
    layer.weight.data = W
    start, losses, moved = layer.lora_A.detach().clone(), [], []
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        if step <= 10:
            moved.append((float((layer.lora_A.detach() - start).norm()), float(layer.lora_B.detach().norm())))
        loss = F.mse_loss(layer(x), x @ (W + change).T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, moved


def sizes(figure: "Figure") -> None:
    """Two matrices of SmolLM2-135M and what LoRA trains beside them, to scale."""
    from matplotlib.patches import Rectangle

    figure.set_size_inches(9.5, 4.6)
    axes, x = figure.subplots(), 0
    for n_out, n_in in SIZES:
        r = 8
        for name, width, height, color in (
            ("W", n_in, n_out, "base"),
            ("B", r, n_out, "lora"),
            ("A", n_in, r, "lora"),
        ):
            axes.add_patch(Rectangle((x, -height), width, height, color=COLORS[color], linewidth=0))
            share = f"\n{width * height:,}"
            axes.text(x + width / 2, 40, f"{name}: {height} x {width}{share}", ha="center", va="bottom", fontsize=10)
            x += width + 200
        x += 160
    axes.set(xlim=(-30, x - 300), ylim=(-1560, 330), aspect="equal")
    axes.set_title("To scale: frozen W in grey, what LoRA trains at r = 8 in blue")
    axes.axis("off")


def memory(figure: "Figure") -> None:
    """The table of memory_ledger.py as stacked bars."""
    head, _, *rows = [line.strip("| \n").split(" | ") for line in call("scripts/memory_ledger.py")[0].splitlines()]
    figure.set_size_inches(9.5, 3.8)
    models = list(dict.fromkeys(row[0] for row in rows))
    for axes, model in zip(figure.subplots(1, len(models)), models, strict=True):
        of_model = [dict(zip(head, row, strict=True)) for row in rows if row[0] == model]
        left = [0.0] * len(of_model)
        for part, color in {**PARTS, "the rest": "#f2d388"}.items():
            widths = [float(row[part].replace(",", "")) / 1000 for row in of_model]
            title = "activations, and what else a step takes" if part == "the rest" else part
            axes.barh(
                [row["method"] for row in of_model], widths, left=left, color=color, edgecolor="white", label=title
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            axes.text(total, y, f" {total:.1f} GB", va="center")
        axes.set(title=model, xlim=(0, 1.25 * max(left)), xlabel="GB")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)


if __name__ == "__main__":
    run(main)
