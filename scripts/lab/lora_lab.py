"""Experiments on LoRA, each a table and a picture in out_dir; howto/lab.md says what they show, and what not.

Trainings are shared, made once, and kept: an interrupted lab continues with the run in which it was stopped.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.model_folder import QUICKSTART_MODEL, find_model
from lit_llama.storage.files import replacing, write_file

import numpy as np
import torch
from comparison_report import COLORS, new_figure
from lab_report import curve, difference, finish, mean, table
from lab_runs import ATTENTION, MLP, RANKS, Lab, Run
from lora_measures import (
    amplification,
    energy,
    rank_of_energy,
    similarity_by_chance,
    subspace_similarity,
    svd,
    svd_of_product,
)
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (1, 2, 3)
RATES = (2e-3, 8e-3)
STEPS = (5, 15, 30)  # at which the arms are measured
ARMS = {
    "LoRA, r = 8": Run(n_steps=30, at=STEPS, details=True),
    "LoRA, r = 64": Run(r=64, n_steps=30, at=STEPS, details=True),
    "full": Run("full", rate=2e-4, n_steps=30, at=STEPS, details=True),
}
PLACES = {"query, value": ("query", "value"), "attention": ATTENTION, "MLP": MLP, "all": ATTENTION + MLP}
EPOCHS = (0, 1, 2, 3, 4, 6, 10)
KINDS = {  # the matrices of a block
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "projection",
    "gate_proj": "MLP, gate",
    "up_proj": "MLP, up",
    "down_proj": "MLP, down",
}
N_DRAWS = 5  # of A
N_RECORDS = 64  # whose gradient is taken


def main(
    data_dir: Path = Path("data/questions"),
    pretrained_path: Path | None = None,
    out_dir: Path = Path("out/lab"),
    only: tuple[str, ...] = (),
) -> None:
    """Run experiments: spectrum, first_step, merging, rank, forgetting, directions, low_rank, overfitting, targets.

    Args:
        data_dir: Folder written by one of scripts/prepare_*.py, with a validation split.
        pretrained_path: The base model. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the one
            written last.
        out_dir: The folder to write. For another model or other data, take another one.
        only: The names of the experiments to run. By default all of them.
    """
    unknown = set(only) - EXPERIMENTS.keys()
    if unknown:
        raise UserError(f"there is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    start, lab = time.perf_counter(), Lab(find_model(pretrained_path, QUICKSTART_MODEL), data_dir, out_dir)
    names = only or tuple(EXPERIMENTS)
    lab.make({one.name: one for name in names for one in runs(name)}.values())
    for name in names:
        figure = new_figure()
        text = EXPERIMENTS[name](lab, figure)
        write_file(out_dir / f"{name}.md", text)
        with replacing(out_dir / f"{name}.png") as part:
            figure.savefig(part, dpi=110, format="png", facecolor="white")
        print(f"{text}\n")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes. Tables and pictures are in {out_dir}", file=sys.stderr)


def kind_of(name: str) -> str:
    return KINDS[name.rpartition(".")[2]]


def spectra(lab: Lab) -> dict[str, dict[str, list[float]]]:
    """Of gradients, signs and noise, for each kind of matrix: the rank that holds 90%, then what POWERS hold; means."""

    def measure() -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS.values()}
        gradients = lab.gradients(range(N_RECORDS))
        for kind, of_kind in found.items():
            matrices = [gradient for name, gradient in gradients.items() if kind_of(name) == kind]
            signs, noise = [gradient.sign() for gradient in matrices], [random_matrix(*matrices[0].shape)]
            for title, of_title in {"gradient": matrices, "its sign": signs, "noise": noise}.items():
                S = [torch.linalg.svdvals(matrix) for matrix in of_title]
                parts = [mean(energy(s, r) for s in S) for r in POWERS if r <= len(S[0])]
                of_kind[title] = [mean(rank_of_energy(s, 0.9) for s in S), *parts]
        return found

    return lab.kept("spectra", measure)


def spectrum(lab: Lab, figure: "Figure") -> str:
    """In how many directions is a gradient, what AdamW's first step makes of it, and a matrix of noise?"""
    found = spectra(lab)
    rows = [
        [kind, *(round(of_kind[title][0]) for title in of_kind), *(f"{of_kind[t][1]:.0%}" for t in of_kind)]
        for kind, of_kind in found.items()
    ]
    for axes, kind in zip(figure.subplots(1, 3, sharey=True), ("query", "projection", "MLP, up"), strict=True):
        for title, color in (("gradient", "lora"), ("its sign", "full"), ("noise", "base")):
            parts = found[kind][title][1:]
            curve(axes, POWERS[: len(parts)], parts, title, color)
        finish(axes, kind, "directions, the strongest first", log=True, ticks=(1, 8, 64, 512))
    figure.axes[0].set_ylabel("part of the squared norm")
    titles = [f"90%: {title}" for title in ("gradient", "sign", "noise")] + ["first: gradient", "sign", "noise"]
    return table(["matrix", *titles], rows)


