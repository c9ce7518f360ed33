"""Experiments on LoRA, each a table and a picture in out_dir; howto/understand_lora.md says what they show.

They share their trainings, each done once by the scripts that users run. An interrupted lab continues where it stopped.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.model_folder import QUICKSTART_MODEL, find_model
from lit_llama.storage.files import replacing, write_file

import torch
from comparison_report import new_figure
from lab_merging import merging
from lab_report import (
    draw_forgetting,
    draw_low_rank,
    draw_overfitting,
    draw_settings,
    draw_subspaces,
    draw_targets,
    mean,
    table,
)
from lab_runs import ALL, ATTENTION, MLP, Lab, Run, scaled
from lora_measures import (
    SVD,
    amplification,
    energy,
    nearest_cosines,
    rank_of_energy,
    similarity_by_chance,
    subspace_similarity,
    svd,
    svd_of_product,
    truncate,
)
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 4, 8, 16, 64)
SEEDS = (1, 2)
FULL = Run("full", rate=2e-4)
KINDS = {  # the matrices of a block
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "projection",
    "gate_proj": "MLP, gate",
    "up_proj": "MLP, up",
    "down_proj": "MLP, down",
}


def main(
    data_dir: Path = Path("data/quickstart"),
    pretrained_path: Path | None = None,
    out_dir: Path = Path("out/lab"),
    only: tuple[str, ...] = (),
) -> None:
    """Run the experiments: low_rank, subspaces, targets, settings, forgetting, overfitting, merging.

    Args:
        data_dir: Folder written by one of scripts/prepare_*.py, with a validation split.
        pretrained_path: The base model. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the last one.
        out_dir: The folder to write. For another model or other data, take another one.
        only: Some of the experiments, by name. By default all of them.
    """
    unknown = set(only) - EXPERIMENTS.keys()
    if unknown:
        raise UserError(f"there is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    start, lab = time.perf_counter(), Lab(find_model(pretrained_path, QUICKSTART_MODEL), data_dir, out_dir)
    for name in only or EXPERIMENTS:
        print(f"## {name}", file=sys.stderr)
        figure = new_figure()
        text = EXPERIMENTS[name](lab, figure)
        write_file(out_dir / f"{name}.md", text)
        with replacing(out_dir / f"{name}.png") as part:
            figure.savefig(part, dpi=110, format="png")
        print(f"{text}\n")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes. Tables and pictures are in {out_dir}", file=sys.stderr)


def low_rank(lab: Lab, figure: "Figure") -> str:
    """Of the change that full finetuning makes, how much is of low rank? Cut to rank r, beside LoRA of rank r."""
    changes = {name: svd(update) for name, update in lab.updates(FULL).items()}
    rows: list[list[object]] = []
    for r in RANKS:
        held = mean(energy(change.S, r) for change in changes.values())
        rows.append([r, f"{held:.0%}", cut_loss(lab, changes, r), lab.loss(scaled(r))])
    levels = {"base": lab.loss(None), "full finetuning": lab.loss(FULL)}
    curves, of_kinds, chance = {}, [], torch.empty(0)
    for kind, title in KINDS.items():
        S = [change.S for name, change in changes.items() if name.endswith(kind)]
        chance = svd(random_matrix(*next(W.shape for name, W in lab.weights.items() if name.endswith(kind)))).S
        curves[title] = torch.stack([s / s[0] for s in S]).mean(0)
        ranks = [mean(rank_of_energy(s, part) for s in S) for part in (0.5, 0.9)]
        of_kinds.append([title, len(chance), *(round(rank) for rank in ranks), rank_of_energy(chance, 0.9)])
    curves["random matrix"] = chance / chance[0]
    draw_low_rank(figure, curves, rows, levels)
    rows.append(["not cut", "100%", cut_loss(lab, changes, None)])
    rows.append(["not cut, with embedding and norms", "", levels["full finetuning"]])
    rows.append(["base", "", levels["base"], levels["base"]])
    losses = table(["rank r", "of its squared norm", "full finetuning, cut to rank r", "LoRA of rank r"], rows)
    titles = ["matrix", "full rank", "rank that holds 50%", "rank that holds 90%", "90% of a random matrix"]
    return f"{losses}\n\n{table(titles, of_kinds)}"


def cut_loss(lab: Lab, changes: dict[str, SVD], r: int | None) -> float:
    """Validation loss of the base model plus the change of its blocks by full finetuning, cut to rank r."""

    def measure() -> float:
        with lab.updated({name: truncate(change, r or len(change.S)) for name, change in changes.items()}) as model:
            return lab.response_loss(model)

    return lab.kept(f"{FULL.name}, cut to rank {r}", measure)


def subspaces(lab: Lab, figure: "Figure") -> str:
    """Which directions do different runs share (section 7.2 of the paper), and which does LoRA amplify (7.3)?"""
    pairs = {
        "r = 8 and r = 64": (lab.factors(scaled(8)), lab.factors(scaled(64, seed=2))),
        "r = 64, two seeds": (lab.factors(scaled(64)), lab.factors(scaled(64, seed=2))),
    }
    rows, pictures = [], {}
    shown = f"model.layers.{lab.base.config.n_layer // 2}.self_attn.q_proj"
    for title, (first, second) in pairs.items():
        for what, directions in DIRECTIONS.items():
            grids = {name: subspace_similarity(directions(first[name]), directions(second[name])) for name in first}
            pictures[f"{title}: {what}"] = grids[shown]
            sizes = [directions(factors).size(0) for factors in first.values()]
            chance = [mean(similarity_by_chance(i, j, n) for n in sizes) for i, j in ((1, 1), (8, 8))]
            measured = [mean(grid[i - 1, j - 1] for grid in grids.values()) for i, j in ((1, 1), (8, 8))]
            rows.append([title, what, *(value for pair in zip(measured, chance, strict=True) for value in pair)])
    factors = {r: amplifications(lab, scaled(r)) for r in (4, 64)}
    draw_subspaces(figure, pictures, factors)
    titles = ["runs", "directions", "the first: phi(1, 1)", "by chance", "the first 8: phi(8, 8)", "by chance"]
    return f"{table(titles, rows)}\n\n{amplification_table(lab, shown)}"


DIRECTIONS: dict[str, Callable[[tuple[Tensor, Tensor]], Tensor]] = {
    "of A, as in the paper": lambda factors: svd(factors[1]).V,
    "that B A reads": lambda factors: svd_of_product(*factors).V,
    "that B A writes": lambda factors: svd_of_product(*factors).U,
}


def amplifications(lab: Lab, of: Run) -> dict[str, list[float]]:
    """The amplification factor of each kind of matrix, layer by layer."""
    found: dict[str, list[float]] = {title: [] for title in KINDS.values()}
    for name, factors in lab.factors(of).items():
        found[KINDS[name.rpartition(".")[2]]].append(
            amplification(lab.weights[name], svd_of_product(*factors), of.r)[2]
        )
    return found


def amplification_table(lab: Lab, name: str) -> str:
    """Table 7 of the paper for one matrix: how much of W lies in the directions of the update, and in others."""
    W, rows = lab.weights[name], []
    for r in (4, 64):
        update = svd_of_product(*lab.factors(scaled(r))[name])
        of_update, of_W, factor = amplification(W, update, r)
        chance = svd_of_product(random_matrix(W.size(0), r), random_matrix(r, W.size(1)))
        others = [amplification(W, directions, r)[1] for directions in (svd(W), chance)]
        rows.append([r, of_update, of_W, *others, factor])
    norm = f"`{name}`, the norm of W is {float(W.norm()):.2f}:"
    titles = ["r", "norm of dW", "W in the directions of dW", "in its own top r", "in r random ones", "amplification"]
    return f"{norm}\n\n{table(titles, rows, digits=2)}"


def targets(lab: Lab, figure: "Figure") -> str:
    """Where should a given number of parameters go?"""
    results, rows = {}, []
    for title, names in {"query, value": "query,value", "attention": ATTENTION, "MLP": MLP, "all": ALL}.items():
        r = lab.rank_for(names, like=Run())
        runs = [scaled(r, targets=names, seed=seed) for seed in SEEDS]
        results[title] = [lab.loss(one) for one in runs]
        rows.append([title, r, lab.n_parameters(runs[0]), *results[title], mean(results[title])])
    draw_targets(figure, results)
    return table(["targets", "r", "parameters", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)


def settings(lab: Lab, figure: "Figure") -> str:
    """Rank, alpha and learning rate, each varied apart, with two seeds for the error bars."""
    panels: dict[str, dict[str, dict[float, list[Run]]]] = {
        "rank": {
            "alpha = 2 r": {r: [scaled(r, seed=seed) for seed in SEEDS] for r in (1, 8, 64)},
            "alpha = 16": {r: [Run(r=r, seed=seed) for seed in SEEDS] for r in (1, 8, 64)},
        },
        "learning rate": {
            "LoRA, r = 8": {rate: [Run(rate=rate, seed=seed) for seed in SEEDS] for rate in (5e-4, 2e-3, 8e-3)},
            "full finetuning": {rate: [Run("full", rate=rate)] for rate in (5e-5, 2e-4, 8e-4)},
        },
    }
    losses = {
        x: {
            title: {at: [lab.loss(one) for one in runs] for at, runs in series.items()}
            for title, series in of_x.items()
        }
        for x, of_x in panels.items()
    }
    points = [values for of_x in losses.values() for series in of_x.values() for values in series.values()]
    deviation = pooled_deviation(points)
    draw_settings(figure, losses, deviation)
    rows = [
        [f"{title}, {x} {at:g}", *values, *[None] * (len(SEEDS) - len(values)), mean(values)]
        for x, of_x in losses.items()
        for title, series in of_x.items()
        for at, values in series.items()
    ]
    text = table(["", *(f"seed {seed}" for seed in SEEDS), "mean"], rows)
    return f"{text}\n\nStandard deviation of a seed, pooled over all rows: {deviation:.3f}."


def pooled_deviation(points: list[list[float]]) -> float:
    """The standard deviation of one value about the mean of its point, from all points that have several values."""
    several = [values for values in points if len(values) > 1]
    squares = sum((value - mean(values)) ** 2 for values in several for value in values)
    return (squares / sum(len(values) - 1 for values in several)) ** 0.5


def forgetting(lab: Lab, figure: "Figure") -> str:
    """What happens to an unrelated text, and which new directions the weights get."""
    runs: dict[str, Run | None] = {"base": None, **FORGETFUL}
    rows: list[list[object]] = []
    for title, one in runs.items():
        row: list[object] = [title, lab.loss(one), lab.unrelated_loss(one), math.exp(lab.unrelated_loss(one))]
        if one is not None:
            size, lowest, count = lab.kept(f"{one.name}: turned", lambda one=one: turned(lab, one))
            row += [f"{size:.1%}", lowest, count]
        rows.append(row)
    draw_forgetting(figure, rows)
    titles = [
        "validation loss",
        "loss of the unrelated text",
        "its perplexity",
        "size of dW",
        "lowest cosine",
        "intruders",
    ]
    return table(["", *titles], rows)


def turned(lab: Lab, of: Run) -> list[float]:
    """How large a run's change is, how near its top directions are to the base's, and how many are new: means."""
    updates = lab.updates(of)
    cosines = {name: nearest_cosines(U, lab.weights[name] + updates[name]) for name, U in lab.directions.items()}
    sizes = [float(updates[name].norm() / lab.weights[name].norm()) for name in cosines]
    return [
        mean(sizes),
        mean(one.min() for one in cosines.values()),
        mean((one < 0.5).sum() for one in cosines.values()),
    ]


FORGETFUL: dict[str, Run] = {
    **{f"LoRA, r = {r}, rate 2e-3": scaled(r) for r in (8, 64)},
    **{f"LoRA, r = 8, rate {title}": Run(rate=rate) for title, rate in (("8e-3", 8e-3), ("3.2e-2", 3.2e-2))},
    **{
        f"full, rate {title}": Run("full", rate=rate)
        for title, rate in (("5e-5", 5e-5), ("2e-4", 2e-4), ("8e-4", 8e-4))
    },
}


def overfitting(lab: Lab, figure: "Figure") -> str:
    """Ten epochs on few records: the loss on those, on the same topics in other words, and on new topics."""
    rows = [[epoch, *lab.losses_of_epoch(epoch)] for epoch in (0, 1, 2, 3, 4, 6, 8, 10)]
    draw_overfitting(figure, rows)
    return table(["epoch", "the training records", "the same topics in other words", "new topics"], rows)


def random_matrix(n_rows: int, n_columns: int) -> Tensor:
    """The same one each time."""
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))


EXPERIMENTS: dict[str, Callable[[Lab, "Figure"], str]] = {
    "low_rank": low_rank,
    "subspaces": subspaces,
    "targets": targets,
    "settings": settings,
    "forgetting": forgetting,
    "overfitting": overfitting,
    "merging": merging,
}


if __name__ == "__main__":
    run(main)
