"""Compare runs of the training scripts, whatever differs between them: a table, and a picture of the validation losses.

Runs that differ in their seed alone are one setting: its losses are means, and the difference from the first setting is
taken seed by seed, with a 95% interval. Below 0 is better; a difference counts if its interval does not contain 0.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.cli import run
from lit_llama.errors import UserError, short
from lit_llama.finetuned import read_described
from lit_llama.progress import say
from lit_llama.storage.files import replacing
from lit_llama.training.log import read_metrics
from lit_llama.training.state import STATE_FILE

import numpy as np

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 95%, by degrees of freedom
ASIDE = ("seed", "base", "base_values", "base_path", "log_interval", "save_interval", "logger", "sample_prompt")
COLOURS = ("#1f5fa8", "#e6a700", "#111111", "#8a8a8a", "#c0392b")
LINES = ("-o", "--s", "-.D", ":^", "-v")


class Run(NamedTuple):
    path: Path
    settings: dict[str, Any]
    steps: np.ndarray  # at which it was validated, (n,)
    losses: np.ndarray  # nats a response token, (n,)


def main(runs: tuple[Path, ...], out_path: Path = Path("out/runs.png")) -> None:
    """Print the last and best validation losses of each setting, and how far the best are from the first setting's.

    Args:
        runs: Folders that the training scripts wrote; the first one's setting is what the others are compared with.
        out_path: The picture to write; it needs matplotlib.
    """
    read = [read_run(path) for path in runs]
    arms: dict[str, dict[int, Run]] = {}
    for each, title in zip(read, differing([each.settings for each in read]), strict=True):
        seeds = arms.setdefault(title, {})
        if (seed := each.settings["seed"]) in seeds:
            raise UserError(f"{each.path} and {seeds[seed].path} have the same settings and seed; leave one out")
        seeds[seed] = each
    if len({each.settings["data"] for each in read}) > 1:
        say("warning: the runs have different data, so their losses may not be of the same records")
    first = next(iter(arms.values()))
    print("| setting | seeds | last loss | best loss | at step | best, minus the first setting's (95%) |")
    print("|---|---:|---:|---:|---:|---:|")
    for title, seeds in arms.items():
        last = statistics.mean(each.losses[-1] for each in seeds.values())
        best = statistics.mean(each.losses.min() for each in seeds.values())
        steps = sorted({int(each.steps[each.losses.argmin()]) for each in seeds.values()})
        at = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        pairs = [seeds[seed].losses.min() - first[seed].losses.min() for seed in seeds.keys() & first.keys()]
        apart = "" if seeds is first else difference(pairs)
        print(f"| {title} | {len(seeds)} | {last:.4f} | {best:.4f} | {at} | {apart} |")
    draw(arms, out_path)


def read_run(folder: Path) -> Run:
    """The settings of a run, and its validations."""
    if not (folder / STATE_FILE).is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {STATE_FILE}; give the --out_dir of one")
    content = read_described(folder / STATE_FILE, check_tensors=False)
    steps, losses = read_metrics(folder / "metrics.csv", "step", "validation_loss")
    validated = np.isfinite(losses)
    if not validated.any():
        raise UserError(f"{folder} was never validated, so there is nothing to compare")
    return Run(folder, {"kind": content["kind"], **content["hyperparameters"]}, steps[validated], losses[validated])


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each run, the settings in which not all runs are alike; "" stands for one that a script does not have."""
    names = [name for name in dict.fromkeys(name for each in settings for name in each) if name not in ASIDE]
    apart = [name for name in names if len({repr(each.get(name)) for each in settings}) > 1]
    return [", ".join(f"{name} {short(each[name])}" for name in apart if name in each) or "all" for each in settings]


def difference(pairs: Sequence[float]) -> str:
    """The mean of differences, seed by seed, with its 95% interval (Student's t)."""
    if not pairs:
        return "no seed in common"
    if len(pairs) == 1:
        return f"{pairs[0]:+.4f} (one seed)"
    t = T95[min(len(pairs) - 1, len(T95)) - 1]  # a little too large beyond the table
    return f"{statistics.mean(pairs):+.4f} ± {t * statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}"


def draw(arms: Mapping[str, Mapping[int, Run]], path: Path) -> None:
    """The validation loss of each run over its steps, in one colour for a setting."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("the picture is left out; it needs matplotlib: pip install -e '.[plot]'")
        return
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (title, seeds) in enumerate(arms.items()):
        for j, each in enumerate(seeds.values()):
            line, colour, label = LINES[i % len(LINES)], COLOURS[i % len(COLOURS)], title if j == 0 else None
            axes.plot(each.steps, each.losses, line, color=colour, markersize=4, linewidth=1.5, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per response token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    with replacing(path) as part:
        figure.savefig(part, format="png")
    print(f"Saved {path}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