def first_step(lab: Lab, figure: "Figure") -> str:
    """How far does AdamW's first step lower the loss, by its derivative and in fact, at what r and alpha?"""

    def measure() -> list[list[float]]:
        """For each r and alpha: the fall by the derivative, the real one, and the size of dW relative to W."""
        gradients, found = lab.gradients(range(4)), []
        for r, alpha in SCALES:
            falls, real, sizes = [], [], []
            for draw in range(N_DRAWS):
                torch.manual_seed(draw)
                updates = {name: first_update(gradient, r, alpha) for name, gradient in gradients.items()}
                falls.append(-sum(float((gradients[name] * dW).sum()) for name, dW in updates.items()))
                sizes.append(mean(float(dW.norm() / lab.weights[name].norm()) for name, dW in updates.items()))
                if draw == 0:
                    before = lab.training_loss(range(4))
                    with lab.updated(updates):
                        real.append(before - lab.training_loss(range(4)))
            found.append([mean(falls), mean(real), mean(sizes)])
        return found

    found = lab.kept("first step", measure)
    rows = [
        [f"alpha = {alpha:g}", r, fall, real, f"{size:.2%}"]
        for (r, alpha), (fall, real, size) in zip(SCALES, found, strict=True)
    ]
    left, right = figure.subplots(1, 2)
    for title, color, places in (("alpha = 16", "lora", (0, 1, 2)), ("alpha = 2 r", "full", (3, 1, 4))):
        ranks = [SCALES[i][0] for i in places]
        curve(left, ranks, [found[i][0] for i in places], title, color)
        curve(right, ranks, [found[i][2] for i in places], title, color)
    finish(left, "First-order fall of the loss", "rank r", log=True, ticks=(1, 8, 64))
    finish(right, "Norm of dW, relative to that of W", "rank r", log=True, ticks=(1, 8, 64))
    left.set_yscale("log")
    left.set_ylabel("nats")
    titles = ["r", "fall by the derivative", "real fall", "norm of dW / W"]
    return table(["", *titles], rows)


SCALES = ((1, 16), (8, 16), (64, 16), (1, 2), (64, 128))  # r and alpha
POWERS = tuple(2**i for i in range(10))


def first_update(gradient: Tensor, r: int, alpha: float) -> Tensor:
    """dW after AdamW's first step at a rate of 2e-3: A stays as it is drawn, each entry of B moves by the rate."""
    A = torch.empty(r, gradient.size(1)).uniform_(-1, 1) / gradient.size(1) ** 0.5  # as LoRALinear starts it
    return -alpha / r * 2e-3 * (gradient @ A.mT).sign() @ A


def merging(lab: Lab, figure: "Figure") -> str:
    """What does rounding do to a merged weight?"""
    update_of = ARMS["LoRA, r = 8"]
    updates = {name: B @ A for name, (B, A) in lab.factors(update_of, update_of.n_steps).items()}
    rows: list[list[object]] = []
    for title, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        rounded = {name: lab.weights[name].to(dtype).float() for name in updates}
        merged = {name: (rounded[name] + dW).to(dtype).float() for name, dW in updates.items()}
        kept = mean(float((merged[name] == rounded[name]).float().mean()) for name in updates)
        wrong = mean(float((merged[name] - rounded[name] - dW).norm() / dW.norm()) for name, dW in updates.items())
        losses = []
        for how, weights in {
            "apart": {name: rounded[name] + dW for name, dW in updates.items()},
            "merged": merged,
        }.items():
            change = {name: weight - lab.weights[name] for name, weight in weights.items()}
            losses.append(lab.kept(f"merging: {title}, {how}", lambda change=change: lab.loss_with(change)))
        rows.append([title, f"{kept:.1%}", f"{wrong:.1%}", *(f"{loss:.4f}" for loss in losses)])
    ratios = torch.cat([(dW / lab.weights[name]).abs().flatten()[::50] for name, dW in updates.items()])
    axes = figure.subplots()
    axes.hist(ratios.clamp(2**-16, 2**4).log2().numpy(), bins=60, color=COLORS["lora"])
    axes.axvline(-9, color="black", linestyle="--")
    text = f"below 1/512 of the weight:\n{float((ratios < 1 / 512).float().mean()):.0%}, lost in bfloat16"
    axes.text(-9.2, 0.9 * axes.get_ylim()[1], text, ha="right")
    axes.set(title="Size of an update's entries, relative to their weights", xlabel="|dW / W|", yticks=[])
    axes.set_xticks(range(-16, 5, 4), [f"{2.0**power:.2g}" for power in range(-16, 5, 4)])
    titles = ["base in", "entries that stay as they were", "error, of the norm of dW", "loss, apart", "loss, merged"]
    return table(titles, rows)


def rank(lab: Lab, figure: "Figure") -> str:
    """Rank at one rate, at a fixed alpha and at alpha = 2 r."""
    rows, losses, axes = (
        [],
        {(one.r, one.alpha, one.seed): lab.last_loss(one) for one in runs("rank")},
        figure.subplots(),
    )
    for (title, alphas), color in zip(ALPHAS.items(), ("lora", "full"), strict=True):
        of_ranks = [[losses[r, alpha, seed] for seed in SEEDS] for r, alpha in alphas.items()]
        curve(axes, [*alphas], [*map(mean, of_ranks)], title, color)
        rows.append([title, *map(mean, of_ranks), difference(*of_ranks)])
    finish(axes, "Ten steps at a rate of 2e-3", "rank r", log=True, ticks=[*ALPHAS["alpha = 16"]])
    axes.set_ylabel("validation loss (nats)")
    return table(["", *(f"r = {r}" for r in ALPHAS["alpha = 16"]), "r = 1 minus r = 64"], rows)


ALPHAS = {"alpha = 16": {1: 16, 64: 16}, "alpha = 2 r": {1: 2, 64: 128}}


def targets(lab: Lab, figure: "Figure") -> str:
    """Where should a given number of parameters go? At equal alpha, each place at two rates."""
    rows, axes, best = [], figure.subplots(), {}
    for (title, names), color in zip(PLACES.items(), ("base", "adapter", "full", "lora"), strict=True):
        r = RANKS_OF_PLACES[title]
        losses = [
            [lab.last_loss(one) for one in runs("targets") if (one.targets, one.rate) == (names, rate)]
            for rate in RATES
        ]
        best[title] = min(losses, key=mean)
        rows.append([title, r, lab.n_parameters(r, names), *map(mean, losses)])
        curve(axes, RATES, [mean(of_rate) for of_rate in losses], title, color)
    finish(axes, "The same number of parameters in different matrices", "learning rate", log=True, ticks=RATES)
    axes.set_ylabel("validation loss (nats)")
    pairs = [
        [f"{title} minus all, each at its best rate", difference(values, best["all"])]
        for title, values in best.items()
        if title != "all"
    ]
    head = ["targets", "r", "parameters", *(f"rate {rate:g}" for rate in RATES)]
    return f"{table(head, rows)}\n\n{table(['paired', 'nats'], pairs)}"


RANKS_OF_PLACES = {"query, value": 42, "attention": 21, "MLP": 13, "all": 8}  # equal parameters in SmolLM2-135M


def forgetting(lab: Lab, figure: "Figure") -> str:
    """What is lost on ordinary questions while something is learned: at the same step, and at an equal learned loss."""
    base = lab.base_losses()
    rows, at_equal, axes = [], {}, figure.subplots()
    paths: dict[str, list[np.ndarray]] = {}
    for (title, arm), color in zip(ARMS.items(), ("lora", "adapter", "full"), strict=True):
        for seed in SEEDS:
            found = lab.losses(replace(arm, seed=seed))
            points = [(0.0, 0.0)] + [
                (base["loss"] - found[step]["loss"], mean(found[step]["ordinary"]) - mean(base["ordinary"]))
                for step in STEPS
            ]
            paths.setdefault(title, []).append(np.array(points))
        middle = np.mean(paths[title], axis=0)
        curve(axes, middle[:, 0], middle[:, 1], title, color)
        for path in paths[title]:
            axes.plot(*path.T, color=axes.lines[-1].get_color(), alpha=0.3, linewidth=1)
        for i, step in enumerate(STEPS, 1):
            of_step = [path[i] for path in paths[title]]
            rows.append(
                [
                    f"{title}, step {step}",
                    base["loss"] - mean(p[0] for p in of_step),
                    *(difference([p[j] for p in of_step], []) for j in (0, 1)),
                ]
            )
    level = min(path[:, 0].max() for of_arm in paths.values() for path in of_arm)
    for title, of_arm in paths.items():
        at_equal[title] = [float(np.interp(level, np.maximum.accumulate(path[:, 0]), path[:, 1])) for path in of_arm]
    finish(axes, "Learned, and forgotten", "learned: fall of the validation loss (nats)")
    axes.set_ylabel("forgotten: rise of the loss of the base's own answers (nats)", fontsize=9)
    pairs = [
        [f"forgotten at {level:.2f} nats learned: {title}", difference(values, [])]
        for title, values in at_equal.items()
    ]
    pairs += [
        [f"{title} minus LoRA, r = 8", difference(at_equal[title], at_equal["LoRA, r = 8"])]
        for title in ("LoRA, r = 64", "full")
    ]
    return f"{table(['', 'validation loss', 'learned', 'forgotten'], rows)}\n\n{table(['', 'nats'], pairs)}"


def directions(lab: Lab, figure: "Figure") -> str:
    """Which directions do different runs share (section 7.2 of the paper), and which does LoRA amplify (7.3)?"""
    rows, shares, left, right = [], {}, *figure.subplots(1, 2)
    for step in STEPS:
        found = lab.kept(f"directions, step {step}", lambda step=step: compare_directions(lab, step))
        rows.append([step, *(f"{found[key]:{form}}" for key, form in DIRECTIONS.items())])
        for key in found:
            shares.setdefault(key, []).append(found[key])
    for key, color in (("phi(1, 1), A", "lora"), ("phi(1, 1), written", "full"), ("by chance, A", "base")):
        curve(left, STEPS, shares[key], key, color)
    for key, color in (("amplification", "lora"), ("of random directions", "base")):
        curve(right, STEPS, shares[key], key, color)
    finish(left, "The first direction of r = 8 and r = 64", "step")
    finish(right, "Amplification, r = 8", "step")
    return table(["step", *DIRECTIONS], rows)


DIRECTIONS = {  # what is measured, and how it is written
    "A moved": ".2f",
    "phi(1, 1), A": ".3f",
    "by chance, A": ".4f",
    "phi(1, 1), written": ".3f",
    "by chance, written": ".4f",
    "phi(8, 8), A": ".3f",
    "by chance, A, 8": ".3f",
    "amplification": ".2f",
    "of random directions": ".2f",
}


def compare_directions(lab: Lab, step: int) -> dict[str, float]:
    """Means over all matrices and over three pairs of runs, whose data and initial values differ."""
    small, large = ARMS["LoRA, r = 8"], ARMS["LoRA, r = 64"]
    found: dict[str, list[float]] = {key: [] for key in DIRECTIONS}
    for seed, other in zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True):
        first, second = lab.factors(replace(small, seed=seed), step), lab.factors(replace(large, seed=other), step)
        start = lab.initial_A(replace(small, seed=seed))
        for name, (B, A) in first.items():
            W, update, wide = lab.weights[name], svd_of_product(B, A), svd_of_product(*second[name])
            of_A = subspace_similarity(svd(A).V, svd(second[name][1]).V)
            written = subspace_similarity(update.U, wide.U)
            chance = svd_of_product(random_matrix(W.size(0), small.r), random_matrix(small.r, W.size(1)))
            values = {
                "A moved": float((A - start[name]).norm() / start[name].norm()),
                "phi(1, 1), A": float(of_A[0, 0]),
                "by chance, A": similarity_by_chance(1, 1, W.size(1)),
                "phi(1, 1), written": float(written[0, 0]),
                "by chance, written": similarity_by_chance(1, 1, W.size(0)),
                "phi(8, 8), A": float(of_A[-1, small.r - 1]),
                "by chance, A, 8": similarity_by_chance(small.r, small.r, W.size(1)),
                "amplification": amplification(W, update, small.r)[2],
                "of random directions": float(update.S.norm()) / amplification(W, chance, small.r)[1],
            }
            for key, value in values.items():
                found[key].append(value)
    return {key: mean(values) for key, values in found.items()}


def low_rank(lab: Lab, figure: "Figure") -> str:
    """How much of what all entries of the matrices learn is left if their change is cut to rank r?"""
    full = [lab.losses(replace(ARMS["full"], seed=seed))[STEPS[-1]] for seed in SEEDS]
    base, whole = lab.base_losses()["loss"], [found["loss"] for found in full]
    cut = {r: [found["cut"][str(r)] for found in full] for r in RANKS}
    rows = [
        [
            f"cut to rank {r}",
            mean(losses),
            f"{mean((base - loss) / (base - end) for loss, end in zip(losses, whole, strict=True)):.0%}",
            difference(losses, whole),
        ]
        for r, losses in cut.items()
    ]
    rows.append(["not cut", mean(whole), "100%"])
    for title in ("LoRA, r = 8", "LoRA, r = 64"):
        rows.append([title, mean(lab.losses(replace(ARMS[title], seed=seed))[STEPS[-1]]["loss"] for seed in SEEDS)])
    of_gradient = spectra(lab)
    held = [
        [
            kind,
            round(of_gradient[kind]["gradient"][0]),
            round(mean(found["rank 90%"][name] for found in full for name in lab.weights if kind_of(name) == kind)),
        ]
        for kind in KINDS.values()
    ]
    axes = figure.subplots()
    curve(axes, RANKS, [mean(losses) for losses in cut.values()], "all entries, cut to rank r", "full")
    axes.axhline(mean(whole), color="black", linestyle=":", label="all entries, not cut")
    curve(axes, (8, 64), [row[1] for row in rows[-2:]], "LoRA of rank r", "lora")
    finish(axes, "What the first r directions of a change are worth", "rank r", log=True, ticks=RANKS)
    axes.set_ylabel("validation loss (nats)")
    titles = ["", "validation loss", "of the fall", "minus not cut"]
    return f"{table(titles, rows)}\n\n{table(['matrix', '90% of the gradient', '90% of the change'], held)}"


def overfitting(lab: Lab, figure: "Figure") -> str:
    """Ten epochs on few records: the loss of those, of the same topics in other words, and of new topics."""
    runs_of_few = runs("overfitting")
    found = [lab.losses(one) for one in runs_of_few]
    steps = runs_of_few[0].at
    rows: list[list[object]] = [[epoch] for epoch in EPOCHS]
    axes = figure.subplots()
    for (title, key), color in zip(
        {"the records": "few", "same topics": "twins", "new topics": "new topics"}.items(),
        ("lora", "adapter", "full"),
        strict=True,
    ):
        means = [mean(one[step][key] for one in found) for step in steps]
        curve(axes, EPOCHS, means, title, color)
        for row, step in zip(rows, steps, strict=True):
            row.append(difference([one[step][key] for one in found], []))
    finish(axes, "Ten epochs on 24 records", "epoch")
    axes.set_ylabel("loss (nats)")
    return table(["epoch", "the records", "the same topics in other words", "new topics"], rows)


def random_matrix(n_rows: int, n_columns: int) -> Tensor:
    """The same one each time."""
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))


def runs(experiment: str) -> list[Run]:
    """The trainings that an experiment needs."""
    few = Run(n_steps=60, at=tuple(6 * epoch for epoch in EPOCHS), few=True)
    trained = [replace(arm, seed=seed) for seed in SEEDS for arm in ARMS.values()]
    scales = [Run(r=r, alpha=alpha) for alphas in ALPHAS.values() for r, alpha in alphas.items()]
    places = [Run(r=RANKS_OF_PLACES[title], targets=names) for title, names in PLACES.items()]
    return {
        "rank": [replace(one, seed=seed) for seed in SEEDS for one in scales],
        "targets": [replace(one, rate=rate, seed=seed) for seed in SEEDS for rate in RATES for one in places],
        "forgetting": trained,
        "directions": trained,
        "low_rank": trained,
        "merging": trained[:1],
        "overfitting": [replace(few, seed=seed) for seed in SEEDS],
    }.get(experiment, [])


ALL = (spectrum, first_step, merging, rank, forgetting, directions, low_rank, targets, overfitting)
EXPERIMENTS: dict[str, Callable[[Lab, "Figure"], str]] = {experiment.__name__: experiment for experiment in ALL}


if __name__ == "__main__":
    run(main)
